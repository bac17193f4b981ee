"""Make the pieces of a unit's tensors according to its treatment."""

from __future__ import annotations

from dsv4.conversion.expert_pieces import ErrorLog, experts_pieces
from dsv4.conversion.lossless import fp8_pieces
from dsv4.model.bundle_tensors import ConversionUnit
from dsv4.quantization import mlx_affine
from dsv4.quantization.formats import Quantizer
from dsv4.quantization.source_reader import copy_tensor_pieces
from dsv4.storage.shard_writer import Piece


def make_pieces(
    unit: ConversionUnit, places: dict[str, int], quantizer: Quantizer, ledger: ErrorLog
) -> list[Piece]:
    """Return the pieces of the unit's tensors in a shard. places: tensor name → offset."""
    weight = unit.weight
    mine = {slot.name: places[slot.name] for slot in unit.slots if slot.name in places}
    parts = {name.rpartition(".")[2]: place for name, place in mine.items()}
    if unit.treatment == "expert":
        return list(experts_pieces(unit, parts, quantizer, ledger))
    if unit.treatment == "fp8":
        return list(fp8_pieces(weight, unit.scale, parts, ledger))
    if len(unit.slots) > 1:
        return list(mlx_affine.matrix_pieces(weight, unit.scale, parts))
    place = mine[weight.name]
    if unit.slots[0].dtype == weight.dtype:
        return list(copy_tensor_pieces(weight, place))
    return list(mlx_affine.f16_pieces(weight, place, exact=quantizer.form.as_source))
