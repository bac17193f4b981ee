"""Make bundles of the nano model by the tools that make the published ones.

verify, inspect and repair must handle bundles of other makers. This runs those makers' tools:
mlx-vlm's convert (4 and 8 bits affine, mxfp4, mxfp8, nvfp4), mlx_lm's convert with jang's model
registered, and jang's converters (jang, jangtq with profiles 2, 3, 4 and its two formats, native,
bf16). They run in the toolchain's Python, which must have them all (scripts/stacks/new.txt).
mlx_lm's convert cannot read FP4, so it gets jang's BF16 bundle; mlx-vlm 0.7.10 treats the source as
MXFP8 throughout unless its config.json has a `store_dtype`.

Writes one folder a specimen under --out, each atomically; existing ones stay. Ten seconds each.
With --judge each is then judged twice: by verify, which says whether a runtime will load it and why
not, and by the median distance of the runtime's logits to the source's. TurboQuant's kernels need
Metal; elsewhere turbo_kernels.py replaces them. Both results go into one table, and into
specimens.json; half a minute each.

    .venv/bin/python scripts/lab/specimens.py [--judge] [--out build/specimens] [NAME …]

Exit status: 0 all made, or there already, and verify and the runtimes agree on each; 1 a tool
failed, or they do not agree; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from locations import NANO

from dsv4.acceptance import nano
from dsv4.errors import UserError, run
from dsv4.settings import available_cores
from dsv4.storage.atomic import write_json
from dsv4.text import print_escaped
from dsv4.toolchain.python_env import call_script, script_command
from dsv4.verification.checks.runtimes import STACKS, runtime_verdicts
from dsv4.verification.verify import VerifyOptions, verify

TOOLCHAIN = Path(".toolchain/new/bin/python")
# name → the module that makes it and its options; {source}, {out}, {bf16} are folders.
VLM = ("mlx_vlm", "convert", "--hf-path", "{source}", "--mlx-path", "{out}", "-q")
LM = ("mlx_lm", "convert", "--hf-path", "{bf16}", "--mlx-path", "{out}", "-q")
TQ = ("jang_tools.dsv4.convert_dsv4_jangtq", "--src", "{source}", "--dst", "{out}")
STD = (*TQ, "--variant", "std", "--profile")


def of_jang(name: str) -> tuple[str, ...]:
    return (f"jang_tools.dsv4.convert_dsv4_{name}", "--src", "{source}", "--dst", "{out}")


SPECIMENS: dict[str, tuple[str, ...]] = {
    "vlm-affine8": (*VLM, "--q-bits", "8", "--q-group-size", "64"),
    "vlm-affine4": (*VLM, "--q-bits", "4", "--q-group-size", "32"),
    "vlm-mxfp4": (*VLM, "--q-mode", "mxfp4"),
    "vlm-mxfp8": (*VLM, "--q-mode", "mxfp8"),
    "vlm-nvfp4": (*VLM, "--q-mode", "nvfp4"),
    "jang-bf16": of_jang("bf16"),
    "jang-native": of_jang("native"),
    "jang-affine2": of_jang("jang"),
    "jangtq-2": (*STD, "2", "--format", "jangtq"),
    # with 3 and 4 bits it makes affine and mxfp4 after all, and then fails to stack TurboQuant
    "jangtq-3": (*STD, "3", "--format", "jangtq", "--no-prestack", "--no-sidecar"),
    "jangtq-4": (*STD, "4", "--format", "jangtq", "--no-prestack", "--no-sidecar"),
    "jangtq-v3": (*TQ, "--profile", "2", "--format", "jangtq"),
    "jangtq-2-affine": (*STD, "2", "--format", "jang"),
    "jangtq-3-affine": (*STD, "3", "--format", "jang"),
    "jangtq-4-affine": (*STD, "4", "--format", "jang"),
    "lm-affine4": (*LM, "--q-bits", "4", "--q-group-size", "64"),
    "lm-mxfp4": (*LM, "--q-mode", "mxfp4"),
}


def prepare_source(source: Path, folder: Path) -> Path:
    """Make a copy of the source as mlx-vlm 0.7.10 reads it; return its folder."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["store_dtype"] = "mixed"
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def make(name: str, source: Path, out: Path, python: Path) -> None:
    """Make one specimen. Raises UserError with the tool's last line when it fails."""
    if (out / name).exists():
        print_escaped(f"{out / name}: there already")
        return
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as work:
        made = Path(work) / "made"
        own = prepare_source(source, Path(work) / "source") if name.startswith("vlm-") else source
        folders = {"source": own.resolve(), "out": made.resolve(), "bf16": out / "jang-bf16"}
        command = [part.format(**folders) for part in SPECIMENS[name]]
        call_script(
            script_command(python, "lab/upstream", *command), command[0], "see the toolchain"
        )
        if not (made / "config.json").is_file():
            raise UserError(name, "no config.json", "a bundle", "see the tool")
        made.rename(out / name)
    print_escaped(f"{out / name}: made")


