"""Print what a runtime answers to questions, or the prompts that it makes of conversations.

Runs in the runtime's Python, without its server. Reads JSON from stdin, prints JSON:

    --print answers   a list of questions → a list of {"text", "finish_reason"}, greedy
    --print prompts   a list of conversations, as dsv4/model/conversations.json has them (messages,
                      tools, enable_thinking, reasoning_effort, add_generation_prompt) → a list
                      of prompts, {"fault"} where there is none

    --how loader      vMLX's loader and its tokenizer (encoding_dsv4.py of the bundle); prompts only
    --how mlx-lm      mlx_lm with jang_tools' model, as it has none of its own
    --how mlx-vlm     mlx_vlm, with the chat template as its server applies it

    .venv/bin/python scripts/lab/chat.py --bundle DIR --how mlx-lm --print answers < questions.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import locations  # noqa: F401

from dsv4.toolchain.hide_torchvision import hide

MAX_TOKENS = 40


class VmlxLoader:
    """The tokenizer of vMLX's loader."""

    def __init__(self, bundle: Path) -> None:
        from vmlx_engine.loaders.load_jangtq_dsv4 import load_jangtq_dsv4_model

        self.model, self.tokenizer = load_jangtq_dsv4_model(bundle)

    def prompt(self, messages: list[dict], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)


class MlxLm(VmlxLoader):
    """mlx_lm.load and stream_generate."""

    def __init__(self, bundle: Path) -> None:
        import jang_tools.dsv4.mlx_register  # noqa: F401
        from mlx_lm import load

        self.model, self.tokenizer = load(str(bundle))

    def answer(self, question: str) -> dict[str, str]:
        from mlx_lm import stream_generate

        messages = [{"role": "user", "content": question}]
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        parts = list(stream_generate(self.model, self.tokenizer, prompt, max_tokens=MAX_TOKENS))
        text = "".join(part.text for part in parts)
        return {"text": text, "finish_reason": parts[-1].finish_reason}


class MlxVlm:
    """mlx_vlm.load and stream_generate."""

    def __init__(self, bundle: Path) -> None:
        hide()
        from mlx_vlm import load

        self.model, self.processor = load(str(bundle))

    def prompt(self, messages: str | list[dict], **options: Any) -> str:
        from mlx_vlm.prompt_utils import apply_chat_template

        return apply_chat_template(self.processor, self.model.config, messages, **options)

    def answer(self, question: str) -> dict[str, str]:
        from mlx_vlm import stream_generate

        prompt = self.prompt(question, num_images=0)
        settings = {"max_tokens": MAX_TOKENS, "temperature": 0.0}
        parts = list(stream_generate(self.model, self.processor, prompt, **settings))
        text = "".join(part.text for part in parts)
        reason = getattr(parts[-1], "finish_reason", None)
        return {
            "text": text,
            "finish_reason": reason or ("stop" if len(parts) < MAX_TOKENS else "length"),
        }


HOW = {"loader": VmlxLoader, "mlx-lm": MlxLm, "mlx-vlm": MlxVlm}


def prompt_or_fault(runtime: Any, talk: dict[str, Any]) -> str | dict[str, str]:
    """Return one conversation's prompt, or the error. Thinking gets the runtimes' name."""
    talk["enable_thinking"] = bool(talk.get("enable_thinking") or talk.pop("thinking", False))
    try:
        return runtime.prompt(talk.pop("messages"), **talk)
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"[:300]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--how", choices=HOW, required=True)
    parser.add_argument("--print", choices=("answers", "prompts"), required=True)
    args = parser.parse_args()
    asked = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        runtime = HOW[args.how](args.bundle)
        if args.print == "answers":
            result = [runtime.answer(question) for question in asked]
        else:
            result = [prompt_or_fault(runtime, talk) for talk in asked]
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
