"""What fewer bits cost: KL divergence of the nano's bundles over the size that Flash's would have.

The nano source is converted with each affine form of 2 and 3 bits, by least squares and as
`mx.quantize` does it, with mixtures of several sizes, by plan.py, and in TurboQuant; each bundle's
next-token distribution, computed from its tensors in float32, is compared with the source's at
every token of held-out additions. Sizes are of DeepSeek-V4-Flash at as many bits a weight of its
routed experts. It ranks the forms, as fidelity.py does for the others; it does not predict what
Flash loses.

Writes by_size.json to --out and the picture to --picture, prints a table; the bundles lie in a
temporary folder in --out meanwhile. Wants the jang of .venv patched, as `make fidelity` and
`make test` leave it. Costs about 10 minutes on two cores.

    .venv/bin/python scripts/lab/by_size.py [--out DIR] [--picture FILE] [--additions N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from locations import NANO, NEW
from on_weights import by_mlx, flash_bytes
from pictures import Curve, curves
from through_model import SOURCE, TENSORS, Streamed, every_logit, lessons, model_error, stage

from dsv4.errors import run
from dsv4.model.load import expert_labels, open_bundle
from dsv4.model.names import is_expert
from dsv4.model.source import open_source
from dsv4.quantization import fp4
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.storage.safetensors_file import read_array

TURBO = "turboquant2"
OURS = (
    "affine2g128", "affine2g64", "small", "affine2g32", "affine3g128", "affine3g64", "affine3g32",
    "mxfp4",
)  # fmt: skip
MLX = "-mx"  # what mx.quantize makes, in a form of ours
THEIRS = tuple(f"{name}{MLX}" for name in OURS if name.startswith("affine"))
# Bits a weight of the routed experts that mixtures are planned to.
MIXTURES = (2.5, 2.75, 3.0, 3.5)
# The nano: bytes of everything but experts, and of its experts at one bit a weight, MTP included.
NANO_REST, NANO_BITS = 1_675_000, 196_608
# Published bundles of this model, by their own size; how far they are from the source is not known.
PUBLISHED = {
    "ds4 q2": 86.8, "2.4bit-mixed": 92.9, "2bit-DQ": 96.5, "mlx-community 4bit": 151.5
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One bundle: bits a weight of the main layers' experts, Flash's bytes at as many bits; KL in
    nats, share of tokens with the same most likely successor, and of additions answered rightly."""

    name: str
    bits: float
    flash: float
    kl: float
    agreement: float
    accuracy: float


def bits_of(bundle: Path) -> float:
    """Bits a weight of all main layers' routed experts, by the bytes on disk."""

    def experts(folder: Path) -> int:
        tensors = open_bundle(folder).tensors.items()
        return sum(t.nbytes for n, t in tensors if is_expert(n) and n.startswith("layers."))

    return 4.25 * experts(bundle) / experts(NANO)  # the source's FP4 has 4.25


def size_of(name: str, bits: float) -> float:
    """Flash's shards in a form; of a mixture by its bits a weight of routed experts."""
    if name.startswith("mixture"):
        low, high = flash_bytes("affine2g128"), flash_bytes("mxfp4")
        return low + (high - low) * (bits - 2.25) / (4.25 - 2.25)
    return flash_bytes(name.removesuffix(MLX))


def make(name: str, bundle: Path) -> None:
    """A bundle of the nano; a mixture's name is its bits and, with "any", that shapes are free."""
    options: tuple[object, ...] = ("--quantizer", name.removesuffix(MLX))
    if name.startswith("mixture"):
        plan, bits = bundle.with_name(f"{bundle.name}.json"), float(name.split()[1])
        options = ("--quantizer", "mixture", "--plan", plan)
        size = NANO_REST + int(NANO_BITS * bits)
        shape = ["--any-shape"] * name.endswith("any")
        stage("plan", "--source", NANO, "--plan", plan, "--size", size, *shape)
    stage("convert", "--source", NANO, "--bundle", bundle, *options)
    stage("finalize", "--source", NANO, "--bundle", bundle)
    stage("patch", "--bundle", bundle)
    if name.endswith(MLX):
        replace_experts(bundle)


