"""Run another project's command in a runtime's Python as it is installed.

Two things stand in the way there: a torchvision that does not fit, which is hidden
(dsv4/toolchain/hide_torchvision.py), and an mlx_lm that has no DeepSeek-V4 of its own: jang's is
registered with it, where jang is.

    .toolchain/new/bin/python scripts/lab/upstream.py mlx_vlm convert --hf-path DIR --mlx-path DIR
"""

from __future__ import annotations

import contextlib
import runpy
import sys

import rooms  # noqa: F401

from dsv4.toolchain.hide_torchvision import hide


def main() -> None:
    hide()
    with contextlib.suppress(ImportError):
        import jang_tools.dsv4.mlx_register  # noqa: F401
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
