"""Measure how close to the source each quantizer stays: on weights, and through a real model.

Weights: full-shape synthetic experts (2048 × 4096), normal and Laplace, under both rules for FP4
scales. The model: the nano source is converted with each quantizer, finalized and patched by the
stages themselves; then its next-token distribution is compared with the source's at every token of
held-out additions, by the engine of `make evaluate`, in float32 and as it is served. So is what
another upstream entry, jang_tools.dsv4.convert_dsv4_jang --profile 4, makes of the same source. A
second source that was trained less (--source2) is less sure of itself and shows more.

What this can tell: whether a quantizer does what it says, and how the quantizers rank. What it
cannot: how large the effect is in the full model. The nano has 2 million parameters, experts of
128 × 128 and one task; 43 layers, 256 experts and real text are another matter, and everything else
than the experts is 8-bit in all bundles alike but lossless, which is the floor that exact experts
reach.

Writes fidelity.md and fidelity.json to --out and the picture to --picture; the bundles lie in a
temporary folder in --out meanwhile. Prints the rows of lab/README.md's table too. Costs about 7
minutes on two cores, and 60 MB.

    .venv/bin/python scripts/lab/fidelity.py --source DIR [--source2 DIR] [--out DIR]
        [--picture FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from locations import NEW
from on_weights import MEASURED, WeightError, flash_bytes, weight_error
from pictures import Bar, bars
from through_model import (
    ALONE,
    SERVED,
    SOURCE,
    TENSORS,
    ModelError,
    Streamed,
    every_logit,
    lessons,
    model_error,
    stage,
)

from dsv4.errors import run
from dsv4.quantization.synthetic import RULES
from dsv4.settings import add_setting
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.toolchain.python_env import call_script

JANG = "convert_dsv4_jang"
TURBO = "turboquant2"
# What jang's model cannot run here: names of its own, kernels for Metal alone.
APART = (JANG, TURBO)


# --- The model ----------------------------------------------------------------------------------


def make_bundles(source: Path, work: Path, python: Path) -> dict[str, Path]:
    """A bundle for each quantizer, and upstream's other converter's."""
    bundles = {}
    for name in MEASURED:
        bundle = bundles[name] = work / name
        stage("convert", "--source", source, "--bundle", bundle, "--quantizer", name)
        stage("finalize", "--source", source, "--bundle", bundle)
        stage("patch", "--bundle", bundle)
    bundles[JANG] = work / "jang"
    command = [str(python), "-m", f"jang_tools.dsv4.{JANG}", "--src", str(source)]
    call_script([*command, "--dst", str(bundles[JANG]), "--profile", "4"], JANG, ALONE)
    return bundles


def measure_model(
    label: str, source: Path, record: Path, number: int, work: Path, pythons: tuple[Path, Path]
) -> list[ModelError]:
    """Every bundle of one source against it; the source against itself comes first."""
    old, new = pythons
    bundles = make_bundles(source, work, old)
    ids, begins = lessons(source, record, number)
    with Streamed(new, work / "streamed") as streamed:
        truth = streamed.logits(source, SOURCE, ids)
        out = [ModelError(label, SOURCE, SOURCE, *model_error(truth, truth, ids, begins))]
        for name, bundle in bundles.items():
            for how in (TENSORS,) if name in APART else (TENSORS, SERVED):
                print(f"{label}: {name} by {how}", file=sys.stderr, flush=True)
                if name in APART:
                    found = every_logit(old, bundle, how, ids, work / "found.npy")
                else:
                    found = streamed.logits(bundle, how, ids)
                out.append(ModelError(label, name, how, *model_error(found, truth, ids, begins)))
    return out


# --- Saying it ----------------------------------------------------------------------------------


def weights_table(errors: list[WeightError]) -> str:
    """A markdown table, one row a quantizer and kind of weights."""
    lines = [
        "| quantizer | bits a weight | weights | scale rule | relative RMS | mean error | "
        "exact groups | ms a tensor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {e.quantizer} | {e.bits:.2f} | {e.kind} | {e.rule} | {e.rms:.2%} | {e.mean:+.4%} | "
        f"{e.exact:.0%} | {e.seconds * 1e3:.0f} |"
        for e in errors
    ]
    return "\n".join(lines)


def models_table(errors: list[ModelError]) -> str:
    """A markdown table, one row a source, quantizer and way of running it."""
    lines = [
        "| source | quantizer | run by | KL (nats) | KL, answers | same next token | additions |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {e.source} | {e.quantizer} | {e.how} | {e.kl:.5f} | {e.kl_answers:.5f} | "
        f"{e.agreement:.2%} | {e.accuracy:.1%} |"
        for e in errors
    ]
    return "\n".join(lines)


def readme_rows(weights: list[WeightError], models: list[ModelError]) -> str:
    """The rows of lab/README.md's table, to paste: normal weights, scales rounded up, and
    the last source, which is the less trained one where it was given.
    """
    last = models[-1].source
    through = {e.quantizer: e for e in models if (e.source, e.how) == (last, TENSORS)}
    rows = []
    for e in weights:
        if (e.kind, e.rule) == ("normal", "ceil"):
            name = f"{e.quantizer} (default)" if e.quantizer == "mlx" else e.quantizer
            rms, model = f"{e.rms:.2%}" if e.rms else "0", through[e.quantizer]
            kl = f"{model.kl:.2g}" if model.kl < 1e-5 else f"{model.kl:.5f}".removeprefix("0")
            rows.append(
                f"| {name} | {e.bits:.2f} | {flash_bytes(e.quantizer) / 1e9:.1f} | {rms} "
                f"| {e.exact:.0%} | {kl} | {model.agreement:.1%} |"
            )
    return "\n".join(rows)


CAVEAT = """\
The first table is about the format and holds for every model with such weights. The second is about
a model of 2 million parameters: it shows the order of the quantizers, not the size of their effect
in the full one. Everything but the routed experts is 8-bit in all bundles but lossless; what mxfp4
leaves is that alone. convert_dsv4_jang quantizes the experts as mlx does."""


def picture(weights: list[WeightError], models: list[ModelError]) -> str:
    """An SVG: RMS error of normal weights, and KL by the tensors, a bar for each quantizer."""
    left = [
        Bar(f"{e.quantizer} · {e.bits:.2f} bits", e.rms, f"{e.rms:.2%}" if e.rms else "0")
        for e in weights if (e.kind, e.rule) == ("normal", "ceil")
    ]  # fmt: skip
    charts = [("RMS error relative to the RMS of the weights (normal, full shape)", left)]
    for source in dict.fromkeys(e.source for e in models):
        mine = [e for e in models if (e.source, e.how) == (source, TENSORS)]
        charts.append((
            f"KL divergence from the {source} source's next-token distribution (nats)",
            [Bar(e.quantizer, e.kl, f"{e.kl:.2g}") for e in mine],
        ))  # fmt: skip
    return bars(charts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="the nano checkpoint")
    add_setting(parser, "SOURCE2", help="one that was trained less")
    parser.add_argument("--out", type=Path, default=Path("build/fidelity"))
    parser.add_argument("--picture", type=Path, help="default: fidelity.svg in --out")
    parser.add_argument(
        "--python",
        type=Path,
        default=Path(sys.executable),
        help="of the old stack, which has jang's other converter",
    )
    parser.add_argument("--new", type=Path, default=NEW, help="Python of the new stack")
    parser.add_argument("--additions", type=int, default=40, help="held-out ones to go through")
    return parser.parse_args()


def main() -> int:
    """Measure, print the tables, write them. Returns 0."""
    args = parse_arguments()
    weights = [
        weight_error(name, kind, rule)
        for kind in ("normal", "laplace")
        for rule in RULES
        for name in MEASURED
    ]
    print(weights_table(weights), flush=True)
    models = []
    for label, source in (("nano", args.source), ("early", args.source2)):
        if source is not None:
            pythons = (args.python, args.new)
            args.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=args.out) as work:
                models += measure_model(
                    label, source, args.source, args.additions, Path(work), pythons
                )
    rows = readme_rows(weights, models)
    print(f"\n{models_table(models)}\n\n{CAVEAT}\n\nREADME:\n{rows}")
    text = f"{weights_table(weights)}\n\n{models_table(models)}\n\n{CAVEAT}\n"
    write_bytes(args.out / "fidelity.md", text.encode())
    result = {"weights": [asdict(e) for e in weights], "models": [asdict(e) for e in models]}
    write_json(args.out / "fidelity.json", result)
    write_bytes(args.picture or args.out / "fidelity.svg", picture(weights, models).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
