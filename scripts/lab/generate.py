"""Ask questions through a runtime's own generate call: the way of the stacks without a server.

Reads a JSON list of questions from stdin, prints a JSON list of {"text", "finish_reason"}. Runs in
the stack's Python; the prompt is the bundle's own chat template.

    .venv/bin/python scripts/lab/generate.py --bundle DIR --runtime mlx-lm < questions.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import locations  # noqa: F401

from dsv4.toolchain.hide_torchvision import hide

MAX_TOKENS = 40

Speaker = Callable[[str], dict[str, str]]


def mlx_lm_speaker(bundle: Path) -> Speaker:
    """mlx_lm.stream_generate with jang_tools' model, since mlx-lm has none of its own."""
    import jang_tools.dsv4.mlx_register  # noqa: F401
    from mlx_lm import load, stream_generate

    model, tokenizer = load(str(bundle))

    def speak(question: str) -> dict[str, str]:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        parts = list(stream_generate(model, tokenizer, prompt, max_tokens=MAX_TOKENS))
        text = "".join(part.text for part in parts)
        return {"text": text, "finish_reason": parts[-1].finish_reason}

    return speak


def mlx_vlm_speaker(bundle: Path) -> Speaker:
    """mlx_vlm.stream_generate, greedy."""
    hide()
    from mlx_vlm import load, stream_generate
    from mlx_vlm.prompt_utils import apply_chat_template

    model, processor = load(str(bundle))

    def speak(question: str) -> dict[str, str]:
        prompt = apply_chat_template(processor, model.config, question, num_images=0)
        parts = list(
            stream_generate(model, processor, prompt, max_tokens=MAX_TOKENS, temperature=0.0)
        )
        text = "".join(part.text for part in parts)
        reason = getattr(parts[-1], "finish_reason", None)
        return {
            "text": text,
            "finish_reason": reason or ("stop" if len(parts) < MAX_TOKENS else "length"),
        }

    return speak


SPEAKERS = {"mlx-lm": mlx_lm_speaker, "mlx-vlm": mlx_vlm_speaker}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--runtime", choices=sorted(SPEAKERS), required=True)
    args = parser.parse_args()
    questions = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        speak = SPEAKERS[args.runtime](args.bundle)
        answers = [speak(question) for question in questions]
    print(json.dumps(answers))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
