"""Every mode in which a bundle may store its numbers: right ones pass, one changed bit is named.

Right ones are made by MLX itself (mx.quantize), and in TurboQuant by a plain way of its own.
Catches: a width, a group or a dtype of scales that is read otherwise than MLX reads it; a bound so
wide that a fault passes.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from dsv4.quantization import fp4, fp8
from dsv4.storage import tensor_reader
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import NUMPY_DTYPE, PendingTensor, read_shard, write_shard
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers.compare import Comparer
from dsv4.verification.numbers.copies import compare_copies
from dsv4.verification.numbers.tasks import TensorResult, make_tasks
from dsv4.verification.numbers.turboquant import codebook, rotate, rotation_signs
from dsv4.verification.scan import Scan

ROWS, COLUMNS = 128, 256
EXPERT, MODULE = "layers.0.ffn.experts.0.w1", "layers.0.attn.wq_a"
Arrays = dict[str, tuple[str, np.ndarray]]


def opened(folder: Path, arrays: Arrays) -> Checkpoint:
    planned = [
        PendingTensor(name, dtype, array.shape, lambda a=array: [np.ascontiguousarray(a)])
        for name, (dtype, array) in arrays.items()
    ]
    write_shard(folder / "model.safetensors", planned, {})
    shard = read_shard(folder / "model.safetensors")
    config = {"num_hidden_layers": 1, "n_routed_experts": 1, "hidden_size": COLUMNS}
    return Checkpoint(
        folder, config, dict.fromkeys(arrays, shard.path.name), {shard.path.name: shard}
    )


def source(kind: str) -> tuple[Arrays, np.ndarray]:
    """(a tensor of the source, its values float32) of FP4, FP8 or BF16."""
    rng = np.random.default_rng(11)
    if kind == "FP4":
        codes = rng.integers(0, 256, (ROWS, COLUMNS // 2)).astype(np.uint8).view(np.int8)
        scale = rng.integers(118, 124, (ROWS, COLUMNS // 32)).astype(np.uint8)
        arrays = {f"{EXPERT}.weight": ("I8", codes), f"{EXPERT}.scale": ("F8_E8M0", scale)}
        return arrays, fp4.decode(codes, scale, EXPERT)
    if kind == "FP8":
        codes = rng.integers(0, 120, (ROWS, COLUMNS)).astype(np.uint8) | (
            rng.integers(0, 2, (ROWS, COLUMNS)) << 7
        ).astype(np.uint8)
        scale = np.array([[118, 120]], np.uint8)
        arrays = {f"{MODULE}.weight": ("F8_E4M3", codes), f"{MODULE}.scale": ("F8_E8M0", scale)}
        return arrays, fp8.decode(codes, scale, MODULE)
    bits = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32).view(np.uint32) >> 16
    arrays = {f"{MODULE}.weight": ("BF16", bits.astype(np.uint16))}
    return arrays, (bits << 16).astype(np.uint32).view(np.float32)


def quantized(
    base: str, values: np.ndarray, mode: str, bits: int, group: int, dtype: str
) -> Arrays:
    """What mx.quantize makes of values in a dtype."""
    kind = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}[dtype]
    parts = mx.quantize(mx.array(values).astype(kind), group, bits, mode, stream=mx.cpu)
    found = {}
    for part, array in zip(("weight", "scales", "biases"), parts, strict=False):
        named = {"uint32": "U32", "uint8": "U8"}.get(str(array.dtype).rpartition(".")[2], dtype)
        view = array.view(mx.uint16) if named == "BF16" else array
        found[f"{base}.{part}"] = named, np.array(view).view(NUMPY_DTYPE[named])
    return found


def turbo(base: str, values: np.ndarray, bits: int) -> Arrays:
    """TurboQuant by MLX's own Hadamard transform and a search for the nearest level."""
    rotated = np.array(
        mx.hadamard_transform(mx.array(values * rotation_signs(COLUMNS)), stream=mx.cpu)
    )
    norms = np.linalg.norm(rotated, axis=1, keepdims=True)
    levels, each = codebook(COLUMNS, bits), 32 // bits
    codes = np.abs((rotated / norms)[..., None] - levels).argmin(-1).astype(np.uint32)
    codes = np.pad(codes, ((0, 0), (0, -COLUMNS % each))).reshape(ROWS, -1, each)
    packed = (codes << (bits * np.arange(each, dtype=np.uint32))).sum(-1).astype(np.uint32)
    return {f"{base}.tq_packed": ("U32", packed),
            f"{base}.tq_norms": ("F16", norms[:, 0].astype(np.float16)),
            f"{base}.tq_bits": ("U8", np.array([bits], np.uint8))}  # fmt: skip


