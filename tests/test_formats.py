"""The decoders of FP4 and FP8, each against a hand-made block and an independent scalar decoder.

Catches: nibbles swapped, codes read as integers, the sign bit misplaced, a scale off by one group
or by a power of two, subnormal and NaN codes of E4M3.
"""

import math

import numpy as np
import pytest
from conftest import SEED

from dsv4.errors import UserError
from dsv4.quantization import fp4, fp8


def test_a_hand_made_fp4_block_decodes_as_written():
    # byte 0x21: low nibble 1 = 0.5 is column 0, high nibble 2 = 1.0 is column 1
    # byte 0xF8: low nibble 8 = -0 is column 2, high nibble F = -6 is column 3
    packed = np.zeros((1, 32), np.uint8)
    packed[0, :2] = 0x21, 0xF8
    packed[0, 16] = 0x07  # column 32, the second group: 6
    scales = np.array([[128, 126]], np.uint8)  # 2^1 and 2^-1
    values = fp4.decode(packed, scales, "hand-made")
    assert values.shape == (1, 64)
    assert values[0, :4].tolist() == [1.0, 2.0, 0.0, -12.0]
    assert values[0, 32] == 3.0
    assert np.count_nonzero(values) == 4


def scalar_e2m1(code: int) -> float:
    """sign, 2 exponent bits with bias 1, 1 mantissa bit, by the definition and without a table."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def test_fp4_equals_a_scalar_decoder_on_random_codes():
    rng = np.random.default_rng(int(SEED))
    packed = rng.integers(0, 256, (5, 48), dtype=np.uint8)
    scales = rng.integers(90, 160, (5, 3), dtype=np.uint8)
    values = fp4.decode(packed.view(np.int8), scales, "random")
    for row in range(5):
        for column in range(96):
            byte = int(packed[row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            exponent = int(scales[row, column // 32]) - 127
            assert values[row, column] == scalar_e2m1(code) * 2.0**exponent


def test_scale_byte_255_stops_with_its_place():
    scales = np.full((3, 2), 127, np.uint8)
    scales[2, 1] = 255
    with pytest.raises(UserError, match=r"some\.weight: found scale byte 255 .* row 2, group 1"):
        fp4.decode(np.zeros((3, 32), np.uint8), scales, "some.weight")


def scalar_e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    fraction = mantissa / 8
    magnitude = fraction * 2.0**-6 if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


def test_every_fp8_code_equals_the_definition_and_mlx():
    import mlx.core as mx

    for code in range(256):
        expected = scalar_e4m3(code)
        assert np.array_equal(fp8.E4M3[code], np.float32(expected), equal_nan=True), code
    with_mlx = np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), dtype=mx.float32))
    finite = np.isfinite(fp8.E4M3)
    assert np.array_equal(with_mlx[finite], fp8.E4M3[finite])


def test_an_fp8_scale_covers_its_128_by_128_block_and_no_other():
    codes = np.full((130, 256), 0x38, np.uint8)  # 1.0
    scales = np.array([[127, 128], [126, 129]], np.uint8)
    values = fp8.decode(codes, scales, "blocks")
    assert values.shape == (130, 256)
    assert (values[:128, :128] == 1).all()
    assert (values[:128, 128:] == 2).all()
    assert (values[128:, :128] == 0.5).all()
    assert (values[128:, 128:] == 4).all()
