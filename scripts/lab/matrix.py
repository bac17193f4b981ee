"""Test every runtime with every bundle of the nano model.

Builds a venv for each stack of dsv4/verification/checks/runtimes.py from its pinned file (in
build/matrix/stacks, 0.4 to 2 GB each), makes the nano bundle with every quantizer and the stock
one, and records for each pair:

- the runtime's error message, if it does not load the bundle;
- the median distance of its logits (prefill, and 4 tokens decoded with a cache) to the bundle's
  tensors in transformers;
- exact matches on 50 held-out additions through the stack's server or generate call (chat.py);
- finish_reason and seconds.

A bundle of random weights covers compress ratios 4 and 128 and a prompt longer than the window. The
column "conversation" counts the built-in conversations of -0731 (dsv4/model/conversations.json)
that the runtime renders exactly as the encoder does (chat.py).

Prints a Markdown table and writes build/matrix/matrix.json after each cell, so that an interrupted
run goes on where it was (--fresh begins again). Runs unattended in under an hour on 2 cores.

    .venv/bin/python scripts/lab/matrix.py [--stack NAME …] [--bundle NAME …] [--fresh]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from locations import NANO, SCRIPTS
from stages import make_bundle, run_script

from dsv4.acceptance import nano
from dsv4.acceptance.client import Endpoint, ask_question
from dsv4.acceptance.smoke_questions import MOON
from dsv4.errors import UserError, run
from dsv4.model.chat_template import ENCODING, conversations
from dsv4.storage.atomic import write_json
from dsv4.toolchain.python_env import module_file, probe
from dsv4.toolchain.server import NAME, running_server
from dsv4.verification.checks.runtimes import STACKS, Stack

RIGHT = ("mlx", "affine4g32", "mxfp4", "lossless")
# A bundle of random weights with compress ratios 4 and 128: no answers, but logits of prompts that
# are longer than the sliding window (128) and hold more compressed blocks than are looked at (8).
RANDOM, LENGTHS = "random", (24, 160)
RANDOM_LOSSLESS = "random-lossless"
# The nano under another encoding, as its own knows no tools: that of -0731, which vMLX ships.
CONVERSATION, RELEASE = "conversation", "0731"
ENCODER = "vmlx_engine/loaders/encoding_dsv4_0731.py"
# One mixture: layers in the shape of vMLX's fused kernels, and one layer exact.
MIXTURE, MIXTURE_SIZE = "mixture", "2.3MB"
# Has kernels for Metal only; turbo_kernels.py replaces them elsewhere.
TURBO = "turboquant2"
STAND_INS = (
    "-c",
    f"import sys; sys.path[:0] = [{str(SCRIPTS / 'lab')!r}]; import turbo_kernels; "
    "turbo_kernels.stand_in(); from vmlx_engine.cli import main; main()",
    "serve",
)
COLUMNS = ("stock", *RIGHT, MIXTURE, TURBO, RANDOM, RANDOM_LOSSLESS, CONVERSATION)
DECODE = 4
# A right runtime stays this near to the bundle's own tensors; 4-bit rounding itself is at .023.
NEAR = 0.02


@functools.cache
def python_of(requirements: str, work: Path) -> Path:
    """Return the Python of a stack's venv; build it if its requirements file has changed."""
    wanted, venv = SCRIPTS / "stacks" / f"{requirements}.txt", work / "stacks" / requirements
    install = (SCRIPTS / "lab" / "install.py", "--anew", venv / "installed", wanted, "mlx.core")
    if subprocess.run([sys.executable, "-I", *install]).returncode:
        raise UserError(
            f"{wanted}", "no environment", "one with its packages", "read the lines above"
        )
    return venv / "bin" / "python"


def prepare(stack: Stack, python: Path) -> None:
    """Bring the venv's jang_tools to the patches of this row."""
    for name in ("load_jangtq.patch", "mlx_model.patch"):
        undo = [] if name in stack.patches else ["--undo"]
        if stack.packages.get("jang", "").startswith("2.5.") and "vmlx" in stack.packages:
            patch = SCRIPTS.parent / "patches" / name
            run_script(Path(sys.executable), "patch_loader", "--python", python,
                       "--patch", patch, *undo)  # fmt: skip


