"""Measure how close to the source each quantizer stays: on weights, and through a small model.

Weights: a full-shape synthetic expert (2048 × 4096), normal weights, under both rules for FP4
scales. The model: the nano source is converted with each quantizer; the next-token distribution of
the bundle is compared with the source's at every token of held-out additions, by the engine of
`make evaluate`, in float32 and, for the quantizers of SERVED_TOO, as it is served. Also measured:
what `mx.quantize` makes in the affine formats, and mixtures of several sizes, planned by plan.py.
Sizes are of DeepSeek-V4-Flash at as many bits a weight of its routed experts. A second source that
was trained less (--source2) has a less certain distribution and shows larger differences.

The errors on weights hold for any model with such weights. The nano ranks the quantizers, and does
not predict what the full model loses: it has 2 million parameters, experts of 128 × 128 and one
task. Everything but the experts is 8-bit in all bundles but lossless and mixture-lossless.

Writes fidelity.md and fidelity.json to --out and the picture to --picture; the bundles lie in a
temporary folder in --out meanwhile. Costs about 20 minutes on two cores, and 60 MB.

    .venv/bin/python scripts/lab/fidelity.py [--quantizer NAME …] [--source2 DIR] [--out DIR]
        [--picture FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from locations import NANO, NEW
from model_error import (
    SERVED,
    SOURCE,
    TENSORS,
    Additions,
    ModelError,
    Streamed,
    logits_of_tensors,
    model_error,
)
from pictures import Point, draw_curves
from stages import make_bundle
from weight_error import MLX, WeightError, by_mlx, flash_bytes, weight_error

from dsv4.errors import run
from dsv4.model.load import expert_labels, open_bundle
from dsv4.model.mtp import AS_EXPERTS
from dsv4.model.names import is_expert
from dsv4.model.source import open_source
from dsv4.quantization import fp4
from dsv4.quantization.synthetic import RULES
from dsv4.settings import add_setting
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.storage.safetensors_file import read_array

TURBO = "turboquant2"
SERVED_TOO = ("mlx", "affine4g32", "mxfp4", "lossless")
FEWER_BITS = ("affine2g128", "affine2g64", "affine2g32", "affine3g128", "affine3g64", "affine3g32")
BY_MLX = tuple(f"{name}{MLX}" for name in FEWER_BITS)
# Bits a weight of the routed experts that mixtures are planned to. "any": without regard to the
# shape for which vMLX has fused kernels.
MIXTURES = tuple(f"mixture {bits}{end}" for bits in (2.5, 2.75, 3.0, 3.5) for end in ("", " any"))
BY_PROJECTION = "small"
QUANTIZERS = (*SERVED_TOO, TURBO, *FEWER_BITS, BY_PROJECTION, *BY_MLX, *MIXTURES)
# The nano: bytes of everything but experts, and of its experts at one bit a weight, MTP included.
NANO_REST, NANO_BITS = 1_675_000, 196_608
# Published bundles of this model by their size in GB; their distance from the source is not known.
PUBLISHED = {
    "ds4 q2": 86.8, "2.4bit-mixed": 92.9, "2bit-DQ": 96.5, "mlx-community 4bit": 151.5
}  # fmt: skip


@dataclass(frozen=True)
class Fidelity:
    """The errors of one quantizer.

    bits: a weight of the main layers' experts in the nano's bundle; flash: bytes of Flash's bundle;
    weights: by rule for FP4 scales, none for mixtures; served: as the runtime computes.
    """

    quantizer: str
    bits: float
    flash: float
    model: ModelError
    served: ModelError | None = None
    weights: dict[str, WeightError] = field(default_factory=dict)


# --- Bundles ------------------------------------------------------------------------------------


def make(name: str, source: Path, bundle: Path) -> None:
    """Make the bundle of one of QUANTIZERS."""
    if name.startswith("mixture"):
        size = NANO_REST + int(NANO_BITS * float(name.split()[1]))
        make_bundle(source, bundle, "mixture", size, name.endswith("any"), AS_EXPERTS)
        return
    make_bundle(source, bundle, name.removesuffix(MLX), mtp=AS_EXPERTS)
    if name.endswith(MLX):
        replace_experts(source, bundle)


def replace_experts(source: Path, bundle: Path) -> None:
    """Overwrite each expert by what mx.quantize makes of it in the same format."""
    tensors, made = open_source(source).tensors, open_bundle(bundle)
    for base, label in expert_labels(made).items():
        packed, scales = (read_array(tensors[f"{base}.{part}"]) for part in ("weight", "scale"))
        for part, array in by_mlx(fp4.decode(packed, scales, base), label).items():
            tensor = made.tensors[f"{base}.{part}"]
            with tensor.path.open("r+b") as file:
                file.seek(tensor.offset)
                file.write(array.tobytes())


def bits_of(source: Path, bundle: Path) -> float:
    """Return the bits a weight of all main layers' routed experts, by the bytes on disk."""

    def experts(folder: Path) -> int:
        tensors = open_bundle(folder).tensors.items()
        return sum(t.nbytes for n, t in tensors if is_expert(n) and n.startswith("layers."))

    return 4.25 * experts(bundle) / experts(source)  # the source's FP4 has 4.25


