"""Quantize FP4 groups to 4-bit affine with a table computed by the installed MLX.

A group is 32 E2M1 codes that share one UE8M0 exponent. The result of `mx.quantize` depends only on
its least value, its greatest value and the exponent: 15 values, so 120 pairs (least, greatest),
times 255 exponents. `build_table` quantizes one group for each of these 30,600 cases with
`mx.quantize` on the CPU and stores the results. Quantizing a tensor is then a lookup. The bytes are
MLX's for the decoded float32, whatever formula the installed MLX has.

MLX's Metal and CUDA kernels differ from its CPU code for groups without a zero or positive value
(they start the maximum at 0). So the CPU is used explicitly: every machine writes the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numba
import numpy as np

from dsv4.errors import UserError
from dsv4.model.names import GROUP
from dsv4.quantization.fp4 import E2M1, UE8M0

BITS = 4
# Rank of each code's value among the 15 values -6 … 6; both zeros have rank 7.
RANK = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0])

OK, UNDERFLOW, BAD = 0, 1, 2  # flag of an entry
ERROR_MAX = (1 << 14) - 1  # of a squared error in its row's unit
SUM_BITS = 13  # a group's 32 squares of values × 4, at most 32 × 144


@dataclass(frozen=True)
class Table:
    """The result of `mx.quantize` for every case of an FP4 group.

    entries: int64 (65536,), index exponent << 8 | least rank << 4 | greatest rank; bits 0–15 the
      scale and 16–31 the bias (F16 bits), 32–47 the row, 48–49 OK, UNDERFLOW or BAD.
    rows: int32 (n, 16), by code: bits 0–3 the level; from bit 4 on SUM_BITS for the value's square
      × 4; above them the squared error in the row's unit. Values and errors are in units of
      2^exponent.
    units: float64 (n,), each row's unit of squared errors.
    powers: float64 (256,), 4^(e - 127): turns squares in those units into squares.
    digest: 16 hex digits that change if any result does.
    """

    entries: np.ndarray
    rows: np.ndarray
    units: np.ndarray
    powers: np.ndarray
    digest: str


@dataclass
class ErrorStats:
    """Sums over groups: the weights' squares, the errors' squares; groups that underflowed."""

    energy: float = 0.0
    error: float = 0.0
    underflows: int = 0

    def add(self, other: ErrorStats) -> None:
        """Add the sums of another."""
        self.energy += other.energy
        self.error += other.error
        self.underflows += other.underflows

    @property
    def relative(self) -> float:
        """RMS of the error relative to the RMS of the weights; 0 when all weights are 0."""
        return float(np.sqrt(self.error / self.energy)) if self.energy else 0.0


class BadGroup(Exception):
    """A group that the format cannot hold: its index in the block, and what was found."""

    def __init__(self, group: int, found: str, expected: str) -> None:
        super().__init__(found)
        self.group, self.found, self.expected = group, found, expected


def bad_exponent(group: int, exponent: int) -> BadGroup:
    """Return the error for a group whose exponent byte is 255 or too large for F16."""
    if exponent == 255:
        return BadGroup(group, "scale byte 255 (NaN)", "bytes from 0 to 254")
    return BadGroup(
        group,
        f"scale byte {exponent}: values too large for an F16 scale or bias",
        "values that F16 can hold",
    )


def build_table() -> Table:
    """Quantize all 120 × 255 cases with the installed MLX, on its CPU backend.

    Each case is quantized three times, with its codes in another order and its zeros written +0, -0
    or both. Raises UserError if the results differ: then no such table fits this MLX's formula.
    """
    pairs, probes = _probes()
    scales, biases, levels = _ask_mlx(probes[0])
    by_code = np.full((len(levels), 16), -1, np.int64)  # exponents 0 … 254 outside, pairs inside
    np.put_along_axis(by_code, np.tile(probes[0], (255, 1)), levels, axis=1)
    for other in probes[1:]:
        again = _ask_mlx(other)
        expected = np.take_along_axis(by_code, np.tile(other, (255, 1)), axis=1)
        same = np.array_equal(again[2], expected)
        if not (same and _same_bits(again[0], scales) and _same_bits(again[1], biases)):
            raise UserError(
                "mx.quantize",
                "answers that depend on more than a group's least and greatest value",
                "the formula of MLX 0.31 and 0.32",
                "install the pinned MLX (requirements.txt)",
            )
    return _assemble(pairs, scales, biases, by_code)


def _probes() -> tuple[np.ndarray, list[np.ndarray]]:
    """Return all pairs as least << 4 | greatest, (120,), and three probes of each, (120, 32).

    A probe holds every code between its least and greatest value, the last one repeated.
    """
    codes = sorted(range(16), key=lambda code: (RANK[code], code))
    pairs, both, plus, minus = [], [], [], []
    for least in range(15):
        for greatest in range(least, 15):
            inside = [code for code in codes if least <= RANK[code] <= greatest]
            pairs.append(least << 4 | greatest)
            both.append((inside + [inside[-1]] * GROUP)[:GROUP])
            for probe, zero in ((plus, 0), (minus, 8)):
                signed = [zero if code in (0, 8) else code for code in reversed(inside)]
                probe.append((signed + [signed[0]] * GROUP)[:GROUP])
    return np.array(pairs), [np.array(probe) for probe in (both, plus, minus)]


def _ask_mlx(probes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantize (120, 32) codes at all exponents with mx.quantize on the CPU.

    Returns scales and biases, float32 (30600,), and levels 0 … 15, int64 (30600, 32).
    """
    import mlx.core as mx  # here, because importing it takes longer than most runs' planning

    with np.errstate(over="ignore"):
        values = (E2M1[probes] * UE8M0[:255, None, None]).reshape(-1, GROUP)
    answer = mx.quantize(
        mx.array(values), group_size=GROUP, bits=BITS, mode="affine", stream=mx.cpu
    )
    weight, scales, biases = (np.array(part) for part in answer)
    nibbles = weight.view(np.uint8)
    levels = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(-1, GROUP)
    return scales.reshape(-1), biases.reshape(-1), levels.astype(np.int64)


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))


