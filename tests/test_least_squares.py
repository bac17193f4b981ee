"""Affine with few bits by least squares: what MLX decodes, how near it comes, what verify says."""

from __future__ import annotations

import bundles
import mlx.core as mx
import numpy as np
import pytest
from conftest import must

from dsv4.model import labels, mtp
from dsv4.model.load import expert_labels, open_bundle
from dsv4.model.quantizer_table import SMALL, is_quantizer
from dsv4.quantization import fp4, least_squares
from dsv4.quantization.affine_table import BadGroup
from dsv4.quantization.formats import get_quantizer
from dsv4.quantization.synthetic import pack, random_weights, to_fp4

SHAPES = [(bits, size) for bits in labels.AFFINE_BITS for size in labels.GROUPS]


def matrix(rows: int, seed: int, kind: str = "normal") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (rows, 256), exponents (rows, 16) and values (rows, 512) of a random expert."""
    rng = np.random.default_rng(seed)
    sizes = 0.02 * np.exp2(rng.uniform(0, 1, rows)).repeat(16)[:, None]
    halves, exponents = to_fp4(sizes * random_weights(rng, 16 * rows, kind), "ceil")
    packed = pack(halves).reshape(rows, 256)
    scales = (exponents + 127).astype(np.uint8).reshape(rows, 16)
    return packed, scales, fp4.decode(packed, scales, "test")


def quantized(
    packed: np.ndarray, scales: np.ndarray, bits: int, size: int, importance=None
) -> tuple[np.ndarray, least_squares.Errors]:
    """The matrix as MLX decodes it, and the errors that the quantizer itself counted."""
    out, columns = len(packed), 2 * packed.shape[1]
    parts = (
        np.empty(out * columns * bits // 8, np.uint8),
        np.empty(out * columns // size, np.uint16), np.empty(out * columns // size, np.uint16),
    )  # fmt: skip
    flat = (packed.reshape(-1), scales.reshape(-1))
    errors = least_squares.quantize(*flat, importance, (bits, size), parts)
    rest = [mx.array(p.view(np.float16).astype(np.float32).reshape(out, -1)) for p in parts[1:]]
    levels = mx.array(parts[0].view(np.uint32).reshape(out, -1))
    decoded = mx.dequantize(levels, *rest, **labels.affine_label(bits, size), stream=mx.cpu)
    return np.array(decoded), errors


@pytest.mark.parametrize(("bits", "size"), SHAPES)
def test_the_error_that_is_counted_is_that_of_what_mlx_decodes(bits: int, size: int) -> None:
    packed, scales, values = matrix(16, 1)
    found, errors = quantized(packed, scales, bits, size)
    assert errors.tally.error == pytest.approx(((found - values) ** 2).sum(), rel=1e-3, abs=1e-9)
    assert errors.tally.energy == pytest.approx((values.astype(np.float64) ** 2).sum(), rel=1e-6)
    theirs = mx.quantize(mx.array(values), **labels.affine_label(bits, size), stream=mx.cpu)
    theirs = np.array(mx.dequantize(*theirs, **labels.affine_label(bits, size), stream=mx.cpu))
    assert errors.tally.error < ((theirs - values) ** 2).sum()


# The best of 81 ranges leaves .3236, .3336, .1636 and .1406 of normal weights.
@pytest.mark.parametrize(
    ("bits", "size", "most"), [(2, 64, 0.325), (2, 128, 0.338), (3, 64, 0.165), (3, 32, 0.145)]
)
def test_few_bits_leave_little_more_than_the_least_error(bits: int, size: int, most: float) -> None:
    packed, scales, _ = matrix(512, 2)
    assert quantized(packed, scales, bits, size)[1].tally.relative <= most


def test_an_importance_moves_the_error_to_columns_that_count_less() -> None:
    packed, scales, values = matrix(64, 3)
    importance = np.exp(np.random.default_rng(4).normal(0, 2, 512))
    plain, _ = quantized(packed, scales, 2, 64)
    weighed, errors = quantized(packed, scales, 2, 64, importance)
    before, after = ((importance * (found - values) ** 2).sum() for found in (plain, weighed))
    assert after < 0.8 * before
    assert errors.error == pytest.approx(after, rel=1e-3)
    assert ((weighed - values) ** 2).sum() > ((plain - values) ** 2).sum()


def test_groups_that_are_constant_or_of_very_unlike_parts_are_held() -> None:
    packed = np.zeros((4, 32), np.uint8)
    packed[0], packed[1], packed[2], packed[3] = 0x77, 0x88, 0x21, 0x7F
    scales = np.array([[120, 120], [120, 3], [125, 0], [104, 130]], np.uint8)
    values = fp4.decode(packed, scales, "test")
    found, _ = quantized(packed, scales, 2, 64)
    assert np.array_equal(found[:2], values[:2])
    assert (np.abs(found - values).max(axis=1) <= np.ptp(values, axis=1) / 6).all()


def test_what_f16_cannot_hold_stops_and_what_it_loses_is_counted() -> None:
    packed = np.tile(np.array([0x70, 0xF2], np.uint8), 16)[None]
    with pytest.raises(BadGroup, match="too large"):
        quantized(packed, np.array([[145, 145]], np.uint8), 3, 64)
    with pytest.raises(BadGroup, match="255") as bad:
        quantized(packed, np.array([[120, 255]], np.uint8), 3, 64)
    assert bad.value.group == 1
    assert quantized(packed, np.array([[80, 80]], np.uint8), 3, 64)[1].tally.underflows == 1


def test_names_of_widths() -> None:
    assert is_quantizer("affine2g64")
    assert is_quantizer("affine4g32")
    assert [n for n in ("affine4g32-mx", "affine7g64", "affine2g16", "optimal", "exact5", "", None)
            if is_quantizer(n)] == []  # fmt: skip
    assert get_quantizer("affine3g64").label == {"group_size": 64, "bits": 3, "mode": "affine"}


# The search over all assignments of values to levels, which this quantizer has taken the place of,
# left .0429 of normal weights by the same rule.
def test_four_bits_in_groups_of_32_leave_half_of_what_mlx_leaves() -> None:
    packed, scales, values = matrix(512, 6)
    found, errors = quantized(packed, scales, 4, 32)
    assert errors.tally.relative <= 0.052
    exact = (found == values).reshape(-1, 32).all(axis=1).mean()
    assert exact >= 0.4


@pytest.mark.parametrize(("bits", "size"), SHAPES)
def test_weights_so_uneven_that_no_turn_helps_are_no_fault_of_the_source(
    bits: int, size: int
) -> None:
    """31 zeros and one -4 that hardly counts, beside a zero that counts for all: sums of float32
    lose it, no range gets better, and a division by zero said that the values are too large."""
    packed = np.zeros((1, size // 2), np.uint8)
    packed[0, 7] = 0xE0
    importance = np.full(size, 0.1)
    importance[[13, 15]] = 700, 1e-3
    scales = np.full((1, size // 32), 127, np.uint8)
    found, _ = quantized(packed, scales, bits, size, importance)
    assert np.abs(found - fp4.decode(packed, scales, "test")).max() < 0.5


def test_small_is_labelled_by_projection_and_held_to_its_bytes(source, tmp_path) -> None:
    """2 bits in groups of 64 have the widths of 4 in groups of 32; config.json's columns decide."""
    folder = tmp_path / "bundle"
    must("convert", "--source", source, "--bundle", folder, "--quantizer", "small")
    must("finalize", "--source", source, "--bundle", folder)
    must("patch", "--bundle", folder)
    opened = open_bundle(folder)
    for base, label in expert_labels(opened).items():
        projection = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[base[-2:]]
        expected = labels.MXFP4 if mtp.is_mtp(base) else SMALL[projection]
        assert label == expected == opened.config["quantization"][base]
    for name in ("model.layers.1.mlp.switch_mlp", "language_model.model.layers.1.ffn.switch_mlp"):
        assert opened.config["quantization"][f"{name}.down_proj"] == SMALL["down_proj"]
        assert opened.config["quantization"][f"{name}.up_proj"] == SMALL["up_proj"]
    assert bundles.judge(folder, source).names == set()
    bundles.flip(folder, "layers.1.ffn.experts.3.w1.scales", 2)
    found = bundles.judge(folder, source)
    assert "layers.1.ffn.experts.3.w1" in bundles.places(found, "expert-differs")
