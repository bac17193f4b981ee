"""Decode one block of rows of an affine module and compare it with its source.

`check_bounds` holds every weight to the quantizer's promises, `check_size` every group to what any
affine quantizer leaves. `check_bytes` compares the bytes with those that the recorded quantizer
gives; `check_formula`, without a record, with MLX's formula.
"""

from __future__ import annotations

import numpy as np

from dsv4.model.names import GROUP
from dsv4.quantization.affine_table import BadGroup
from dsv4.quantization.formats import Quantizer
from dsv4.storage.tensor_reader import TensorReader, as_float32, round_to_dtype
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.decode import source_rows
from dsv4.verification.numbers.range_errors import range_errors
from dsv4.verification.numbers.tasks import Task, TensorResult
from dsv4.verification.numbers.tolerances import SIZE_BOUNDS, Promises


class AffineBlock:
    """Rows `first` to `last` - 1 of an affine module: source values, levels, scales and biases."""

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

    def check_source(self, result: TensorResult) -> bool:
        """Report a source that holds NaN; return False for one."""
        expert = self.task.what == "expert"  # FP4 has no NaN but its exponent's
        if (self.exponents == 255).any() or not (expert or np.isfinite(self.values).all()):
            result.add_fault("source-broken", f"rows from {self.first}", "NaN", "numbers")
            return False
        return True

    def weight_index(self, weight: int) -> str:
        """Return the row, group and column of the weight with this index in the block."""
        row, column = divmod(int(weight), self.columns)
        return f"row {self.first + row}, group {column // self.size}, column {column}"

    def check_bounds(self, result: TensorResult, promises: Promises) -> None:
        """Compare every decoded weight with the source, and report broken promises."""
        counts, energy, error, worst = kernels.check_bounds(
            self.values, self.levels, self.scales, self.biases, self.bits, *self.rounding, self.size
        )
        result.numbers += len(self.values)
        result.energy += energy
        result.error += error
        result.zeros += int(counts[kernels.ZEROS])
        result.zeros_lost += int(counts[kernels.LOST_ZEROS])
        result.lossless += int(counts[kernels.EXACT_GROUPS])
        if worst > result.worst:
            result.worst, result.worst_at = worst, self.weight_index(counts[kernels.WORST_AT])
        self._report_bounds(result, promises, counts, worst)

    def _report_bounds(
        self, result: TensorResult, promises: Promises, counts: np.ndarray, worst: float
    ) -> None:
        expert = result.what == "expert"
        if counts[kernels.BAD_NUMBER]:
            group = int(counts[kernels.FIRST_BAD_NUMBER]) // self.size
            found = f"scale {self.scales[group]}, bias {self.biases[group]}"
            where = self.weight_index(group * self.size)
            result.add_fault("nan-or-inf", where, found, "numbers")
        if promises.zeros and counts[kernels.LOST_ZEROS] and expert:
            start = int(counts[kernels.FIRST_LOST])
            at = start + int(np.argmax((self.values == 0)[start : start + self.size]))
            result.add_promised(
                "zeros-lost", self.weight_index(at), f"{self._decoded(at):.4g}", "0"
            )
        if promises.nearest and counts[kernels.NOT_NEAREST]:
            at = self._farthest(int(counts[kernels.FIRST_NOT_NEAREST]))
            name = "expert-level-wrong" if expert else "module-differs"
            found = f"level {self.levels[at]} = {self._decoded(at):.4g}"
            expected = f"the level nearest {self.values[at]:.4g}"
            result.add_promised(name, self.weight_index(at), found, expected)
        if worst > promises.steps * 1.001:
            at = self._farthest(int(counts[kernels.WORST_AT]))
            name = "expert-beyond-bound" if expert else "module-differs"
            found = f"{self._decoded(at):.4g}, off by {worst:.2f} steps"
            expected = f"{self.values[at]:.4g} within {promises.steps:g}"
            result.add_promised(name, self.weight_index(at), found, expected)

    def check_size(self, result: TensorResult) -> None:
        """Add the errors' size in steps of the source's range; report the first group beyond it."""
        found = range_errors(
            self.values, self.levels, self.scales, self.biases, self.bits, self.size, self.columns
        )
        result.steps += found.squares
        result.measured += len(self.scales)
        given, made, both = result.products
        result.products = given + found.given, made + found.made, both + found.both
        bound = SIZE_BOUNDS[self.bits].group
        if found.worst > bound:
            name = "expert-beyond-bound" if result.what == "expert" else "module-differs"
            where = self.weight_index(found.worst_at * self.size)
            error = f"a group's RMS error of {found.worst:.2f} steps of its range"
            result.add_fault(name, where, error, f"at most {bound:.2f} for {self.bits} bits")

    def _decoded(self, at: int) -> float:
        group = at // self.size
        return float(self.levels[at] * self.scales[group] + self.biases[group])

    def _farthest(self, start: int) -> int:
        """Return the index of the weight farthest from the source, in the group from `start` on."""
        group = slice(start, start + self.size)
        at = start // self.size
        decoded = self.levels[group] * self.scales[at] + self.biases[at]
        return start + int(np.argmax(np.abs(decoded - self.values[group])))

    def check_formula(self, result: TensorResult) -> None:
        """Compare with MLX's formula; `aggregate.report_groups` decides about differences."""
        counts = kernels.check_formula(
            self.values, self.levels, self.scales, self.biases, self.bits, *self.rounding, self.size
        )
        result.groups += len(self.scales)
        result.exact += int(counts[kernels.EXACT])
        result.fragile += int(counts[kernels.FRAGILE])
        result.explained += int(counts[kernels.EXPLAINED])
        result.wrong += int(counts[kernels.WRONG])
        for places, first in (
            (result.wrong_places, kernels.FIRST_WRONG),
            (result.explained_places, kernels.FIRST_EXPLAINED),
        ):
            if counts[first] != kernels.NONE and not places:
                places.append(self._difference(int(counts[first])))

    def _difference(self, group: int) -> tuple[str, str, str]:
        """Return (where, found, expected) of a group that differs from MLX's formula."""
        span = slice(self.size * group, self.size * (group + 1))
        *numbers, levels = kernels.expected_group(self.values[span], self.bits)
        dtype = self.task.parts["scales"].dtype
        rounded = as_float32(round_to_dtype(np.array(numbers, np.float32), dtype), dtype)
        found = self.scales[group], self.biases[group]
        for part, value, expected in zip(("scale", "bias"), found, rounded, strict=True):
            if value != expected:
                where = self.weight_index(self.size * group)
                return where, f"{part} {value:.6g}", f"{part} {expected:.6g}"
        return self._level_difference(group, levels)

    def _level_difference(self, group: int, levels: np.ndarray) -> tuple[str, str, str]:
        """Return (where, found, expected) of a group whose levels should be `levels`."""
        stored = self.levels[self.size * group : self.size * (group + 1)]
        column = int(np.argmax(levels != stored))
        found = f"level {stored[column]} in its column {column}"
        return self.weight_index(self.size * group), found, f"level {levels[column]}"

    def check_bytes(
        self, result: TensorResult, quantizer: Quantizer, importance: np.ndarray | None
    ) -> None:
        """Quantize the source rows again and compare bytes.

        importance: of the columns, normalized; None without an imatrix.
        """
        parts = {part: np.empty(len(data), np.uint8) for part, data in self.stored.items()}
        result.recomputed = True
        result.groups += len(self.scales)
        try:
            quantizer.encode(self.codes, self.exponents, parts, importance)
        except BadGroup as bad:
            where = self.weight_index(bad.group * GROUP)
            result.add_fault("source-broken", where, bad.found, bad.expected)
            return
        wrong = np.zeros(len(self.scales), bool)
        for part, data in self.stored.items():
            if not np.array_equal(parts[part], data):
                differing = (parts[part] != data).reshape(len(self.scales), -1).any(axis=1)
                if not wrong.any():
                    group = int(np.argmax(differing))
                    result.wrong_places.append(self._byte_difference(part, group, parts[part]))
                wrong |= differing
        result.wrong += int(wrong.sum())
        result.exact += int((~wrong).sum())

    def _byte_difference(self, part: str, group: int, right: np.ndarray) -> tuple[str, str, str]:
        """Return (where, found, expected) of a group whose `part` differs from `right`."""
        if part != "weight":
            where = self.weight_index(group * self.size)
            dtype = self.task.parts[part].dtype
            values = [as_float32(data, dtype)[group] for data in (self.stored[part], right)]
            return where, f"{part} {values[0]:.6g}", f"{part} {values[1]:.6g}"
        levels = np.empty_like(self.levels)
        kernels.unpack(right, self.bits, levels)
        return self._level_difference(group, levels[group * self.size : (group + 1) * self.size])
