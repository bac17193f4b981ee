"""Level 2: one tensor of the bundle against the source.

What a tensor is compared with depends on what it is:

| tensor             | compared with                                                           |
|--------------------|-------------------------------------------------------------------------|
| routed expert      | FP4 source: its quantizer's own bytes, and bounds (certificate.py says  |
|                    | where equal bytes are enough)                                           |
| affine module      | FP8 or BF16 source: bounds, and MLX's formula                           |
| FP4, FP8 as they   | the source's codes, and its block's scale in each row and group; where  |
| are: mxfp4, mxfp8  | another tool wrote other codes, their values (floats.py)                |
| mxfp4, mxfp8 or    | the source: the nearest code, the greatest not cut off (floats.py)      |
| nvfp4 of others    |                                                                         |
| TurboQuant         | the source, rotated: the nearest level, the norm (turbo.py)             |
| control, integers  | the source's bytes                                                      |
| norms, router, ape | the source rounded to the dtype that the bundle has them in (F16)       |
"""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

import numpy as np

from dsv4.model.labels import EXPERT, SOURCE, TURBO
from dsv4.model.names import BLOCK, GROUP, parse_expert, stack_of
from dsv4.model.quantizer_table import is_quantizer, quantizer_properties
from dsv4.quantization.affine_table import BadGroup
from dsv4.quantization.formats import Quantizer, get_quantizer
from dsv4.quantization.imatrix import EVEN, Importance, normalized
from dsv4.storage.safetensors_file import FLOATS, ITEMSIZE, NUMPY_DTYPE, Tensor
from dsv4.storage.tensor_reader import (
    TensorReader,
    as_float32,
    element_index,
    format_element,
    round_to_dtype,
)
from dsv4.verification.checks.headers import label_at, quantizer_of
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.case_table import judge_cases, zeros
from dsv4.verification.numbers.decode import source_rows
from dsv4.verification.numbers.float_formats import compare_floats, is_exact
from dsv4.verification.numbers.tasks import Task, TensorResult
from dsv4.verification.numbers.tolerances import Tolerance, tolerance_for
from dsv4.verification.numbers.turboquant import compare_turbo
from dsv4.verification.scan import Scan

BLOCK_WEIGHTS = 1 << 17  # weights in a block of rows: 512 KB decoded, which a core's cache holds
RUN_BLOCKS = 8  # blocks whose bytes are compared at one go
COPY_BYTES = 1 << 18  # of codes that were kept, compared at one go, in a core's cache
PIECE_BYTES = 4 << 20
PIECE_NUMBERS = 1 << 17  # of a tensor that is not quantized, compared at one go


