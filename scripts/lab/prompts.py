"""Write the prompts that a runtime makes of conversations, without its server.

Reads a JSON list of talks from stdin, as dsv4/model/conversations.json has them (messages, tools,
enable_thinking, reasoning_effort, add_generation_prompt), and prints a JSON list: each talk's
prompt, or {"fault"}. Runs in the runtime's Python, which loads the bundle for it: seconds for the
nano.

    --how loader      the tokenizer of vMLX's loader, which runs the bundle's encoding_dsv4.py
    --how mlx-lm      the tokenizer of mlx_lm.load
    --how mlx-vlm     mlx_vlm.prompt_utils.apply_chat_template, which its server calls

    .venv/bin/python scripts/lab/prompts.py --folder DIR --how loader < talks.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import locations  # noqa: F401

from dsv4.toolchain.hide_torchvision import hide

Writer = Callable[..., str]  # (messages, tools=…, enable_thinking=…, …) → prompt


def loader(folder: Path) -> Writer:
    from vmlx_engine.loaders.load_jangtq_dsv4 import load_jangtq_dsv4_model

    return untokenized(load_jangtq_dsv4_model(folder)[1])


def mlx_lm(folder: Path) -> Writer:
    import jang_tools.dsv4.mlx_register  # noqa: F401
    from mlx_lm import load

    return untokenized(load(str(folder))[1])


def untokenized(tokenizer: Any) -> Writer:
    def write(messages: list[dict], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    return write


def mlx_vlm(folder: Path) -> Writer:
    hide()
    from mlx_vlm import load
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = load(str(folder))

    def write(messages: list[dict], **options: Any) -> str:
        return apply_chat_template(processor, model.config, messages, **options)

    return write


HOW = {"loader": loader, "mlx-lm": mlx_lm, "mlx-vlm": mlx_vlm}


def prompt_of(write: Writer, talk: dict[str, Any]) -> str | dict[str, str]:
    """The prompt of one talk, or why there is none. Thinking is asked for by the runtimes' name."""
    talk["enable_thinking"] = bool(talk.get("enable_thinking") or talk.pop("thinking", False))
    try:
        return write(talk.pop("messages"), **talk)
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"[:300]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="bundle")
    parser.add_argument("--how", choices=HOW, required=True)
    args = parser.parse_args()
    talks = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        write = HOW[args.how](args.folder)
        prompts = [prompt_of(write, talk) for talk in talks]
    print(json.dumps(prompts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
