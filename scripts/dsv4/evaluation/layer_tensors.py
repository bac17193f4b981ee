"""Load the tensors of one layer, or those outside the layers, as MLX arrays.

A bundle's tensors are loaded as they are. A source's are loaded losslessly, as QUANTIZER=lossless
stores them: FP4 as mxfp4 and FP8 as mxfp8, which are the same bytes. A source's other tensors
become float32, so that the reference is computed in float32.

mx.load reads headers only; data is read when an array is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from dsv4.errors import UserError
from dsv4.model.bundle_tensors import ConversionUnit, StorageFormat, conversion_units
from dsv4.model.fp8_blocks import block_of
from dsv4.model.labels import MXFP4
from dsv4.model.names import GROUP
from dsv4.model.source_format import image_tensors
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Tensor

LOSSLESS = StorageFormat(MXFP4, as_source=True)
HALVES = (mx.float16, mx.bfloat16)
Arrays = dict[str, mx.array]


def layer_tensors(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    """Return the tensors of one main layer, for text. Raises UserError when there are none."""
    found = {n: t for n, t in checkpoint.tensors.items() if n.startswith(f"layers.{layer}.")}
    found = without_images(found)
    if not found:
        raise UserError(
            f"{checkpoint.folder}",
            f"no tensor layers.{layer}.*",
            "the names of jang's bundles and of the source",
            "convert it with this recipe",
        )
    return found


def end_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors outside all layers, for text: embedding, last norm, head."""
    blocks = ("layers.", "mtp.")
    return without_images({n: t for n, t in checkpoint.tensors.items() if not n.startswith(blocks)})


def without_images(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the text model: it alone is run."""
    images = image_tensors(tensors)
    return {name: tensor for name, tensor in tensors.items() if name not in images}


def load(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return unevaluated arrays by name; 8-bit floats as uint8.

    Raises UserError for a file that this MLX cannot read: before 0.32 it had no F8_E8M0.
    """
    shards = {}
    for path in {t.path for t in tensors.values()}:
        try:
            shards[path] = mx.load(str(path))
        except RuntimeError as error:
            raise UserError(
                f"{path}", f"{error}", "a file that MLX reads", "use STACK=new"
            ) from error
    return {name: shards[tensor.path][name] for name, tensor in tensors.items()}


def from_bundle(tensors: Mapping[str, Tensor], wide: bool) -> Arrays:
    """Return a bundle's arrays; wide: F16 and BF16 as float32."""
    arrays = load(tensors)
    return {name: widen(array) for name, array in arrays.items()} if wide else arrays


def from_source(tensors: Mapping[str, Tensor]) -> Arrays:
    """Return a source's arrays: packed codes with `.scales` in MLX's layout, the rest as float32.

    Raises UserError for a name, dtype or shape that has no treatment.
    """
    arrays, out = load(tensors), {}
    for unit in conversion_units(tensors, LOSSLESS):
        weight = arrays[unit.weight.name]
        if unit.scale is None:
            out[unit.weight.name] = widen(weight)
        else:
            out[unit.weight.name] = weight.view(mx.uint32)
            out[f"{unit.base}.scales"] = group_scales(unit, arrays[unit.scale.name])
    return out


def group_scales(unit: ConversionUnit, scales: mx.array) -> mx.array:
    """Return scales uint8 (rows, columns / 32); FP8's, of blocks, are repeated."""
    if scales.dtype == mx.float32:  # powers of two, by their exponents
        scales = (scales.view(mx.uint32) >> 23).astype(mx.uint8)
    if unit.treatment == "expert":
        return scales
    rows, columns = unit.weight.shape
    height, width = block_of(unit.weight.shape, unit.scale.shape)
    by_group = mx.repeat(scales, width // GROUP, axis=1)[:, : columns // GROUP]
    return mx.repeat(by_group, height, axis=0)[:rows]


def widen(array: mx.array) -> mx.array:
    """Return F16 and BF16 as float32, which is exact; other dtypes unchanged."""
    return array.astype(mx.float32) if array.dtype in HALVES else array