class Comparer:
    """Compares tasks, in any thread; the quantizer's table is made once.

    importance: of the imatrix that the user named, if any.
    """

    def __init__(self, bundle: Scan, importance: Importance = EVEN) -> None:
        mark = quantizer_of(bundle)
        self.recorded = mark.get("requantize_quantizer")
        self.quantizer: Quantizer | None = None
        if is_quantizer(self.recorded):
            quantizer = get_quantizer(self.recorded, importance, labels_by_stack(bundle))
            # Another digest: another MLX's table, or an importance of columns that is not here.
            if quantizer.digest == mark.get("requantize_table"):
                self.quantizer = quantizer
                promise = tolerance_for(quantizer.name, EXPERT)
                self.certified, self.worst = judge_cases(quantizer, promise)

    def compare(self, task: Task, reader: TensorReader) -> TensorResult:
        """Compare one tensor with its source."""
        how = f"{task.label['mode']} {task.label['bits']}-bit" if task.label else ""
        outcome = TensorResult(task.origin.name, task.what, how or task.main.dtype)
        disk = task.main.disk.partition("[")[0].removesuffix(".weight")
        outcome.disk = disk if disk != task.base else ""
        properties = quantizer_properties(self.recorded)
        own = properties.keeps_source
        expert = task.what == "expert" and properties.mixed
        if own and not expert and task.label and task.label["mode"] == "affine":
            outcome.fault("rounded", "whole tensor", "affine", "the source's own numbers")
        if self._is_other_form(task):
            wanted = "TurboQuant's codes, or none of them, as the shards' mark says"
            outcome.fault("expert-differs", "whole tensor", how, wanted)
        if task.label is None:
            compare_plain(task, reader, outcome, own)
        elif task.label["mode"] == "affine":
            self._compare_affine(task, reader, outcome)
        elif task.label["mode"] == TURBO:
            compare_turbo(task, reader, outcome, BLOCK_WEIGHTS)
        elif task.label["mode"] != SOURCE and is_exact(task):
            compare_copies(task, reader, outcome)
            if outcome.wrong and not outcome.faults and self.recorded is None:
                outcome = TensorResult(outcome.name, outcome.what, how, disk=outcome.disk)
                compare_floats(task, reader, outcome, BLOCK_WEIGHTS)
        else:
            compare_floats(task, reader, outcome, BLOCK_WEIGHTS)
        return outcome

    def _is_other_form(self, task: Task) -> bool:
        """True for an expert in TurboQuant that was to be another's, and the other way round."""
        if task.what != "expert" or task.label is None or self.quantizer is None:
            return False
        turbo = self.quantizer.label["mode"] == TURBO
        return turbo != (task.label["mode"] == TURBO)

    def _compare_affine(self, task: Task, reader: TensorReader, outcome: TensorResult) -> None:
        """Compare runs of rows by their bytes where that is enough; decode the others, and one
        block of every tensor in any case.
        """
        expert = task.what == "expert"
        promise = tolerance_for(self.recorded if expert else None, task.label)
        quantizer = self.quantizer.for_tensor(task.base) if expert and self.quantizer else None
        if quantizer is not None and quantizer.label != task.label:
            quantizer = None
        importance = quantizer and self.quantizer.importance.get(task.base)
        if importance is not None:
            importance = normalized(importance, task.base)
        out, columns = task.origin.shape[0], task.columns
        rows = max(1, BLOCK_WEIGHTS // columns)
        sample = zlib.crc32(task.base.encode()) % -(-out // rows) * rows
        cuts = {*range(0, out, RUN_BLOCKS * rows), sample, min(out, sample + rows), out}
        for first, last in pairwise(sorted(cuts)):
            if (
                first != sample
                and quantizer
                and self._same_bytes(task, reader, first, last, outcome)
            ):
                continue
            for row in range(first, last, rows):
                block = Block(task, reader, row, min(last, row + rows), columns)
                if not block.source_is_whole(outcome):
                    return
                block.bounds(outcome, promise)
                if quantizer:
                    block.recompute(outcome, quantizer, importance)
                else:
                    block.formula(outcome)
        judge_error(outcome, promise)

    def _same_bytes(
        self, task: Task, reader: TensorReader, first: int, last: int, outcome: TensorResult
    ) -> bool:
        """True, and counted, when some rows are what the quantizer makes of certified groups."""
        exponents = reader.rows(task.scale, first, last)
        if not self.certified[exponents].all():
            return False
        codes = reader.rows(task.origin, first, last)
        stored = {part: reader.rows(tensor, first, last) for part, tensor in task.parts.items()}
        made = {part: np.empty_like(data) for part, data in stored.items()}
        tally = self.quantizer.encode(codes, exponents, made)
        if not all(np.array_equal(made[part], data) for part, data in stored.items()):
            return False
        outcome.recomputed = True
        outcome.numbers += 2 * len(codes)
        outcome.groups += len(exponents)
        outcome.exact += len(exponents)
        outcome.lossless += len(exponents) if tally.error == 0 else 0
        outcome.energy += tally.energy
        outcome.error += tally.error
        outcome.zeros += zeros(codes.view(np.int64))
        if self.worst >= outcome.worst:
            outcome.worst, outcome.worst_at = self.worst, ""
        return True


def labels_by_stack(bundle: Scan) -> dict[str, dict[str, Any]]:
    """Stack → the label by which its first expert is stored: what a mixture's plan said."""
    found: dict[str, dict[str, Any]] = {}
    for base in bundle.bases:
        if (stack := stack_of(base)) not in found and (label := label_at(bundle, base)):
            found[stack] = label
    return found


def judge_error(outcome: TensorResult, promise: Tolerance) -> None:
    """Judge a whole tensor's error, where its bytes were not found right or nothing may err."""
    sure = outcome.exact == outcome.groups and promise.rms > 0
    if not sure and outcome.relative > promise.rms:
        outcome.fault(
            f"{outcome.what}-imprecise",
            "whole tensor",
            f"relative RMS {outcome.relative:.3%}",
            f"at most {promise.rms:.0%}",
        )


class Block:
    """Some rows of an affine module, decoded: source values, levels, scales and biases."""

    def __init__(
        self, task: Task, reader: TensorReader, first: int, last: int, columns: int
    ) -> None:
        self.task, self.first, self.columns = task, first, columns
        self.bits, self.size = task.label["bits"], task.label["group_size"]
        number = (last - first) * columns
        self.codes, self.exponents, self.values = source_rows(task, reader, first, last)
        self.stored = {part: reader.rows(t, first, last) for part, t in task.parts.items()}
        dtype = task.parts["scales"].dtype
        self.levels = np.empty(number, np.uint8)
        self.scales = as_float32(self.stored["scales"], dtype)
        self.biases = as_float32(self.stored["biases"], dtype)
        self.rounding = kernels.ROUNDING[dtype]
        kernels.unpack(self.stored["weight"], self.bits, self.levels)

    def source_is_whole(self, outcome: TensorResult) -> bool:
        """False, with a fault, when the source itself holds NaN."""
        expert = self.task.what == "expert"  # FP4 has no NaN but its exponent's
        if (self.exponents == 255).any() or not (expert or np.isfinite(self.values).all()):
            outcome.fault("source-broken", f"rows from {self.first}", "NaN", "numbers")
            return False
        return True

    def weight_index(self, weight: int) -> str:
        """Where in the tensor the weight with this index in the block lies."""
        row, column = divmod(int(weight), self.columns)
        return f"row {self.first + row}, group {column // self.size}, column {column}"

    def bounds(self, outcome: TensorResult, promise: Tolerance) -> None:
        """Hold every weight to the promise."""
        counts, energy, error, worst = kernels.bounds(
            self.values, self.levels, self.scales, self.biases, self.bits, *self.rounding, self.size
        )
        outcome.numbers += len(self.values)
        outcome.energy += energy
        outcome.error += error
        outcome.zeros += int(counts[kernels.ZEROS])
        outcome.zeros_lost += int(counts[kernels.LOST_ZEROS])
        outcome.lossless += int(counts[kernels.EXACT_GROUPS])
        if worst > outcome.worst:
            outcome.worst, outcome.worst_at = worst, self.weight_index(counts[kernels.WORST_AT])
        self._report_bound(outcome, promise, counts, worst)

    def _report_bound(
        self, outcome: TensorResult, promise: Tolerance, counts: np.ndarray, worst: float
    ) -> None:
        prefix = "expert" if outcome.what == "expert" else "module"
        if counts[kernels.BAD_NUMBER]:
            group = int(counts[kernels.FIRST_BAD_NUMBER]) // self.size
            outcome.fault(
                "nan-or-inf",
                self.weight_index(group * self.size),
                f"scale {self.scales[group]}, bias {self.biases[group]}",
                "numbers",
            )
        if promise.zeros and counts[kernels.LOST_ZEROS] and prefix == "expert":
            start = int(counts[kernels.FIRST_LOST])
            at = start + int(np.argmax((self.values == 0)[start : start + self.size]))
            outcome.fault("zeros-lost", self.weight_index(at), f"{self._decoded(at):.4g}", "0")
        if promise.nearest and counts[kernels.NOT_NEAREST]:
            at = self._farthest(int(counts[kernels.FIRST_NOT_NEAREST]))
            name = "expert-level-wrong" if prefix == "expert" else "module-differs"
            outcome.fault(
                name,
                self.weight_index(at),
                f"level {self.levels[at]} = {self._decoded(at):.4g}",
                f"the level nearest {self.values[at]:.4g}",
            )
        if worst > promise.steps * 1.001:
            at = self._farthest(int(counts[kernels.WORST_AT]))
            name = "expert-beyond-bound" if prefix == "expert" else "module-differs"
            outcome.fault(
                name,
                self.weight_index(at),
                f"{self._decoded(at):.4g}, off by {worst:.2f} steps",
                f"{self.values[at]:.4g} within {promise.steps:g}",
            )

    def _decoded(self, at: int) -> float:
        group = at // self.size
        return float(self.levels[at] * self.scales[group] + self.biases[group])

    def _farthest(self, start: int) -> int:
        """The weight of a group that is farthest from the source."""
        group = slice(start, start + self.size)
        at = start // self.size
        decoded = self.levels[group] * self.scales[at] + self.biases[at]
        return start + int(np.argmax(np.abs(decoded - self.values[group])))

    def formula(self, outcome: TensorResult) -> None:
        """Compare with MLX's formula; what differs is judged over the whole bundle, later."""
        counts = kernels.formula(
            self.values, self.levels, self.scales, self.biases, self.bits, *self.rounding, self.size
        )
        outcome.groups += len(self.scales)
        outcome.exact += int(counts[kernels.EXACT])
        outcome.fragile += int(counts[kernels.FRAGILE])
        outcome.explained += int(counts[kernels.EXPLAINED])
        outcome.wrong += int(counts[kernels.WRONG])
        for places, first in (
            (outcome.wrong_places, kernels.FIRST_WRONG),
            (outcome.explained_places, kernels.FIRST_EXPLAINED),
        ):
            if counts[first] != kernels.NONE and not places:
                places.append(self._difference(int(counts[first])))

    def _difference(self, group: int) -> tuple[str, str, str]:
        """(where, found, expected) of a group that is not what the formula gives."""
        span = slice(self.size * group, self.size * (group + 1))
        scale, bias, levels = kernels.expected_group(self.values[span], self.bits)
        where = self.weight_index(self.size * group)
        dtype = self.task.parts["scales"].dtype
        for part, given, value in (
            ("scale", self.scales[group], scale),
            ("bias", self.biases[group], bias),
        ):
            wanted = as_float32(round_to_dtype(np.array([value], np.float32), dtype), dtype)[0]
            if given != wanted:
                return where, f"{part} {given:.6g}", f"{part} {wanted:.6g}"
        column = int(np.argmax(levels != self.levels[span]))
        found = f"level {self.levels[span][column]} in its column {column}"
        return where, found, f"level {levels[column]}"

    def recompute(
        self, outcome: TensorResult, quantizer: Quantizer, importance: np.ndarray | None
    ) -> None:
        """Quantize the source rows again and compare bytes; importance: of the columns, usable."""
        parts = {part: np.empty(len(data), np.uint8) for part, data in self.stored.items()}
        outcome.recomputed = True
        outcome.groups += len(self.scales)
        try:
            quantizer.encode(self.codes, self.exponents, parts, importance)
        except BadGroup as bad:
            outcome.fault(
                "source-broken", self.weight_index(bad.group * GROUP), bad.found, bad.expected
            )
            return
        wrong = np.zeros(len(self.scales), bool)
        for part, data in self.stored.items():
            if not np.array_equal(parts[part], data):
                odd = (parts[part] != data).reshape(len(self.scales), -1).any(axis=1)
                if not wrong.any():
                    outcome.wrong_places.append(
                        self._first_difference(part, int(np.argmax(odd)), parts[part])
                    )
                wrong |= odd
        outcome.wrong += int(wrong.sum())
        outcome.exact += int((~wrong).sum())

    def _first_difference(self, part: str, group: int, right: np.ndarray) -> tuple[str, str, str]:
        """(where, found, expected) of a group whose `part` differs from the recomputed one."""
        where = self.weight_index(group * self.size)
        if part != "weight":
            dtype = self.task.parts[part].dtype
            values = [as_float32(data, dtype)[group] for data in (self.stored[part], right)]
            return where, f"{part} {values[0]:.6g}", f"{part} {values[1]:.6g}"
        levels = np.empty_like(self.levels)
        kernels.unpack(right, self.bits, levels)
        span = slice(group * self.size, (group + 1) * self.size)
        column = int(np.argmax(levels[span] != self.levels[span]))
        found = f"level {self.levels[span][column]} in its column {column}"
        return where, found, f"level {levels[span][column]}"


def compare_copies(task: Task, reader: TensorReader, outcome: TensorResult) -> None:
    """Codes and exponents kept as they are, FP4's or FP8's: every byte is the source's."""
    fp8 = task.label["mode"] == "mxfp8"
    outcome.numbers = task.origin.nbytes * (1 if fp8 else 2)
    outcome.groups = task.parts["scales"].nbytes
    outcome.recomputed = True
    wrong = 0
    for part, tensor in task.parts.items():
        before, infinite = wrong, False
        row_bytes = tensor.nbytes // tensor.shape[0]
        rows = max(1, COPY_BYTES // row_bytes)
        for first in range(0, tensor.shape[0], rows):
            last = min(first + rows, tensor.shape[0])
            found = reader.rows(tensor, first, last)
            expected = copied_rows(task, part, reader, first, last)
            odd = np.flatnonzero(found != expected)
            if len(odd) and wrong == before:
                row, byte = divmod(int(odd[0]), row_bytes)
                in_group = GROUP * task.label["bits"] // 8 if part == "weight" else 1
                where = f"row {first + row}, group {byte // in_group}"
                if fp8:
                    where = f"row {first + row}, {'column' if part == 'weight' else 'group'} {byte}"
                outcome.wrong_places.append(
                    (where, f"{part} byte {found[odd[0]]:#04x}", f"{expected[odd[0]]:#04x}")
                )
            wrong += len(odd)
            nan = found == 255 if part == "scales" else (found & 127) == 127
            infinite |= (fp8 or part == "scales") and bool(nan.any())
        if infinite:
            what = ("exponent 255", "0 to 254") if part == "scales" else ("NaN", "numbers")
            outcome.fault("nan-or-inf", part, *what)
    outcome.wrong = min(wrong, outcome.groups)
    outcome.exact = outcome.lossless = outcome.groups - outcome.wrong


def copied_rows(task: Task, part: str, reader: TensorReader, first: int, last: int) -> np.ndarray:
    """What some rows of a part are where the source's codes and scales were kept: bytes."""
    if part == "weight" or task.label["mode"] == "mxfp4":
        return reader.rows(task.origin if part == "weight" else task.scale, first, last)
    blocks = reader.read(task.scale).reshape(task.scale.shape)
    rows = np.arange(first, last) // BLOCK
    columns = np.arange(task.origin.shape[1] // GROUP) * GROUP // BLOCK
    return blocks[rows[:, None], columns[None, :]].reshape(-1)


def compare_plain(
    task: Task, reader: TensorReader, outcome: TensorResult, exact: bool = False
) -> None:
    """Controls, integers and passthrough: the source in the bundle's dtype, byte for byte.

    exact: not even the rounding to that dtype may change a value.
    """
    tensor, origin = task.parts["weight"], task.origin
    size = ITEMSIZE[tensor.dtype]
    outcome.numbers = tensor.nbytes // size
    same = origin.dtype == tensor.dtype and task.scale is None
    decoded = task.scale is not None or origin.dtype in FLOATS
    integers = tensor.dtype[0] in "IU" and origin.dtype[0] in "IU"
    comparable = same or (tensor.dtype in FLOATS and decoded) or integers
    step = PIECE_NUMBERS
    if task.scale is not None:  # decoded by whole rows
        step = max(1, step // task.columns) * task.columns
    seen: set[str] = set()  # of each kind of fault the first place is enough
    for first in range(0, outcome.numbers, step):
        count = min(step, outcome.numbers - first)
        found = reader.read(tensor, first * size, count * size)
        if tensor.dtype in FLOATS and "nan" not in seen:
            bad = np.flatnonzero(~np.isfinite(as_float32(found, tensor.dtype)))
            if len(bad):
                seen.add("nan")
                where = element_index(tensor, first + int(bad[0]))
                outcome.fault("nan-or-inf", where, "NaN or Inf", "numbers")
        if not comparable or "odd" in seen:
            continue  # reported by its dtype, or already
        expected, given = unquantized_source(task, reader, first, count)
        if given is not None:
            missed = as_float32(expected, tensor.dtype)
            missed -= given
            outcome.energy += float(np.dot(given, given))
            outcome.error += float(np.dot(missed, missed))
        if exact and given is not None and task.scale is None and "lossy" not in seen:
            lost = np.flatnonzero(as_float32(expected, tensor.dtype) != given)
            if len(lost):
                seen.add("lossy")
                where = element_index(tensor, first + int(lost[0]))
                outcome.fault("rounded", where, tensor.dtype, f"{given[lost[0]]:.8g}")
        odd = np.flatnonzero(found != expected)
        if len(odd) and task.scale is not None:  # by value: FP4 has a zero of either sign
            values = (as_float32(data, tensor.dtype) for data in (found, expected))
            odd = size * np.flatnonzero(np.not_equal(*values))
        if len(odd):
            seen.add("odd")
            report_plain_mismatch(task, outcome, first, int(odd[0]) // size, (found, expected))


def report_plain_mismatch(
    task: Task, outcome: TensorResult, first: int, at: int, both: tuple[np.ndarray, np.ndarray]
) -> None:
    """Report element `at` of a slice that begins at element `first`: found and expected bytes."""
    tensor = task.parts["weight"]
    name = {"control": "control-differs", "module": "module-differs"}
    shown = [format_element(data, tensor.dtype, at) for data in both]
    where = element_index(tensor, first + at)
    outcome.fault(name.get(task.what, "passthrough-differs"), where, *shown)


def unquantized_source(
    task: Task, reader: TensorReader, first: int, count: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """`count` elements of the source from element `first`: as bytes of the bundle's dtype, and as
    float32 where that dtype is another than the source's.

    Where there is a scale they are whole rows.
    """
    origin, dtype = task.origin, task.parts["weight"].dtype
    if task.scale is not None:
        row = first // task.columns
        values = source_rows(task, reader, row, row + count // task.columns)[2]
        return round_to_dtype(values, dtype), values
    size = ITEMSIZE[origin.dtype]
    data = reader.read(origin, first * size, count * size)
    if origin.dtype == dtype:
        return data, None
    if origin.dtype not in FLOATS:  # integers, kept in fewer bytes
        return data.view(NUMPY_DTYPE[origin.dtype]).astype(NUMPY_DTYPE[dtype]).view(np.uint8), None
    values = as_float32(data, origin.dtype)
    return round_to_dtype(values, dtype), values


# --- Without a source ---------------------------------------------------------------------------


def scan_values(bundle: Scan, tensor: Tensor, reader: TensorReader) -> TensorResult:
    """Without a source: NaN and Inf, and experts that are nothing but zeros."""
    expert = parse_expert(tensor.name)
    what = "expert" if expert else "tensor"
    outcome = TensorResult(tensor.name, what, tensor.dtype)
    outcome.numbers = tensor.nbytes // ITEMSIZE[tensor.dtype]
    zero, step = True, PIECE_BYTES
    for first in range(0, tensor.nbytes, step):
        data = reader.read(tensor, first, min(step, tensor.nbytes - first))
        zero = zero and not data.any()
        if tensor.dtype in FLOATS:
            bad = np.flatnonzero(~np.isfinite(as_float32(data, tensor.dtype)))
            if len(bad):
                at = first // ITEMSIZE[tensor.dtype] + int(bad[0])
                outcome.fault("nan-or-inf", element_index(tensor, at), "NaN or Inf", "numbers")
                break
        if expert and expert[4] == "scales" and tensor.dtype == "U8" and (data == 255).any():
            outcome.fault("nan-or-inf", "scales", "exponent 255", "0 to 254")
    if zero and expert:
        outcome.fault("experts-zero", "whole tensor", "nothing but zero bytes", "weights")
    return outcome
