"""Read verify.json and validate it against the schema in which verify.py writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.storage.checkpoint import read_json
from dsv4.storage.json_types import validate
from dsv4.text import short_repr
from dsv4.verification.verify import FORMAT

OPTIONAL_TEXT, OPTIONAL_COUNT = (str, None), (int, None)
AGAIN = "make verify again"

CHECK = {"what": str, "number": int, "note": str, "worst": str}
PLACE = {"where": str, "found": str, "expected": str}
FINDING = {"name": str, "severity": str, "count": int, "why": str, "repair": str, "places": [PLACE]}
CELL = {
    "block": str, "layer": int, "projection": str, "tensors": int, "weights": int,
    "relative_rms": float, "worst_tensor_rms": float, "groups": int, "groups_as_expected": int,
    "zeros_lost": int,
}  # fmt: skip
OTHER = {"name": str, "what": str, "stored_as": str, "numbers": int, "relative_rms": float}
KIND = {
    "kind": str, "tensors": int, "stored_as": str, "relative_rms": float, "worst_tensor": str,
    "worst_tensor_rms": float, "groups": int, "groups_exact": int,
}  # fmt: skip
SIZES = {
    "shards": int, "tensors": int, "bundle_bytes": int, "shard_bytes": int,
    "by_kind": {str: int}, "source_shard_bytes": OPTIONAL_COUNT,
}  # fmt: skip
SOURCE = {f"{key}?": OPTIONAL_TEXT for key in ("folder", "repo", "revision", "commit")}
RESULT = {
    "format": int,
    "verdict": str,
    "time": str,
    "bundle": str,
    "source": (SOURCE, None),
    "levels": [int],
    "loader_asked": bool,
    "quantizer": {str: str},
    "layout?": str,
    "checks": [CHECK],
    "findings": [FINDING],
    "sizes": SIZES,
    "versions": {str: (str, bool, None)},
    "errors": {"experts?": [CELL], "others?": [OTHER], "kinds?": [KIND]},
    "hashes": {str: str},
}
UNREADABLE = {**RESULT, "sizes": {}}  # of a bundle that could not be opened


def read_result(path: Path) -> dict[str, Any]:
    """Return the content of verify.json. Raises UserError for another format or wrong types."""
    return validate_result(read_json(path), f"{path}")


def validate_result(result: dict[str, Any], where: str = "verify.json") -> dict[str, Any]:
    """Return `result` if it is valid. Raises UserError for another format or wrong types."""
    if type(result.get("format")) is not int or result["format"] != FORMAT:
        found = f"format {short_repr(result.get('format'))}"
        raise UserError(where, found, f"format {FORMAT}", AGAIN)
    return validate(where, result, UNREADABLE if result.get("sizes") == {} else RESULT, AGAIN)