def outcome(tmp_path: Path, of: Arrays, made: Arrays) -> TensorResult:
    for name in ("source", "bundle"):
        (tmp_path / name).mkdir(exist_ok=True)
    origin, bundle = opened(tmp_path / "source", of), opened(tmp_path / "bundle", made)
    survey = Scan(bundle, {}, {})
    (task,) = make_tasks(survey, origin, {})
    reader = TensorReader()
    found = Comparer(survey).compare(task, reader)
    reader.close()
    return found


def wrong(found: TensorResult) -> bool:
    return bool(found.faults or found.wrong_places)


AFFINE = [
    (bits, group, dtype)
    for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128) for dtype in ("F16", "BF16", "F32")
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group", "dtype"), AFFINE)
@pytest.mark.parametrize("kind", ["FP4", "FP8"])
def test_affine_of_any_width_is_what_mlx_makes(tmp_path, kind, bits, group, dtype):
    of, values = source(kind)
    base = EXPERT if kind == "FP4" else MODULE
    made = quantized(base, values, "affine", bits, group, dtype)
    found = outcome(tmp_path, of, made)
    assert not wrong(found), (found.faults, found.wrong_places)
    assert (found.numbers, found.exact) == (ROWS * COLUMNS, ROWS * COLUMNS // group)
    ours = np.array(mx.dequantize(*(mx.array(as_floats(*made[f"{base}.{p}"])) for p in
                    ("weight", "scales", "biases")), group, bits, stream=mx.cpu))  # fmt: skip
    error = np.linalg.norm(ours - values) / np.linalg.norm(values)
    assert found.relative == pytest.approx(error, rel=1e-3, abs=1e-7)
    row, words = 77, made[f"{base}.weight"][1]
    words[row, 3] ^= 1 << (bits - 1)  # the highest bit of a level
    found = outcome(tmp_path, of, made)
    assert f"row {row}" in f"{found.faults}{found.wrong_places}"


def as_floats(dtype: str, array: np.ndarray) -> np.ndarray:
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array if dtype == "U32" else array.astype(np.float32)


OWN = (("FP4", "mxfp4"), ("FP8", "mxfp8"))
FLOATS = [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


@pytest.mark.parametrize("kind", ["FP4", "FP8", "BF16"])
@pytest.mark.parametrize(
    ("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_small_floats_are_the_nearest_or_the_sources_own(tmp_path, kind, mode, bits, group):
    of, values = source(kind)
    base = EXPERT if kind == "FP4" else MODULE
    made = quantized(base, values, mode, bits, group, "F32")
    found = outcome(tmp_path, of, made)
    again = {fault[0] for fault in found.faults}
    assert again <= ({"quantized-again"} if (kind, mode) in OWN else set()), found.faults
    assert not found.wrong_places
    made[f"{base}.weight"][1].view(np.uint8)[50, 9] ^= 0x7 if bits == 4 else 0x70
    where = f"{outcome(tmp_path, of, made).faults}"
    assert f"row 50, column {18 if bits == 4 else 9}" in where
    made[f"{base}.weight"][1].view(np.uint8)[50, 9] ^= 0x7 if bits == 4 else 0x70
    made[f"{base}.scales"][1][3, 2] += 8
    assert "row 3" in f"{outcome(tmp_path, of, made).faults}"


@pytest.mark.parametrize(("mode", "bits"), [("mxfp4", 4), ("mxfp8", 8)])
def test_a_scale_that_mlx_rounded_in_bf16_is_no_fault(tmp_path, mode, bits):
    """mlx 0.31 takes the logarithm in the dtype of the weights."""
    of, values = source("BF16")
    of[f"{MODULE}.weight"][1][:] -= 8 << 7  # weights of about 2^-8
    values /= 256
    found = outcome(tmp_path, of, quantized(MODULE, values, mode, bits, 32, "BF16"))
    assert not wrong(found), found.faults


@pytest.mark.parametrize(("kind", "mode"), OWN)
def test_the_sources_own_codes_are_exact(tmp_path, kind, mode):
    of, _ = source(kind)
    base = EXPERT if kind == "FP4" else MODULE
    codes, scale = of[f"{base}.weight"][1], of[f"{base}.scale"][1]
    if kind == "FP8":
        scale = np.repeat(np.repeat(scale, 4, 1), 128, 0)
    made = {f"{base}.weight": ("U32", codes.view(np.uint32)), f"{base}.scales": ("U8", scale)}
    found = outcome(tmp_path, of, made)
    assert not wrong(found)
    assert (found.relative, found.lossless) == (0, ROWS * COLUMNS // 32)


def test_wrong_bytes_of_one_group_are_one_wrong_group(tmp_path):
    of, _ = source("FP4")
    codes, scale = of[f"{EXPERT}.weight"][1].copy(), of[f"{EXPERT}.scale"][1].copy()
    codes[5, 16:20] ^= 1
    scale[5, 1] += 1
    made = {
        f"{EXPERT}.weight": ("U32", codes.view(np.uint32)),
        f"{EXPERT}.scales": ("U8", scale),
    }
    for name in ("source", "bundle"):
        (tmp_path / name).mkdir()
    origin, bundle = opened(tmp_path / "source", of), opened(tmp_path / "bundle", made)
    (task,) = make_tasks(Scan(bundle, {}, {}), origin, {})
    found = TensorResult(task.origin.name, task.what, "mxfp4 4-bit")
    compare_copies(task, TensorReader(), found)
    assert (found.wrong, found.exact) == (1, ROWS * COLUMNS // 32 - 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turboquant_codes_are_the_nearest_and_norms_the_rows(tmp_path, bits):
    of, values = source("FP4")
    made = turbo(EXPERT, values, bits)
    found = outcome(tmp_path, of, made)
    assert not found.faults
    assert found.relative == pytest.approx({2: 0.343, 3: 0.186, 4: 0.1}[bits], rel=0.05)
    made[f"{EXPERT}.tq_packed"][1][9, 1] ^= 1 << (bits - 1)
    assert "expert-level-wrong" in f"{outcome(tmp_path, of, made).faults}"
    made = turbo(EXPERT, values, bits)
    made[f"{EXPERT}.tq_norms"][1][5] *= np.float16(1.01)
    assert "row 5" in f"{outcome(tmp_path, of, made).faults}"
    made = turbo(EXPERT, values, bits)
    made[f"{EXPERT}.tq_bits"][1][0] = 8
    assert "label-bits-wrong" in f"{outcome(tmp_path, of, made).faults}"


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("kind", ["FP4", "FP8"])
def test_plain_numbers_are_the_sources_rounded(tmp_path, kind, dtype):
    of, values = source(kind)
    base = EXPERT if kind == "FP4" else MODULE
    bits = {"F16": values.astype(np.float16), "F32": values}.get(dtype)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16) if bits is None else bits
    made = {f"{base}.weight": (dtype, np.ascontiguousarray(bits))}
    assert not wrong(outcome(tmp_path, of, made))
    made[f"{base}.weight"][1].view(np.uint8)[4, 21] ^= 0x10
    assert "element [4, " in f"{outcome(tmp_path, of, made).faults}"


@pytest.mark.parametrize("columns", [1, 4, 12, 24, 96, 168])
def test_a_row_is_rotated_by_powers_of_two_the_largest_first(columns):
    row = np.random.default_rng(columns).standard_normal(columns).astype(np.float32)
    wanted, start = [], 0
    for block in (1 << bit for bit in reversed(range(8)) if columns >> bit & 1):
        matrix = np.ones((1, 1))
        while len(matrix) < block:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        wanted.append(matrix @ row[start : start + block] / np.sqrt(block))
        start += block
    rotate(row)
    assert row == pytest.approx(np.concatenate(wanted), abs=1e-5)


def test_rows_are_read_ahead_and_each_byte_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_reader, "AHEAD", 100)
    data = np.random.default_rng(7).integers(0, 256, (91, 7), np.uint8)
    made = {"a": ("U8", data), "b": ("U8", data[:, ::-1])}
    tensors, seen, reader = opened(tmp_path, made).tensors, {"a": [], "b": []}, TensorReader()
    read = reader.read

    def noted(tensor, first, nbytes):
        seen[tensor.name] += range(first, first + nbytes)
        return read(tensor, first, nbytes)

    reader.read = noted
    for first, last in pairwise([0, 3, 4, 20, 21, 50, 51, 52, 53, 91]):
        for name, (_, array) in made.items():
            assert (reader.rows(tensors[name], first, last) == array[first:last].reshape(-1)).all()
    assert seen == {"a": list(range(91 * 7)), "b": list(range(91 * 7))}
    assert (reader.rows(tensors["a"], 2, 5) == data[2:5].reshape(-1)).all()  # and back
    reader.close()