def bundles(work: Path, names: Iterable[str]) -> dict[str, Path]:
    """Make the missing bundles: stock, one by each quantizer, random, conversation."""
    quantizers = {RANDOM: "mlx", RANDOM_LOSSLESS: "lossless", CONVERSATION: "mlx"}
    out = {}
    for name in names:
        out[name] = folder = work / "bundles" / name
        if folder.is_dir():
            continue
        if name == "stock":
            python = Path(sys.executable)
            run_script(python, "lab/make_stock", "--source", NANO, "--bundle", folder)
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as place:
            making, source = Path(place) / name, source_of(name, work, Path(place) / "source")
            size = MIXTURE_SIZE if name == MIXTURE else None
            make_bundle(source, making, quantizers.get(name, name), size)
            making.rename(folder)
    return out


def source_of(name: str, work: Path, source: Path) -> Path:
    """Return the source of a column's bundle: the nano, or one that is made in `source`."""
    if name in (*RIGHT, MIXTURE, TURBO):
        return NANO
    if name == CONVERSATION:
        new = next(stack for stack in STACKS if stack.name == "new")
        newest = python_of(new.requirements, work)
        shutil.copytree(NANO, source)
        shutil.copyfile(module_file(newest, ENCODER), source / ENCODING)
    else:
        run_script(Path(sys.executable), "lab/make_source", "--source", source, "--seed", 1)
    return source


@functools.cache
def questions(name: str) -> list[list[int]]:
    """Token ids of the prompts whose logits are compared for a bundle."""
    if name.startswith(RANDOM):
        rng = np.random.default_rng(1)
        return [rng.integers(4, 512, length).tolist() for length in LENGTHS]
    return nano.token_prompts(NANO, nano.held_out(NANO, 20))


@functools.cache
def reference(bundle: Path, work: Path) -> np.ndarray:
    """Return transformers' logits of the bundle's tensors, of the source's for the stock bundle.

    Computed once for each bundle, as they do not depend on the stack.
    """
    folder = NANO if bundle.name == "stock" else bundle
    out = work / f"reference-{folder.name}.npy"
    run_script(Path(sys.executable), "lab/logits", "--folder", folder, "--how", "reference",
               "--out", out, stdin=questions(bundle.name))  # fmt: skip
    return np.load(out)


def logits_of(stack: Stack, python: Path, bundle: Path, work: Path) -> dict[str, list[float]]:
    """Return each prompt's relative L2 distance to the reference, by prefill and decode."""
    truth, found = reference(bundle, work), {}
    for what, decode in (("prefill", 0), ("decode", DECODE)):
        out = work / "logits.npy"
        run_script(python, "lab/logits", "--folder", bundle, "--how", stack.how, "--out", out,
                   "--decode", decode, stdin=questions(bundle.name), env=stack.env)  # fmt: skip
        wrong = np.linalg.norm(np.load(out) - truth, axis=1) / np.linalg.norm(truth, axis=1)
        found[what] = [round(float(one), 5) for one in wrong]
    return found


def typical(distances: list[float]) -> float:
    """Return the median.

    Where two experts score alike, rounding may choose the other one for a prompt.
    """
    return statistics.median(distances)


def answers_of(stack: Stack, python: Path, bundle: Path, work: Path) -> dict[str, Any]:
    """Return the exact answers to additions, and the finish_reason of the moon sentence."""
    additions = nano.held_out(NANO, nano.QUESTIONS)
    asked = [f"What is {a}+{b}?" for a, b in additions]
    if stack.served:
        start = STAND_INS if bundle.name == TURBO else ()
        with running_server(python, bundle, work / "server.log", start=start) as url:
            endpoint = Endpoint(url, NAME)
            moon = ask_question(endpoint, MOON, 60)
            texts = [ask_question(endpoint, question, 40).content for question in asked]
        end = moon.finish_reason
    else:
        printed = run_script(python, "lab/chat", "--bundle", bundle, "--how", stack.how,
                            "--print", "answers", stdin=[MOON, *asked], env=stack.env)  # fmt: skip
        answers = json.loads(printed.strip().splitlines()[-1])
        end = answers[0]["finish_reason"]
        texts = [answer["text"].rpartition("</think>")[2] for answer in answers[1:]]
    sums = [str(a + b) for a, b in additions]
    exact = sum(text.strip() == total for text, total in zip(texts, sums, strict=True))
    return {"exact": exact, "of": len(sums), "finish_reason": end}


