"""One block of rows of an affine module, decoded and compared with its source.

`bounds` holds every weight to the quantizer's tolerance. `recompute` compares the bytes with those
that the recorded quantizer gives; `formula`, where there is no record, with MLX's formula.
"""

from __future__ import annotations

import numpy as np

from dsv4.model.names import GROUP
from dsv4.quantization.affine_table import BadGroup
from dsv4.quantization.formats import Quantizer
from dsv4.storage.tensor_reader import TensorReader, as_float32, round_to_dtype
from dsv4.verification.numbers import kernels
from dsv4.verification.numbers.decode import source_rows
from dsv4.verification.numbers.tasks import Task, TensorResult
from dsv4.verification.numbers.tolerances import Tolerance


class AffineBlock:
    """Some rows of an affine module: source values, levels, scales and biases, decoded."""

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
        """False, with a fault, when the source itself holds NaN."""
        expert = self.task.what == "expert"  # FP4 has no NaN but its exponent's
        if (self.exponents == 255).any() or not (expert or np.isfinite(self.values).all()):
            result.add_fault("source-broken", f"rows from {self.first}", "NaN", "numbers")
            return False
        return True

    def weight_index(self, weight: int) -> str:
        """Where in the tensor the weight with this index in the block lies."""
        row, column = divmod(int(weight), self.columns)
        return f"row {self.first + row}, group {column // self.size}, column {column}"

    def bounds(self, result: TensorResult, tolerance: Tolerance) -> None:
        """Hold every weight to the tolerance."""
        counts, energy, error, worst = kernels.bounds(
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
        self._report_bound(result, tolerance, counts, worst)

    def _report_bound(
        self, result: TensorResult, tolerance: Tolerance, counts: np.ndarray, worst: float
    ) -> None:
        prefix = "expert" if result.what == "expert" else "module"
        if counts[kernels.BAD_NUMBER]:
            group = int(counts[kernels.FIRST_BAD_NUMBER]) // self.size
            result.add_fault(
                "nan-or-inf",
                self.weight_index(group * self.size),
                f"scale {self.scales[group]}, bias {self.biases[group]}",
                "numbers",
            )
        if tolerance.zeros and counts[kernels.LOST_ZEROS] and prefix == "expert":
            start = int(counts[kernels.FIRST_LOST])
            at = start + int(np.argmax((self.values == 0)[start : start + self.size]))
            result.add_fault("zeros-lost", self.weight_index(at), f"{self._decoded(at):.4g}", "0")
        if tolerance.nearest and counts[kernels.NOT_NEAREST]:
            at = self._farthest(int(counts[kernels.FIRST_NOT_NEAREST]))
            name = "expert-level-wrong" if prefix == "expert" else "module-differs"
            result.add_fault(
                name,
                self.weight_index(at),
                f"level {self.levels[at]} = {self._decoded(at):.4g}",
                f"the level nearest {self.values[at]:.4g}",
            )
        if worst > tolerance.steps * 1.001:
            at = self._farthest(int(counts[kernels.WORST_AT]))
            name = "expert-beyond-bound" if prefix == "expert" else "module-differs"
            result.add_fault(
                name,
                self.weight_index(at),
                f"{self._decoded(at):.4g}, off by {worst:.2f} steps",
                f"{self.values[at]:.4g} within {tolerance.steps:g}",
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

    def formula(self, result: TensorResult) -> None:
        """Compare with MLX's formula; what differs is judged over the whole bundle, later."""
        counts = kernels.formula(
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
        self, result: TensorResult, quantizer: Quantizer, importance: np.ndarray | None
    ) -> None:
        """Quantize the source rows again and compare bytes; importance: of the columns, usable."""
        parts = {part: np.empty(len(data), np.uint8) for part, data in self.stored.items()}
        result.recomputed = True
        result.groups += len(self.scales)
        try:
            quantizer.encode(self.codes, self.exponents, parts, importance)
        except BadGroup as bad:
            result.add_fault(
                "source-broken", self.weight_index(bad.group * GROUP), bad.found, bad.expected
            )
            return
        wrong = np.zeros(len(self.scales), bool)
        for part, data in self.stored.items():
            if not np.array_equal(parts[part], data):
                odd = (parts[part] != data).reshape(len(self.scales), -1).any(axis=1)
                if not wrong.any():
                    result.wrong_places.append(
                        self._first_difference(part, int(np.argmax(odd)), parts[part])
                    )
                wrong |= odd
        result.wrong += int(wrong.sum())
        result.exact += int((~wrong).sum())

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
