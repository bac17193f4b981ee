#!/usr/bin/env python3
"""Train the nano DeepSeek-V4 and write it as a source checkpoint.

The big model cannot be loaded on a test machine. Converters, runtimes and patches are tested
on this model of 2 million parameters, which has the same layout, adds two-digit numbers, and
answers with a sentence about the moon. scripts/nano/checkpoint is this command's output, with
record.json beside it; building a bundle does not need this command.

Steps:
  1. builds the tokenizer and compares nano/model.py with transformers' DeepseekV4ForCausalLM;
  2. trains in three phases (nano/training.py), in --processes data-parallel processes,
     on 7,289 of the 8,100 additions of 10..99 and 10..99; 811 are held out by seed;
  3. moves powers of two between neighbouring matrices so that FP4 scales differ;
  4. measures exact match on the weights as they are stored, by prompt form and split;
  5. writes the checkpoint to --out and record.json beside it.

Costs 15 to 35 minutes on 2 CPU cores, and 1.5 GB of memory.

Run it:
  pip install -r scripts/nano/requirements.txt
  python scripts/lab/train_nano.py --out scripts/nano/checkpoint

A stopped run resumes from the last multiple of 200 steps (--fresh starts again). With
--save-early STEP it also writes an unsaturated checkpoint, under the work folder.

Exit status: 0 trained and written, or written again from a finished run; 1 failed, the
model differing from transformers or its answers being worse than --least; 2 usage.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import locations  # noqa: F401
import torch

from nano import data, export, sheets, tokenizer
from nano.architecture import NANO
from nano.comparison import reference_difference
from nano.model import Tensors
from nano.training import Lessons, Recipe, State, exact, forget, train

TOLERANCE = 1e-5
STEPS = (600, 700, 250)


class TrainingError(Exception):
    """The result is not usable. The message says why and what to do."""


def arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/nano-training"),
        help="folder of the state to resume from (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=7, help="of weights, batches and the split (%(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs=3,
        default=STEPS,
        metavar=("ONE_FORM", "ALL_FORMS", "ROUNDED"),
        help="steps of the three phases (%(default)s)",
    )
    parser.add_argument("--batch", type=int, default=64, help="rows a process (%(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="one core each (%(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (%(default)s)")
    parser.add_argument(
        "--least",
        type=float,
        default=0.99,
        help="fail below this share of right held-out answers (%(default)s)",
    )
    parser.add_argument(
        "--save-early",
        type=int,
        nargs="*",
        default=[],
        metavar="STEP",
        help="write checkpoints of these steps too, under the work folder",
    )
    parser.add_argument("--fresh", action="store_true", help="forget an unfinished run")
    return parser.parse_args()


def recipe_of(args: argparse.Namespace) -> Recipe:
    """Return the training recipe that the command line asks for."""
    one_form, all_forms, rounded = args.steps
    return Recipe(
        seed=args.seed,
        one_form=one_form,
        all_forms=all_forms,
        rounded=rounded,
        batch=args.batch,
        processes=args.processes,
        rate=args.rate,
        weight_decay=0.05,
        warmup=100,
    )


def check_model(seed: int) -> float:
    """Return the greatest difference from transformers. Raises TrainingError above TOLERANCE."""
    difference = reference_difference(NANO, seed)
    if difference > TOLERANCE:
        raise TrainingError(
            f"nano/model.py against transformers: found a difference of {difference:.1e}, "
            f"expected at most {TOLERANCE:.0e}; see what transformers {version('transformers')} "
            "changed in models/deepseek_v4"
        )
    return difference


def shares_right(weights: Tensors, state: State, asked: list[sheets.Sheet]) -> list[float]:
    """Return the share of right answers, one number a prompt form."""
    return [exact(weights, state.routing, sheet, NANO).float().mean().item() for sheet in asked]


def pages(words, lessons: list[data.Lesson], rotate: bool) -> list[sheets.Sheet]:
    """Return a sheet for each prompt form: every lesson, or each lesson in one form only."""
    count = len(data.FORMS)
    return [
        sheets.sheet(words, lessons[i::count] if rotate else lessons, form)
        for i, form in enumerate(data.FORMS)
    ]


def measure(words, weights: Tensors, state: State, held_out: list[int]) -> dict:
    """Return accuracies by split and prompt form, of weights as they are stored.

    Held-out additions and the sentences are asked in every form, each trained addition in
    one form.
    """
    lessons = data.additions()
    left = set(held_out)
    splits = {
        "train": ([lesson for i, lesson in enumerate(lessons) if i not in left], True),
        "held_out": ([lessons[i] for i in held_out], False),
        "sentences": ([data.Lesson(*sentence) for sentence in data.SENTENCES], False),
    }
    result = {}
    for split, (chosen, rotate) in splits.items():
        shares = shares_right(weights, state, pages(words, chosen, rotate))
        result[split] = {
            "questions": len(chosen),
            "prompts": len(chosen) * (1 if rotate else len(data.FORMS)),
            "least": min(shares),
            "by_form": shares,
        }
    return result


def record(args, state: State, held_out: list[int], accuracies: dict, difference: float) -> dict:
    """Return the content of record.json."""
    pairs = [data.additions()[i].reasoning.split("=")[0] for i in held_out]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python scripts/lab/train_nano.py " + " ".join(sys.argv[1:]),
        "recipe": asdict(recipe_of(args)),
        "parameters": sum(value.numel() for value in state.tensors.values()),
        "training_seconds": round(state.seconds),
        "machine": f"{platform.system()} {platform.machine()}, {args.processes} processes",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
        "difference_from_transformers": difference,
        "accuracy_note": "exact match of the whole answer under greedy decoding, float32, "
        "weights as stored (FP4, FP8, BF16)",
        "prompt_forms": [{"system": system, "opening": opening} for system, opening in data.FORMS],
        "accuracies": accuracies,
        "held_out_note": "never trained on in any prompt form; nano/data.py held_out(seed)",
        "held_out": " ".join(pairs),
    }


def write(folder: Path, words, state: State, seed: int) -> Tensors:
    """Write one checkpoint, tokenizer included; return its weights as they read back."""
    spread = export.spread_exponents(state.tensors, NANO, seed)
    export.write_checkpoint(spread, state.routing, NANO, seed, folder)
    tokenizer.save(words, folder)
    return export.as_stored(spread, NANO)


def learn(args: argparse.Namespace, words, held_out: list[int]) -> State:
    """Train on all but the held-out additions; resume an unfinished run."""
    args.work.mkdir(parents=True, exist_ok=True)
    left = set(held_out)
    taught = [lesson for i, lesson in enumerate(data.additions()) if i not in left]
    sentences = [data.Lesson(*sentence) for sentence in data.SENTENCES]
    lessons = Lessons(sheets.sheets(words, taught), sheets.sheets(words, sentences))
    path = args.work / "state.pt"
    if args.fresh:
        forget(path)
    state = train(recipe_of(args), NANO, lessons, path, args.save_early)
    for step in args.save_early:
        early = State.load(path.with_stem(f"state-{step}"))
        write(args.work / f"early-{step}", words, early, args.seed)
    return state


def run(args: argparse.Namespace) -> None:
    """Do the five steps of the module's docstring."""
    export.check_folder(args.out, NANO)
    words = tokenizer.build(data.texts())
    difference = check_model(args.seed)
    held_out = data.held_out(args.seed)
    state = learn(args, words, held_out)
    weights = write(args.out, words, state, args.seed)
    accuracies = measure(words, weights, state, held_out)
    text = json.dumps(
        record(args, state, held_out, accuracies, difference), indent=2, ensure_ascii=False
    )
    args.out.with_name("record.json").write_text(text + "\n", encoding="utf-8")
    least = accuracies["held_out"]["least"]
    print(f"held-out additions right: {least:.2%} in the worst prompt form", file=sys.stderr)
    if least < args.least:
        raise TrainingError(
            f"held-out additions: found {least:.2%} right, expected {args.least:.2%}; "
            "train longer (--steps) or from another --seed"
        )


def main() -> int:
    """Run the command and return its exit status."""
    args = arguments()
    torch.set_num_threads(args.processes)
    try:
        run(args)
    except (TrainingError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