def flash_size(name: str, bits: float) -> float:
    """Return the bytes of Flash's shards; of a mixture by its bits a weight of routed experts."""
    if name.startswith("mixture"):
        low, high = flash_bytes("affine2g128"), flash_bytes("mxfp4")
        return low + (high - low) * (bits - 2.25) / (4.25 - 2.25)
    return flash_bytes(name.removesuffix(MLX))


# --- Measuring ----------------------------------------------------------------------------------


def measure(
    names: list[str], source: Path, additions: Additions, python: Path, work: Path
) -> list[Fidelity]:
    """Compare each quantizer's bundle with the source. python: the new stack's."""
    results = []
    with Streamed(python, work / "streamed") as streamed:
        truth = streamed.logits(source, SOURCE, additions.ids)
        for name in names:
            bundle = work / name.replace(" ", "-")
            make(name, source, bundle)
            if name == TURBO:
                found = logits_of_tensors(bundle, additions.ids, work / "found.npy")
            else:
                found = streamed.logits(bundle, TENSORS, additions.ids)
            model, served = model_error(found, truth, additions), None
            if name in SERVED_TOO:
                found = streamed.logits(bundle, SERVED, additions.ids)
                served = model_error(found, truth, additions)
            weights = {}
            if name != BY_PROJECTION and name not in MIXTURES:
                weights = {rule: weight_error(name, rule) for rule in RULES}
            bits = bits_of(source, bundle)
            size = flash_size(name, bits)
            results.append(Fidelity(name, bits, size, model, served, weights))
            print(f"{name}: {bits:.2f} bits, KL {model.kl:.5f}", file=sys.stderr, flush=True)
    return results


# --- Reporting ----------------------------------------------------------------------------------


def table(results: list[Fidelity]) -> str:
    """Return a Markdown table, one row a quantizer."""
    heads = ["", "bits a weight", "GB for Flash", *(f"RMS error, scales by {r}" for r in RULES),
             "exact groups", "ms a tensor", "KL, nats", "KL as served", "same next token",
             "additions"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in results:
        cells = [one.quantizer, f"{one.bits:.2f}", f"{one.flash / 1e9:.1f}"]
        cells += [f"{one.weights[rule].rms:.2%}" if one.weights else "" for rule in RULES]
        first = one.weights.get(RULES[0])
        cells += [f"{first.exact:.0%}", f"{first.seconds * 1e3:.0f}"] if first else ["", ""]
        cells += [f"{one.model.kl:.5f}", f"{one.served.kl:.5f}" if one.served else ""]
        cells += [f"{one.model.agreement:.1%}", f"{one.model.accuracy:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(results: list[Fidelity]) -> str:
    """Return an SVG of KL over size, a curve for each kind of quantizer."""
    kinds = {
        "least squares": (*FEWER_BITS, BY_PROJECTION, "mxfp4"),
        "mx.quantize": BY_MLX,
        "mixture": [name for name in MIXTURES if "any" not in name],
        "mixture, any shape": [name for name in MIXTURES if "any" in name],
        "TurboQuant": (TURBO,),
    }
    curves: dict[str, list[Point]] = {}
    for kind, names in kinds.items():
        for one in results:
            if one.quantizer in names:
                name = "" if one.quantizer in MIXTURES else one.quantizer
                curves.setdefault(kind, []).append((one.flash / 1e9, one.model.kl, name))
    axes = ("GB of DeepSeek-V4-Flash; dotted: published bundles", "KL to the nano's source, nats")
    return draw_curves(curves, PUBLISHED, axes)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=NANO, help="the nano checkpoint")
    add_setting(parser, "SOURCE2", help="one that was trained less")
    parser.add_argument("--quantizer", action="append", choices=QUANTIZERS, help="only these")
    parser.add_argument("--out", type=Path, default=Path("build/fidelity"))
    parser.add_argument("--picture", type=Path, help="default: fidelity.svg in --out")
    parser.add_argument("--new", type=Path, default=NEW, help="Python of the new stack")
    parser.add_argument("--additions", type=int, default=40, help="number of held-out additions")
    return parser.parse_args()


def main() -> int:
    """Measure, print the tables, write them. Returns 0."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for label, source in (("nano", args.source), ("early", args.source2)):
        if source is not None:
            additions = Additions.load(source, args.source, args.additions)
            names = args.quantizer or list(QUANTIZERS)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=args.out) as work:
                results[label] = measure(names, source, additions, args.new, Path(work))
    tables = [f"{label}:\n\n{table(errors)}\n" for label, errors in results.items()]
    print(*tables, sep="\n")
    write_bytes(args.out / "fidelity.md", "\n".join(tables).encode())
    rows = {label: [asdict(one) for one in errors] for label, errors in results.items()}
    write_json(args.out / "fidelity.json", rows)
    svg = picture(results["nano"]).encode()
    write_bytes(args.picture or args.out / "fidelity.svg", svg)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
