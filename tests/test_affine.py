"""The table against mx.quantize itself, and the decoders against each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_reference
import numpy as np
import pytest

from dsv4.quantization import affine_table, fp4
from dsv4.quantization.formats import Quantizer, get_quantizer

VALUES = [ml_reference.decode_one(code, 127) for code in range(16)]


@pytest.fixture(scope="module")
def quantizer() -> Quantizer:
    return get_quantizer("mlx")


def encode(
    quantizer: Quantizer, packed: np.ndarray, exponents: np.ndarray
) -> tuple[dict[str, np.ndarray], affine_table.ErrorStats]:
    """Quantize whole rows with the engine; parts come as uint32 and float16 matrices."""
    out, columns = len(packed), packed.shape[1] * 2
    flat = {
        part: np.empty(
            out * columns // 8 * 4 if part == "weight" else out * columns // 16, np.uint8
        )
        for part in ("weight", "scales", "biases")
    }
    tally = quantizer.encode(
        packed.reshape(-1).view(np.uint8), exponents.reshape(-1).view(np.uint8), flat
    )
    parts = {part: flat[part].view(np.float16).reshape(out, -1) for part in ("scales", "biases")}
    return parts | {"weight": flat["weight"].view(np.uint32).reshape(out, -1)}, tally


def assert_like_mlx(quantizer: Quantizer, packed: np.ndarray, exponents: np.ndarray) -> None:
    parts, _ = encode(quantizer, packed, exponents)
    for part, expected in zip(
        ("weight", "scales", "biases"), ml_reference.quantize(packed, exponents), strict=True
    ):
        assert parts[part].tobytes() == expected.tobytes(), part


def pack(codes: np.ndarray) -> np.ndarray:
    """Codes (out, in) → bytes (out, in/2), the low nibble first."""
    codes = codes.astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def groups_of_every_case(rng: np.random.Generator) -> np.ndarray:
    """For each (least, greatest) and each code between: a shuffled group that has all three."""
    groups = []
    for least in VALUES:
        for greatest in VALUES:
            inside = [code for code, value in enumerate(VALUES) if least <= value <= greatest]
            for code in inside:
                edges = [VALUES.index(least), VALUES.index(greatest), code]
                group = edges + list(rng.choice(inside, 29))
                groups.append(rng.permutation(group))
    return np.array(groups)


def test_the_table_is_complete(quantizer: Quantizer) -> None:
    """Every (least, greatest), every code between, every exponent that F16 can hold, any order."""
    groups = groups_of_every_case(np.random.default_rng(20))
    held = 0
    for exponent in range(255):
        exponents = np.full((len(groups), 1), exponent, np.uint8)
        with np.errstate(over="ignore", invalid="ignore"):
            _, scales, biases = ml_reference.quantize(pack(groups), exponents)
            fits = (np.isfinite(scales) & np.isfinite(biases)).reshape(-1)
        if fits.any():
            assert_like_mlx(quantizer, pack(groups[fits]), exponents[fits])
        for row in np.flatnonzero(~fits)[:3]:
            with pytest.raises(affine_table.BadGroup, match="too large"):
                encode(quantizer, pack(groups[row : row + 1]), exponents[row : row + 1])
        held += int(fits.sum())
    print(f"{held:,} groups of {255 * len(groups):,} fit F16 and are equal")
    assert held > 100 * len(groups)


@pytest.mark.parametrize("seed", range(8))
def test_random_tensors_are_bit_for_bit_what_mlx_gives(quantizer: Quantizer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    out, columns = int(rng.integers(1, 70)), 32 * int(rng.integers(1, 80))
    packed = rng.integers(0, 256, (out, columns // 2)).astype(np.uint8)
    assert_like_mlx(quantizer, packed, rng.integers(90, 135, (out, columns // 32)).astype(np.uint8))


@pytest.mark.parametrize(
    "codes",
    [[0], [8], [0, 8], [7], [15], [1, 2, 3], [9, 10, 11], [0, 7], [8, 7], [0, 15], [7, 15]],
    ids=str,
)
def test_groups_of_few_values(quantizer: Quantizer, codes: list[int]) -> None:
    """All zero of either sign, one-valued, all positive, all negative, the two ends."""
    rng = np.random.default_rng(21)
    groups = rng.choice(codes, (250, 32))
    exponents = np.arange(250).astype(np.uint8)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        _, scales, biases = ml_reference.quantize(pack(groups), exponents)
    fits = (np.isfinite(scales) & np.isfinite(biases)).reshape(-1)
    assert_like_mlx(quantizer, pack(groups[fits]), exponents[fits])


def test_scale_byte_255_is_refused_even_for_zeros(quantizer: Quantizer) -> None:
    packed = np.zeros((3, 16), np.uint8)
    with pytest.raises(affine_table.BadGroup, match="255") as caught:
        encode(quantizer, packed, np.array([[0], [255], [0]], np.uint8))
    assert caught.value.group == 1


def test_the_error_in_the_table_is_the_error_of_the_tensor(quantizer: Quantizer) -> None:
    """On Gaussian weights coded in FP4 it is about 8.5% RMS; far from that, something is wrong."""
    rng = np.random.default_rng(22)
    weights = rng.standard_normal((64, 128, 32))
    weights *= rng.uniform(3.5, 6.9, (64, 128, 1)) / np.abs(weights).max(axis=2, keepdims=True)
    codes = np.abs(weights[..., None] - np.array(VALUES)).argmin(axis=-1).reshape(64, -1)
    exponents = rng.integers(110, 125, (64, 128)).astype(np.uint8)
    parts, tally = encode(quantizer, pack(codes), exponents)
    nibbles = parts["weight"].view(np.uint8)
    levels = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(64, 128, 32)
    found = levels * parts["scales"].astype(float)[..., None] + parts["biases"][..., None]
    true = ml_reference.decode(pack(codes), exponents).astype(float).reshape(found.shape)
    expected = np.sqrt(((found - true) ** 2).sum() / (true**2).sum())
    assert tally.relative == pytest.approx(expected, rel=1e-4)
    assert 0.075 < tally.relative < 0.095


def test_zeros_stay_near_zero(quantizer: Quantizer) -> None:
    """What MLX's formula is chosen for, and the plan's simple one loses: q · scale + bias ≈ 0.

    Exactly 0 before F16 rounds scale and bias; after it within 15 × 2^-11 of a step.
    """
    rng = np.random.default_rng(23)
    codes = rng.integers(0, 16, (200, 32))
    codes[:, :4] = [0, 8, 0, 8]
    parts, _ = encode(quantizer, pack(codes), np.full((200, 1), 120, np.uint8))
    for row in range(200):
        for column in range(4):
            level = int(parts["weight"][row, 0]) >> (4 * column) & 15
            value = level * float(parts["scales"][row, 0]) + float(parts["biases"][row, 0])
            assert abs(value) <= abs(float(parts["scales"][row, 0])) * 15 / 2048


def test_decoders_agree_on_every_code_and_exponent() -> None:
    """A hand-made group (byte 0x2F: 15 = -6 in the even column, 2 = 1 in the odd), then all."""
    packed = np.full((1, 16), 0x2F, np.uint8)
    assert fp4.decode(packed, np.array([[128]], np.uint8), "x")[0, :2].tolist() == [-12.0, 2.0]
    codes = np.arange(32).reshape(1, 32) % 16
    with np.errstate(over="ignore"):
        for exponent in range(255):
            row = fp4.decode(pack(codes), np.array([[exponent]], np.uint8), "x")[0]
            for code, value in zip(codes[0], row, strict=True):
                assert value == np.float32(ml_reference.decode_one(int(code), exponent))


@pytest.mark.parametrize("name", ["mlx", pytest.param("affine4g32", marks=pytest.mark.full)])
def test_a_processor_without_special_instructions_gives_the_same(name: str, tmp_path: Path) -> None:
    program = (
        "import hashlib, numpy as np; from dsv4.quantization.formats import get_quantizer\n"
        "rng = np.random.default_rng(24); n = 5000\n"
        "out = {p: np.empty(k * n, np.uint8) for p, k in"
        " (('weight', 16), ('scales', 2), ('biases', 2))}\n"
        f"tally = get_quantizer('{name}').encode(rng.integers(0, 256, 16 * n, np.uint8),"
        " rng.integers(90, 130, n).astype(np.uint8), out)\n"
        "print(hashlib.sha256(b''.join(out[p].tobytes() for p in sorted(out))).hexdigest(),"
        " round(tally.relative, 9))\n"
    )
    scripts = Path(affine_table.__file__).resolve().parents[2]
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(scripts), "NUMBA_CACHE_DIR": str(tmp_path / name)} | extra,
        ).stdout
        for name, extra in (("host", {}), ("generic", {"NUMBA_CPU_NAME": "generic"}))
    ]  # fmt: skip
    assert outputs[0] == outputs[1]
