"""Compare the stock bundle of the nano model with the right one, in the toolchain's runtime.

Both are loaded by the toolchain's loader and served by its server. The logits of each are compared
with those of the source, decoded to float32, by the same model code; those of the right bundle also
with its own tensors dequantized, which does not depend on labels. Each server is asked two
questions and 50 additions that are held out of the training. Newer vMLX refuses the stock bundle;
the table says so.

`make demo` and `make selftest` run it after the stages. Prints a table. Exit 0: the right bundle is
right and the stock one differs; 1: this toolchain cannot be trusted with the big model.

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

from dsv4.acceptance.client import Answer, Endpoint, ask_question
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
from dsv4.toolchain.server import NAME, running_server

TOKENS = 20  # of the answer to an addition, which takes 15 at most with its reasoning


@dataclass(frozen=True)
class Answers:
    """Answers of a server: to the two questions, and the number of exact additions."""

    moon: Answer
    sum: Answer
    exact: int
    seconds: float


@dataclass(frozen=True)
class Measurements:
    """Measurements of one bundle that loads."""

    logits: Logits
    answers: Answers
    folder: Path


def ask_server(
    python: Path, bundle: Path, additions: list[tuple[int, int]], work: Path, bar: tqdm
) -> Answers:
    """Serve the bundle and ask all questions. The server writes its log to `work`."""
    start = time.monotonic()
    with running_server(python, bundle, work / f"server-{bundle.name}.log") as url:
        endpoint, exact = Endpoint(url, NAME), 0
        moon, total = ask_question(endpoint, MOON, 60), ask_question(endpoint, SUM, TOKENS)
        for a, b in additions:
            answer = ask_question(endpoint, f"What is {a}+{b}?", TOKENS)
            exact += answer.content.strip() == str(a + b)
            bar.update()
    return Answers(moon, total, exact, time.monotonic() - start)


def measure(
    python: Path, source: Path, stock: Path, bundle: Path
) -> tuple[Measurements | UserError, Measurements, Logits]:
    """Measure both bundles at once, in the toolchain's `python`.

    Returns the stock bundle's measurements or the error that its loader raised, the right bundle's,
    and the right bundle's logits compared with those of its own tensors. Raises UserError when the
    right bundle cannot be loaded and asked.
    """
    additions = held_out(source, QUESTIONS)
    ids, work = token_prompts(source, additions), bundle.parent
    with (
        tqdm(total=2 * len(additions), desc="additions", disable=None) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        answers = [
            pool.submit(ask_server, python, folder, additions, work, bar)
            for folder in (bundle, stock)
        ]
        wanted = [(source, "source"), (bundle, "loader"), (bundle, "tensors"), (stock, "loader")]
        found = [pool.submit(run_logits, python, *one, ids, work) for one in wanted]
        truth, loaded, own = (logits.result() for logits in found[:3])
        right = Measurements(compare(loaded, truth), answers[0].result(), bundle)
        try:
            wrong = Measurements(compare(found[3].result(), truth), answers[1].result(), stock)
        except UserError as error:
            wrong = error
    return wrong, right, compare(loaded, own)


def shorten(answer: Answer) -> str:
    text = answer.content or f"(reasoning) {answer.reasoning}"
    return repr(text if len(text) <= 46 else text[:45] + "…")


ROWS = [
    SUM, "  finish_reason", MOON, "  finish_reason", "held-out additions, exact",
    "logits to source: cosine", "  relative L2 distance", "  same next token",
    "bytes", "seconds, served and asked",
]  # fmt: skip


def column(bundle: Measurements | UserError) -> list[str]:
    """Return a bundle's column of the table, in the order of ROWS."""
    if isinstance(bundle, UserError):
        return ["refuses to load", *[""] * (len(ROWS) - 1)]
    return [
        shorten(bundle.answers.sum),
        bundle.answers.sum.finish_reason,
        shorten(bundle.answers.moon),
        bundle.answers.moon.finish_reason,
        f"{bundle.answers.exact} of {QUESTIONS}",
        f"{bundle.logits.cosine:.4f}",
        f"{bundle.logits.distance:.4f}",
        f"{bundle.logits.agreement:.1%}",
        f"{folder_bytes(bundle.folder):,}",
        f"{bundle.answers.seconds:.0f}",
    ]


def table(stock: Measurements | UserError, right: Measurements) -> str:
    """Return the table of both bundles, one measure a row."""
    rows = zip(ROWS, column(stock), column(right), strict=True)
    head = f"{'':36}{'stock bundle':50}right bundle"
    lines = [head, *(f"{name:36}{a:50}{b}" for name, a, b in rows)]
    return "\n".join([*lines, f"stock bundle: {stock}"] if isinstance(stock, UserError) else lines)


def faults(stock: Measurements | UserError, right: Measurements, own: Logits) -> list[str]:
    """Return the faults of the right bundle, and of a stock bundle that is not wrong."""
    out = []
    if fault := sentence_fault(right.answers.moon):
        out.append(f"right bundle, moon: {fault}")
    if fault := sum_fault(right.answers.sum):
        out.append(f"right bundle, sum: {fault}")
    if right.answers.exact < MIN_EXACT:
        out.append(f"right bundle: {right.answers.exact} of {QUESTIONS} right, {MIN_EXACT} needed")
    for what, value in (("the source", right.logits), ("its own tensors", own)):
        if not value.distance <= MAX_DISTANCE:
            out.append(f"right bundle: distance {value.distance:.3f} to {what} > {MAX_DISTANCE}")
    loaded = not isinstance(stock, UserError)
    if loaded and stock.logits.distance <= MAX_DISTANCE and stock.answers.exact >= MIN_EXACT:
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
    stock, right, own = measure(args.python, args.source, args.stock, args.bundle)
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
