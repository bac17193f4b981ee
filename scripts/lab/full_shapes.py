"""Measure level 2 on tensors of the full model's shapes, in the modes of other makers.

A source and a bundle of one layer: 256 routed experts, stacked under mlx-vlm's names, w1 as affine
4 bits in groups of 64 with BF16 scales, w2 as the source's FP4 (mxfp4), w3 in TurboQuant of 2 bits;
and an embedding of 129,280 × 4,096 as affine 8 bits in groups of 64. One expert's numbers serve for
all 256. Level 2 and `cat` of both read them by turns, out of the page cache. Writes 6 GB to a
temporary folder in --work; a minute to make, and as long to read as the disk takes.

    .venv/bin/python scripts/lab/full_shapes.py [--work DIR] [--turns 3] [--experts 256]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from race import TALL, WIDE, Times, gaussian_fp4, machine, settle, turn

from dsv4.errors import UserError, run
from dsv4.quantization import fp4, turboquant
from dsv4.storage.atomic import format_bytes
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import PendingTensor, read_shard, write_shard
from dsv4.verification.numbers.aggregate import by_kind, format_kinds
from dsv4.verification.numbers.compare_all import read_numbers
from dsv4.verification.scan import Scan

VOCABULARY, HIDDEN = 129_280, 4096
FILE = "model.safetensors"
PLACE = "language_model.model.layers.0.ffn.switch_mlp"


def affine(values: np.ndarray, bits: int) -> dict[str, tuple[str, np.ndarray]]:
    """mx.quantize in BF16, groups of 64."""
    import mlx.core as mx

    weight, scales, biases = mx.quantize(
        mx.array(values).astype(mx.bfloat16), 64, bits, stream=mx.cpu
    )
    floats = (np.array(part.view(mx.uint16)) for part in (scales, biases))
    parts = (("U32", np.array(weight)), *(("BF16", part) for part in floats))
    return dict(zip(("weight", "scales", "biases"), parts, strict=True))


def turbo(packed: np.ndarray, exponents: np.ndarray) -> dict[str, tuple[str, np.ndarray]]:
    """TurboQuant of one matrix in FP4."""
    words = np.empty((len(packed), packed.shape[1] // 8), np.uint32)
    norms = np.empty(len(packed), np.float16)
    turboquant.quantize(packed.reshape(-1), exponents.reshape(-1), words.reshape(-1), norms)
    return {"tq_packed": ("U32", words), "tq_norms": ("F16", norms)}


def planned(name: str, dtype: str, one: np.ndarray, times: int = 0) -> PendingTensor:
    """A tensor, or a stack of `times` equal ones."""
    data = np.ascontiguousarray(one)
    shape = (times, *one.shape) if times else one.shape
    return PendingTensor(name, dtype, shape, lambda: (data for _ in range(times or 1)))


def make(folder: Path, experts: int) -> int:
    """Write source and bundle."""
    rng = np.random.default_rng(20261125)
    source, bundle = [], []
    for matrix, shape, name in (("w1", WIDE, "gate"), ("w2", TALL, "down"), ("w3", WIDE, "up")):
        packed, exponents = (part.reshape(shape[0], -1) for part in gaussian_fp4(rng))
        for expert in range(experts):
            base = f"layers.0.ffn.experts.{expert}.{matrix}"
            source += [planned(f"{base}.weight", "I8", packed.view(np.int8)),
                       planned(f"{base}.scale", "F8_E8M0", exponents)]  # fmt: skip
        if matrix == "w1":
            made = affine(fp4.decode(packed.view(np.int8), exponents, matrix), 4)
        elif matrix == "w2":
            made = {"weight": ("U32", packed.view(np.uint32)), "scales": ("U8", exponents)}
        else:
            made = turbo(packed, exponents)
        for part, (dtype, one) in made.items():
            bundle.append(planned(f"{PLACE}.{name}_proj.{part}", dtype, one, experts))
    words = rng.standard_normal((VOCABULARY, HIDDEN), np.float32).view(np.uint32) >> 16
    source.append(planned("embed.weight", "BF16", words.astype(np.uint16)))
    made = affine((words << 16).view(np.float32), 8)
    place = "language_model.model.embed_tokens"
    bundle += [planned(f"{place}.{part}", *one) for part, one in made.items()]
    for name, tensors in (("source", source), ("bundle", bundle)):
        (folder / name).mkdir(parents=True)
        write_shard(folder / name / FILE, tensors, {})
    return 0


def opened(folder: Path, experts: int) -> Checkpoint:
    shard = read_shard(folder / FILE)
    config = {"num_hidden_layers": 1, "n_routed_experts": experts, "hidden_size": HIDDEN,
              "moe_intermediate_size": WIDE[0]}  # fmt: skip
    return Checkpoint(folder, config, dict.fromkeys(shard.tensors, FILE), {FILE: shard})


def read(folder: Path, experts: int) -> int:
    """Level 2 in this process. Raises UserError when it finds anything."""
    bundle = Scan(opened(folder / "bundle", experts), {FILE: 0}, {})
    numbers = read_numbers(bundle, opened(folder / "source", experts), 2, lambda count: None)
    faults = [fault for result in numbers.results for fault in result.faults]
    if faults or numbers.left_out:
        raise UserError("level 2", f"{(faults or numbers.left_out)[0]}", "nothing", "see it")
    print("\n".join(format_kinds(by_kind(numbers.results))), file=sys.stderr)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/full_shapes"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--only", choices=("make", "read"), help="one step, in this process")
    args = parser.parse_args()
    if args.only:
        return {"make": make, "read": read}[args.only](args.work, args.experts)
    ours, cat = Times(3 * args.experts + 1), Times(3 * args.experts + 1)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="full_shapes-", dir=args.work) as work:
        files = [Path(work) / name / FILE for name in ("source", "bundle")]
        own = (sys.executable, __file__, "--work", work, "--experts", f"{args.experts}", "--only")
        with turn(Times(1)) as call:  # in a process of its own: a child's peak begins at ours
            call(*own, "make")
        for _ in range(args.turns):
            for times, command in (cat, ("cat", *files)), (ours, (*own, "read")):
                settle(*(file.parent for file in files))
                with turn(times) as call:
                    call(*command)
    print(f"{machine()}\nlevel 2: median {ours.median:.1f} s, {ours.cpu[-1]:.1f} CPU-s, peak "
          f"{format_bytes(ours.peak)}; cat: median {cat.median:.1f} s")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