def _nans(pairs: np.ndarray) -> np.ndarray:
    """Return the NaN that x86 gives for each case's scale, float16 (30600,).

    Its sign differs on arm64, in cases that no bundle can hold (exponents 253 and 254), and the
    digest must be the same on every machine. Plus where both ends overflow alike, else minus.
    """
    values = np.unique(E2M1)  # by rank
    with np.errstate(over="ignore"):
        least, greatest = (
            (values[rank] * UE8M0[:255, None]).reshape(-1) for rank in (pairs >> 4, pairs & 15)
        )
    alike = np.isinf(least) & (least == greatest)
    return np.where(alike, np.float16("nan"), -np.float16("nan"))


def _assemble(
    pairs: np.ndarray, scales: np.ndarray, biases: np.ndarray, by_code: np.ndarray
) -> Table:
    """Pack the results, exponents outside and pairs inside, into a Table."""
    exponents = np.repeat(np.arange(255), len(pairs))
    with np.errstate(over="ignore", invalid="ignore"):
        half_scales, half_biases = scales.astype(np.float16), biases.astype(np.float16)
    half_scales = np.where(np.isnan(scales), _nans(pairs), half_scales)
    finite = np.isfinite(half_scales) & np.isfinite(half_biases)
    lost = ((half_scales == 0) & (scales != 0)) | ((half_biases == 0) & (biases != 0))
    flags = np.where(finite, np.where(lost, UNDERFLOW, OK), BAD)

    unit = np.ldexp(1.0, 127 - exponents)
    steps = np.where(finite, half_scales, 0).astype(np.float64) * unit
    offsets = np.where(finite, half_biases, 0).astype(np.float64) * unit
    levels = np.where(finite[:, None], by_code, -1)
    kinds, which = _distinct(levels, steps, offsets)
    entries = np.full(1 << 16, BAD << 48, np.int64)
    entries[exponents << 8 | np.tile(pairs, 255)] = (
        half_scales.view(np.uint16).astype(np.int64)
        | half_biases.view(np.uint16).astype(np.int64) << 16
        | which << 32
        | flags << 48
    )
    columns, units = _rows(levels[kinds], steps[kinds], offsets[kinds])
    digest = hashlib.sha256(entries.astype("<i8").tobytes() + columns.tobytes()).hexdigest()[:16]
    level, energy, low, high = columns.astype(np.int64).reshape(-1, 4, 16).swapaxes(0, 1)
    rows = (level | energy << 4 | (high << 8 | low) << (4 + SUM_BITS)).astype(np.int32)
    return Table(entries, rows, units, np.ldexp(1.0, 2 * (np.arange(256) - 127)), digest)


