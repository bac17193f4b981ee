"""Compare one tensor of the bundle with the source, by what it is and how it is stored.

| tensor                     | compared with                                     | module        |
|----------------------------|---------------------------------------------------|---------------|
| routed expert, affine      | FP4 source: its quantizer's own bytes, and bounds | affine        |
| affine module              | FP8 or BF16 source: bounds, and MLX's formula     | affine        |
| mxfp4 of FP4, mxfp8 of FP8 | the source's codes and scales; other tools' codes | copies,       |
|                            | by their values                                   | float_formats |
| other mxfp4, mxfp8, nvfp4  | the nearest code, the greatest not cut off        | float_formats |
| TurboQuant                 | the rotated source: the nearest level, the norm   | turboquant    |
| control tensors, integers  | the source's bytes                                | unquantized   |
| norms, router, ape         | the source rounded to the bundle's dtype (F16)    | unquantized   |
"""

from __future__ import annotations

from typing import Any

from dsv4.model import mtp
from dsv4.model.labels import SOURCE, TURBO
from dsv4.model.names import stack_of
from dsv4.model.quantizer_table import is_quantizer, quantizer_properties
from dsv4.quantization.formats import Quantizer, get_quantizer
from dsv4.quantization.imatrix import EVEN, Importance
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.checks.headers import quantizer_of
from dsv4.verification.checks.stored_formats import label_at
from dsv4.verification.numbers.affine import AffineComparer
from dsv4.verification.numbers.copies import compare_copies
from dsv4.verification.numbers.float_formats import compare_floats, is_exact
from dsv4.verification.numbers.tasks import Task, TensorResult
from dsv4.verification.numbers.turboquant import compare_turbo
from dsv4.verification.numbers.unquantized import compare_unquantized
from dsv4.verification.scan import Scan

BLOCK_WEIGHTS = 1 << 17  # weights in a block of rows: 512 KB decoded, which a core's cache holds


class Comparer:
    """Compares tasks, in any thread; makes the quantizer's table once.

    importance: of the imatrix that the user named, if any.
    """

    def __init__(self, bundle: Scan, importance: Importance = EVEN) -> None:
        metadata = quantizer_of(bundle)
        self.recorded = metadata.get("requantize_quantizer")
        self.quantizer: Quantizer | None = None
        if is_quantizer(self.recorded):
            stacks, choice = labels_by_stack(bundle), mtp.choice_of(metadata["requantize_table"])
            quantizer = get_quantizer(self.recorded, importance, stacks, choice)
            # Another digest: another MLX's table, or an imatrix that was not given.
            if quantizer.digest == metadata.get("requantize_table"):
                self.quantizer = quantizer
        self._affine = AffineComparer(self.recorded, self.quantizer)
        self._exact_mtp = mtp.choice_of(metadata.get("requantize_table")) == mtp.SOURCE

    def compare(self, task: Task, reader: TensorReader) -> TensorResult:
        """Compare one tensor with its source."""
        how = f"{task.label['mode']} {task.label['bits']}-bit" if task.label else ""
        result = TensorResult(task.origin.name, task.what, how or task.main.dtype)
        disk = task.main.disk.partition("[")[0].removesuffix(".weight")
        result.disk = disk if disk != task.base else ""
        properties = quantizer_properties(self.recorded)
        as_in_source = self._exact_mtp and mtp.is_mtp(task.base)
        lossless = properties.keeps_source or as_in_source
        mixed = task.what == "expert" and properties.mixed and not as_in_source
        if lossless and not mixed and task.label and task.label["mode"] == "affine":
            result.add_fault("rounded", "whole tensor", "affine", "the source's own numbers")
        if self._contradicts_record(task):
            recorded = f"{self.recorded}, as the shards' metadata records"
            result.add_fault("expert-differs", "whole tensor", how, recorded)
        if task.label is None:
            compare_unquantized(task, reader, result, lossless)
        elif task.label["mode"] == "affine":
            self._affine.compare(task, reader, result, BLOCK_WEIGHTS)
        elif task.label["mode"] == TURBO:
            compare_turbo(task, reader, result, BLOCK_WEIGHTS)
        elif task.label["mode"] != SOURCE and is_exact(task):
            compare_copies(task, reader, result)
            if result.wrong and not result.faults and self.recorded is None:
                result = TensorResult(result.name, result.what, how, disk=result.disk)
                compare_floats(task, reader, result, BLOCK_WEIGHTS)
        else:
            compare_floats(task, reader, result, BLOCK_WEIGHTS)
        return result

    def _contradicts_record(self, task: Task) -> bool:
        """Return whether only one of an expert's stored and recorded formats is TurboQuant."""
        if task.what != "expert" or task.label is None or self.quantizer is None:
            return False
        turbo = self.quantizer.form.label(task.base)["mode"] == TURBO
        return turbo != (task.label["mode"] == TURBO)


def labels_by_stack(bundle: Scan) -> dict[str, dict[str, Any]]:
    """Return stack → the label by which its first expert is stored."""
    found: dict[str, dict[str, Any]] = {}
    for base in bundle.bases:
        if (stack := stack_of(base)) not in found and (label := label_at(bundle, base)):
            found[stack] = label
    return found
