"""Run another project's module in a runtime's Python.

Hides a torchvision that does not match its torch (dsv4/toolchain/hide_torchvision.py), and
registers jang's DeepSeek-V4 with mlx_lm, which has none, if jang is installed.

    .toolchain/new/bin/python scripts/lab/upstream.py mlx_vlm convert --hf-path DIR --mlx-path DIR
"""

from __future__ import annotations

import contextlib
import runpy
import sys

import locations  # noqa: F401

from dsv4.toolchain.hide_torchvision import hide


def main() -> None:
    hide()
    with contextlib.suppress(ImportError):
        import jang_tools.dsv4.mlx_register  # noqa: F401
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