def _distinct(
    levels: np.ndarray, steps: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return an index of each distinct row of the three, sorted, and the number of each row's.

    np.unique of the rows takes half of a run's start-up; 16 small levels compare as two integers.
    """
    words = (levels + 1).astype(np.uint8).view(">u8").astype(np.uint64)
    keys = (offsets, steps, words[:, 1], words[:, 0])
    order = np.lexsort(keys)
    new = np.ones(len(order), bool)
    new[1:] = np.any([key[order[1:]] != key[order[:-1]] for key in keys], axis=0)
    which = np.empty(len(order), np.int64)
    which[order] = np.cumsum(new) - 1
    return order[new], which


def _rows(
    levels: np.ndarray, steps: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the contents of a Table's rows, uint8 (n, 64), and its units.

    Four columns for each code: the level; the value's square × 4; low and high byte of the squared
    error.
    levels: (n, 16), -1 where a code lies outside a case's range and so never meets its row; scale
    and bias in units of 2^exponent, (n,).
    """
    values = E2M1.astype(np.float64)
    errors = levels * steps[:, None] + offsets[:, None] - values
    squares = np.where(levels < 0, 0, errors**2)
    units = np.maximum(squares.max(axis=1), 1e-30) / ERROR_MAX
    fixed = np.rint(squares / units[:, None]).astype(np.int64)
    energy = np.broadcast_to(values**2 * 4, levels.shape)
    rows = np.hstack([np.maximum(levels, 0), energy, fixed & 0xFF, fixed >> 8])
    return rows.astype(np.uint8), units


def quantize(
    table: Table,
    packed: np.ndarray,
    exponents: np.ndarray,
    weight: np.ndarray,
    scales: np.ndarray,
    biases: np.ndarray,
) -> ErrorStats:
    """Quantize n whole groups; the arrays are contiguous, the last three are written.

    packed, weight: int64 (2n,), sixteen codes or levels each, the lowest nibble is the first
    column, little-endian; exponents: uint8 (n,); scales, biases: uint16 (n,), the bits of F16.
    Runs without the GIL. Raises BadGroup for an exponent of 255 and for a scale or bias beyond F16.
    """
    bad, underflows, energy, error = _quantize(
        packed, exponents, table.entries, table.rows, table.units, table.powers,
        weight, scales, biases,
    )  # fmt: skip
    if bad >= 0:
        raise bad_exponent(bad, int(exponents[bad]))
    return ErrorStats(energy, error, underflows)


# The kernel reads a group as two 64-bit words and turns them into four bit planes, one bit for each
# of the 32 codes: sign and magnitude bits 4, 2, 1. Everything is int64: NumPy's rule for mixing
# signed and unsigned would make floats of them.
_LOW_BITS = 0x1111111111111111
_PLANE = 0x3333333333333333
_BLOCK = 1024


@numba.njit(inline="always")
def _plane(low: int, high: int, bit: int) -> int:
    return ((low >> bit) & _LOW_BITS) | (((high >> bit) & _LOW_BITS) << 1)


@numba.njit(inline="always")
def _largest_magnitude(members: int, fours: int, twos: int, ones: int) -> int:
    """Return the greatest magnitude index, 0 … 7, of the codes marked in `members`."""
    left = members & fours
    top = 4 if left != 0 else 0
    members = left if left != 0 else members
    left = members & twos
    top += 2 if left != 0 else 0
    members = left if left != 0 else members
    return top + (1 if (members & ones) != 0 else 0)


@numba.njit(inline="always")
def _pair(low: int, high: int) -> int:
    """Return a group's least rank << 4 | greatest rank.

    The least magnitude is 7 minus the greatest of the inverted bits.
    """
    minus, fours = _plane(low, high, 3), _plane(low, high, 2)
    twos, ones = _plane(low, high, 1), _plane(low, high, 0)
    plus = ~minus & _PLANE
    greatest = (
        7 + _largest_magnitude(plus, fours, twos, ones)
        if plus != 0
        else _largest_magnitude(minus, ~fours, ~twos, ~ones)
    )
    least = (
        7 - _largest_magnitude(minus, fours, twos, ones)
        if minus != 0
        else 14 - _largest_magnitude(plus, ~fours, ~twos, ~ones)
    )
    return least << 4 | greatest


@numba.njit(nogil=True, cache=True)
def _quantize(packed, exponents, entries, rows, units, powers, weight, scales, biases):
    """Return (first bad group or -1, underflows, sum of squares, sum of squared errors).

    It works in blocks and on slices, so that the compiler vectorizes the search for the pairs.
    """
    underflows, energy, error = 0, 0.0, 0.0
    cases = np.empty(_BLOCK, np.int64)
    for start in range(0, len(exponents), _BLOCK):
        words = packed[2 * start : 2 * (start + _BLOCK)]
        levels = weight[2 * start : 2 * (start + _BLOCK)]
        bytes_ = exponents[start : start + _BLOCK]
        steps, offsets = scales[start : start + _BLOCK], biases[start : start + _BLOCK]
        for i in range(len(bytes_)):
            cases[i] = _pair(words[2 * i], words[2 * i + 1])
        for i in range(len(bytes_)):
            entry = entries[np.int64(bytes_[i]) << 8 | cases[i]]
            flag = entry >> 48
            if flag != OK:
                if flag == BAD:
                    return start + i, underflows, energy, error
                underflows += 1
            steps[i] = entry
            offsets[i] = entry >> 16
            row = (entry >> 32) & 0xFFFF
            sums = 0
            for half in range(2):
                codes, made = words[2 * i + half], 0
                for place in range(0, 64, 4):
                    found = rows[row, (codes >> place) & 15]
                    made |= (found & 15) << place
                    sums += found >> 4
                levels[2 * i + half] = made
            power = powers[bytes_[i]]
            energy += (sums & ((1 << SUM_BITS) - 1)) * power
            error += (sums >> SUM_BITS) * (units[row] * power)
    return -1, underflows, energy / 4, error