def replace_experts(bundle: Path) -> None:
    """Put what mx.quantize makes of each expert in the place of what is there, of the same form."""
    source, made = open_source(NANO).tensors, open_bundle(bundle)
    for base, label in expert_labels(made).items():
        packed, scales = (read_array(source[f"{base}.{part}"]) for part in ("weight", "scale"))
        for part, array in by_mlx(fp4.decode(packed, scales, base), label).items():
            tensor = made.tensors[f"{base}.{part}"]
            with tensor.path.open("r+b") as file:
                file.seek(tensor.offset)
                file.write(array.tobytes())


def measure(args: argparse.Namespace, work: Path) -> list[Point]:
    """Every bundle against the source; bundles and logits lie in `work` meanwhile."""
    ids, begins = lessons(NANO, NANO, args.additions)
    mixed = [f"mixture {bits}{end}" for bits in MIXTURES for end in ("", " any")]
    points = []
    with Streamed(args.new, work / "streamed") as streamed:
        truth = streamed.logits(NANO, SOURCE, ids)
        for name in (TURBO, *OURS, *THEIRS, *mixed):
            bundle = work / name.replace(" ", "-")
            make(name, bundle)
            if name == TURBO:  # whose kernels are Metal's alone
                python, out = Path(sys.executable), work / "found.npy"
                found = every_logit(python, bundle, TENSORS, ids, out)
            else:
                found = streamed.logits(bundle, TENSORS, ids)
            kl, _, agreement, accuracy = model_error(found, truth, ids, begins)
            bits = bits_of(bundle)
            points.append(Point(name, bits, size_of(name, bits), kl, agreement, accuracy))
            print(f"{name}: {bits:.2f} bits, KL {kl:.5f}", file=sys.stderr, flush=True)
    return points


def table(points: list[Point]) -> str:
    """A markdown table."""
    lines = [
        "| | bits a weight | GB for Flash | KL | same next token | additions |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p.name} | {p.bits:.2f} | {p.flash / 1e9:.1f} | {p.kl:.4f} | {p.agreement:.1%} | "
        f"{p.accuracy:.0%} |"
        for p in points
    ]
    return "\n".join(lines)


def picture(points: list[Point]) -> str:
    """KL over size: ours, mx.quantize's, mixtures of both kinds, and TurboQuant."""
    kinds = {
        "least squares": [p for p in points if p.name in OURS],
        "mx.quantize": [p for p in points if p.name in THEIRS],
        "mixture": [p for p in points if p.name.startswith("mixture") and "any" not in p.name],
        "mixture, any shape": [p for p in points if p.name.endswith("any")],
        "TurboQuant": [p for p in points if p.name == TURBO],
    }
    shown = [
        Curve(kind, [(p.flash / 1e9, p.kl, p.name if "mixture" not in kind else "") for p in of])
        for kind, of in kinds.items()
    ]
    names = ("GB of DeepSeek-V4-Flash; dotted: published bundles", "KL to the nano's source, nats")
    return curves(shown, PUBLISHED, names)


def main() -> int:
    """Measure, print the table, draw the picture. Returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/by_size"))
    parser.add_argument("--picture", type=Path, help="default: by_size.svg in --out")
    parser.add_argument("--additions", type=int, default=40, help="held-out ones to go through")
    parser.add_argument("--new", type=Path, default=NEW, help="Python of the new stack")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=args.out) as work:
        points = measure(args, Path(work))
    print(table(points))
    write_json(args.out / "by_size.json", {"points": [asdict(p) for p in points]})
    write_bytes(args.picture or args.out / "by_size.svg", picture(points).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
