"""Show on the nano model what the recipe is for: the stock bundle beside the right one.

Both are loaded by the toolchain's real loader and served by its real server. The logits of each are
compared with those of the source decoded to float32 by the same model code, and those of the right
bundle also with its own tensors dequantized, which no label can spoil. Each server is asked the
plan's two questions and 50 additions that training never saw. All of that goes on at once, as far
as there are processors. Newer vMLX refuses the stock bundle, and the table says so.

`make demo` and `make selftest` run it after the stages. Prints a table. Exit 0: the right bundle is
right and the stock one is told apart; 1: this toolchain cannot be trusted with the big model.

    .venv/bin/python scripts/demo.py --source DIR --stock DIR --bundle DIR [--python PYTHON]
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dsv4.acceptance.nano import (
    MAX_DISTANCE,
    MIN_EXACT,
    QUESTIONS,
    Logits,
    compare,
    held_out,
    run_logits,
    token_prompts,
)
from dsv4.acceptance.smoke_questions import MOON, SUM, sentence_fault, sum_fault
from dsv4.errors import UserError, run
from dsv4.settings import add_setting, parse_path
from dsv4.storage.disk_space import folder_bytes
from dsv4.toolchain.python_env import default_python
from dsv4.toolchain.server import Answer, ask_question, running_server

TOKENS = 20  # of an addition's answer, which takes 15 at most, its reasoning included


@dataclass(frozen=True)
class Talk:
    """What a server answered: the two questions, and how many additions were exactly right."""

    moon: Answer
    sum: Answer
    exact: int
    seconds: float


@dataclass(frozen=True)
class Seen:
    """All that was seen of one bundle that loads."""

    logits: Logits
    talk: Talk
    folder: Path


def talk(
    python: Path, bundle: Path, additions: list[tuple[int, int]], work: Path, bar: tqdm
) -> Talk:
    """Serve the bundle and ask everything."""
    start = time.monotonic()
    with running_server(python, bundle, work / f"server-{bundle.name}.log") as url:
        moon, total = ask_question(url, MOON, 60), ask_question(url, SUM, TOKENS)
        exact = 0
        for a, b in additions:
            exact += ask_question(url, f"What is {a}+{b}?", TOKENS).content.strip() == str(a + b)
            bar.update()
    return Talk(moon, total, exact, time.monotonic() - start)


def examine(args: argparse.Namespace) -> tuple[Seen | UserError, Seen, Logits]:
    """The stock bundle, or how it was refused; the right one; its logits against its own tensors'.

    Raises UserError when the right bundle cannot be loaded and asked.
    """
    additions = held_out(args.source, QUESTIONS)
    ids, work = token_prompts(args.source, additions), args.bundle.parent
    with (
        tqdm(total=2 * len(additions), desc="additions", disable=None) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        talks = [
            pool.submit(talk, args.python, folder, additions, work, bar)
            for folder in (args.bundle, args.stock)
        ]
        wanted = [(args.source, "source"), (args.bundle, "loader"),
                  (args.bundle, "tensors"), (args.stock, "loader")]  # fmt: skip
        found = [pool.submit(run_logits, args.python, *one, ids, work) for one in wanted]
        source, loaded, own = (answer.result() for answer in found[:3])
        right = Seen(compare(loaded, source), talks[0].result(), args.bundle)
        try:
            stock = Seen(compare(found[3].result(), source), talks[1].result(), args.stock)
        except UserError as refusal:
            stock = refusal
    return stock, right, compare(loaded, own)


def shorten(answer: Answer) -> str:
    text = answer.content or f"(reasoning) {answer.reasoning}"
    return repr(text if len(text) <= 46 else text[:45] + "…")


ROWS = [
    SUM, "  finish_reason", MOON, "  finish_reason", "held-out additions, exact",
    "logits to source: cosine", "  relative L2 distance", "  same next token",
    "bytes", "seconds, served and asked",
]  # fmt: skip


def column(seen: Seen | UserError) -> list[str]:
    """One bundle's side of the table, in the order of ROWS."""
    if isinstance(seen, UserError):
        return ["refuses to load", *[""] * (len(ROWS) - 1)]
    return [
        shorten(seen.talk.sum),
        seen.talk.sum.finish_reason,
        shorten(seen.talk.moon),
        seen.talk.moon.finish_reason,
        f"{seen.talk.exact} of {QUESTIONS}",
        f"{seen.logits.cosine:.4f}",
        f"{seen.logits.distance:.4f}",
        f"{seen.logits.agreement:.1%}",
        f"{folder_bytes(seen.folder):,}",
        f"{seen.talk.seconds:.0f}",
    ]


def table(stock: Seen | UserError, right: Seen) -> str:
    """The two bundles side by side, one row a measure."""
    rows = zip(ROWS, column(stock), column(right), strict=True)
    head = f"{'':36}{'stock bundle':50}right bundle"
    lines = [head, *(f"{name:36}{a:50}{b}" for name, a, b in rows)]
    return "\n".join([*lines, f"stock bundle: {stock}"] if isinstance(stock, UserError) else lines)


def faults(stock: Seen | UserError, right: Seen, own: Logits) -> list[str]:
    """What is not as it must be: in the right bundle, or a stock bundle that looks right."""
    out = []
    if fault := sentence_fault(right.talk.moon):
        out.append(f"right bundle, moon: {fault}")
    if fault := sum_fault(right.talk.sum):
        out.append(f"right bundle, sum: {fault}")
    if right.talk.exact < MIN_EXACT:
        out.append(f"right bundle: {right.talk.exact} of {QUESTIONS} right, {MIN_EXACT} needed")
    for what, value in (("the source", right.logits), ("its own tensors", own)):
        if not value.distance <= MAX_DISTANCE:
            out.append(f"right bundle: distance {value.distance:.3f} to {what} > {MAX_DISTANCE}")
    loaded = not isinstance(stock, UserError)
    if loaded and stock.logits.distance <= MAX_DISTANCE and stock.talk.exact >= MIN_EXACT:
        out.append("the stock bundle is right too: this demonstration shows nothing")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=parse_path, required=True)
    parser.add_argument(
        "--stock", type=parse_path, required=True, help="bundle as upstream makes it"
    )
    parser.add_argument(
        "--bundle", type=parse_path, required=True, help="bundle after all the stages"
    )
    add_setting(
        parser, "TOOLCHAIN_PYTHON", option="--python", default=default_python(), help="toolchain"
    )
    args = parser.parse_args()
    stock, right, own = examine(args)
    print(table(stock, right))
    print(f"right bundle to its own tensors, dequantized: cosine {own.cosine:.4f}")
    found = faults(stock, right, own)
    if found:
        raise UserError(
            "demo", "; ".join(found), "a right bundle", "do not build the big model yet"
        )
    print("This toolchain loads and serves a right bundle right.")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