def conversations_of(stack: Stack, python: Path, bundle: Path) -> dict[str, Any]:
    """Count the built-in conversations that the runtime renders as the encoder does."""
    wanted = conversations(RELEASE)
    talks = [variables for _, variables, _ in wanted]
    printed = run_script(python, "lab/chat", "--bundle", bundle, "--how", stack.how,
                         "--print", "prompts", stdin=talks, env=stack.env)  # fmt: skip
    pairs = zip(wanted, json.loads(printed.strip().splitlines()[-1]), strict=True)
    others = [name for (name, _, prompt), found in pairs if found != prompt]
    return {"others": others, "conversations": len(wanted), "right": not others}


def cell(stack: Stack, bundle: Path, work: Path) -> dict[str, Any]:
    """Return the measurements of one cell, or the error that stopped them."""
    start = time.monotonic()
    python = python_of(stack.requirements, work)
    found: dict[str, Any] = {"versions": probe(python)["packages"]}
    try:
        prepare(stack, python)
        if bundle.name == CONVERSATION:
            found |= conversations_of(stack, python, bundle)
        else:
            found |= numbers_of(stack, python, bundle, work)
    except UserError as stop:
        found |= {"right": False, "refused": str(stop)}
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


def numbers_of(stack: Stack, python: Path, bundle: Path, work: Path) -> dict[str, Any]:
    """Return the distances of logits, the answers, and whether they are right."""
    found: dict[str, Any] = {"logits": logits_of(stack, python, bundle, work)}
    found["right"] = max(map(typical, found["logits"].values())) <= NEAR
    if not bundle.name.startswith(RANDOM):
        found |= answers_of(stack, python, bundle, work)
        found["right"] &= found["exact"] >= nano.MIN_EXACT
    return found


def show(found: dict[str, Any]) -> str:
    """Return the text of one cell."""
    if "refused" in found:
        return "**refuses**"
    if "conversations" in found:
        text = f"{found['conversations'] - len(found['others'])} of {found['conversations']}"
        return text if found["right"] else f"**{text}**"
    distance = "/".join(f"{typical(prompts):.3f}" for prompts in found["logits"].values())
    text = distance
    if "exact" in found:
        text = f"{found['exact']} of {found['of']}, {found['finish_reason']}, {distance}"
    return text if found["right"] else f"**{text}**"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table, a row for each stack; wrong results are bold."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    lines = ["| stack | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for stack, row in results.items():
        cells = [show(row[name]) if name in row else "" for name in names]
        lines.append(f"| {stack} | " + " | ".join(cells) + " |")
    refusals = [
        f"- {stack}, {name}: {found['refused']}"
        for stack, row in results.items()
        for name, found in row.items()
        if "refused" in found
    ]
    return "\n".join([*lines, "", *refusals])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stack", action="append", help="only these rows")
    parser.add_argument("--bundle", action="append", choices=COLUMNS, help="only these columns")
    parser.add_argument("--work", type=Path, default=Path("build/matrix"))
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "matrix.json"
    results = json.loads(path.read_text()) if path.is_file() and not args.fresh else {}
    stacks = [stack for stack in STACKS if not args.stack or stack.name in args.stack]
    made = bundles(args.work, args.bundle or COLUMNS)
    for stack in stacks:
        for name, folder in made.items():
            row = results.setdefault(stack.name, {})
            if name not in row:
                row[name] = cell(stack, folder, args.work)
                print(f"{stack.name}, {name}: {show(row[name])}", file=sys.stderr)
                write_json(path, results)
    print(f"Machine: {os.uname().sysname} {os.uname().machine}, {os.cpu_count()} cores\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