# Below this distance a runtime has loaded the right numbers: 2 bits leave .3, garbage 1.
NEAR = 0.5
ROWS = [stack for stack in STACKS if stack.name in ("new", "lm", "vlm")]


def verdict(folder: Path, source: Path) -> tuple[list[str], dict[str, str]]:
    """Return verify's findings, and by runtime why it will not load the bundle, or ""."""
    done = verify(VerifyOptions(folder, source, without_loader=True, jobs=available_cores()))
    faults = sorted(finding.name for finding in done.findings.errors)
    return faults, runtime_verdicts(done.bundle, done.findings)


def distance(python: Path, folder: Path, how: str, ids: list[list[int]], truth: np.ndarray) -> Any:
    """Return the median relative L2 distance of a runtime's logits, or its error message."""
    with tempfile.TemporaryDirectory() as work:
        try:
            found = nano.run_logits(python, folder, how, ids, Path(work))
        except UserError as stop:
            return stop.parts[1]
    if not np.isfinite(found).all():
        return "NaN"
    wrong = np.linalg.norm(found - truth, axis=1) / np.linalg.norm(truth, axis=1)
    return round(float(np.median(wrong)), 4)


def compare_verdicts(
    folder: Path, source: Path, python: Path, ids: list, truth: np.ndarray
) -> list[dict]:
    """Return one row for each runtime: verify's verdict, and the runtime's result."""
    faults, expected = verdict(folder, source)
    rows = []
    for row in ROWS:
        why_not = expected[row.runtime]
        found = distance(python, folder, row.how, ids, truth)
        agree = (not isinstance(found, str) and found <= NEAR) == (not why_not)
        rows.append({"specimen": folder.name, "runtime": row.runtime, "faults": faults,
                     "verify": why_not, "logits": found, "agree": agree})  # fmt: skip
        print_escaped(table_row(rows[-1]))
    return rows


def table_row(row: dict[str, Any]) -> str:
    """Return a row of the Markdown table."""
    cells = (row["specimen"], row["runtime"], row["verify"] or "loads it", f"{row['logits']}"[:80],
             "" if row["agree"] else "**they differ**")  # fmt: skip
    return f"| {' | '.join(cells)} |"


def judge(names: list[str], source: Path, out: Path, python: Path) -> int:
    """Print and write the verdicts on specimens. Returns 1 if verify and runtimes differ."""
    ids = nano.token_prompts(source, nano.held_out(source, 20))
    with tempfile.TemporaryDirectory() as work:
        truth = nano.run_logits(python, source, "source", ids, Path(work))
    print_escaped("| specimen | runtime | verify | logits, relative L2 | |\n|---|---|---|---|---|")
    rows = [
        row for name in names for row in compare_verdicts(out / name, source, python, ids, truth)
    ]
    write_json(out / "specimens.json", rows)
    return int(not all(row["agree"] for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--source", type=Path, default=NANO)
    parser.add_argument("--out", type=Path, default=Path("build/specimens"))
    parser.add_argument(
        "--python", type=Path, default=TOOLCHAIN, help="Python that has all these tools"
    )
    parser.add_argument("--judge", action="store_true", help="compare verify with the runtimes")
    args = parser.parse_args()
    if unknown := set(args.names) - set(SPECIMENS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SPECIMENS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in SPECIMENS if name in args.names or not args.names]
    if "jang-bf16" not in names and any(name.startswith("lm-") for name in names):
        names.insert(0, "jang-bf16")
    for name in names:
        make(name, args.source, args.out.resolve(), args.python)
    if args.judge:
        return judge(names, args.source, args.out.resolve(), args.python)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
