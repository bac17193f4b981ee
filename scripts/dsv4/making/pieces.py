"""Where the bytes of a unit's tensors come from: by its treatment, in pieces of any shard."""

from __future__ import annotations

from dsv4.making.experts import ErrorLog, experts_pieces
from dsv4.making.own_numbers import fp8_pieces
from dsv4.model.plan import ConversionUnit
from dsv4.storage.rewrite import Piece
from dsv4.weights import matrices
from dsv4.weights.quantizer import Quantizer
from dsv4.weights.source import copy_tensor_pieces


def make_pieces(
    unit: ConversionUnit, places: dict[str, int], quantizer: Quantizer, ledger: ErrorLog
) -> list[Piece]:
    """The pieces of those of a unit's tensors that a shard holds; `places` are by name."""
    weight = unit.weight
    mine = {slot.name: places[slot.name] for slot in unit.slots if slot.name in places}
    parts = {name.rpartition(".")[2]: place for name, place in mine.items()}
    if unit.treatment == "expert":
        return list(experts_pieces(unit, parts, quantizer, ledger))
    if unit.treatment == "fp8":
        return list(fp8_pieces(weight, unit.scale, parts, ledger))
    if len(unit.slots) > 1:
        return list(matrices.matrix_pieces(weight, unit.scale, parts))
    place = mine[weight.name]
    if unit.slots[0].dtype == weight.dtype:
        return list(copy_tensor_pieces(weight, place))
    return list(matrices.f16_pieces(weight, place, exact=quantizer.form.as_source))
