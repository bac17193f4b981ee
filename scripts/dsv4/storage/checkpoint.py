"""Read a folder of safetensors shards with an index and a config.json: a source or a bundle.

Only JSON and headers are read: seconds for 180 GB. Nothing here depends on the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.storage import json_types, limits
from dsv4.storage.json_types import OBJECT, Form
from dsv4.storage.safetensors_file import Shard, Tensor, read_shard
from dsv4.text import escape_line, short_repr

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"  # the shard of a checkpoint that has no index
SIDECAR = "jangtq_runtime.safetensors"  # no shard: TurboQuant data for vMLX in Swift


class MissingShards(UserError):
    """Shards that the index names are not in the folder."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: config.json, the index's weight_map, and every shard's header.

    left_out: the beginning of names that `tensors` leaves out; "" for none.
    """

    folder: Path
    config: dict[str, Any]
    weight_map: dict[str, str]
    shards: dict[str, Shard]
    left_out: str = field(default="", kw_only=True)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of all shards by name."""
        found = {n: t for shard in self.shards.values() for n, t in shard.tensors.items()}
        hidden = self.left_out
        return {n: t for n, t in found.items() if not n.startswith(hidden)} if hidden else found

    @property
    def nbytes(self) -> int:
        """The size of all shards on disk, in bytes."""
        return sum(shard.size for shard in self.shards.values())


def read_json(path: Path, form: Form = OBJECT) -> dict[str, Any]:
    """Read a JSON object and validate it (see json_types.py).

    Raises UserError when the file is missing, larger than limits.DOCUMENT, a Git LFS pointer, not
    JSON, or of other types.
    """
    if not path.is_file():
        raise UserError(f"{path}", "no such file", "a JSON file", "check the folder")
    return parse_json(limits.read_bounded(path), f"{path}", form)


def parse_json(data: bytes, where: str, form: Form = OBJECT) -> dict[str, Any]:
    """Parse a JSON object. Raises UserError as `read_json` does."""
    todo = "restore this file"
    limits.check_json_size(data, where)
    try:
        value = json.loads(data.decode("utf-8"))
        limits.check_surrogates(data, value)
        deep = not limits.is_shallow(value)
    except (ValueError, RecursionError) as error:
        limits.check_lfs_pointer(data, where)
        raise UserError(where, f"no valid JSON ({error})", "JSON", todo) from error
    if deep:
        raise UserError(where, f"lists and objects more than {limits.DEPTH} deep", "fewer", todo)
    return json_types.validate(where, value, form, todo)


def read_index(folder: Path) -> dict[str, str]:
    """Read the index's weight_map. Raises UserError when an entry leads out of the folder."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{path}", "no weight_map", "tensor names and their shards", "restore the index"
        )
    for name, file in weight_map.items():
        if not is_file_name(file):
            raise UserError(
                f"{path}: {escape_line(name)}",
                f"the file {short_repr(file)}",
                "a file name inside the folder",
                "do not use this checkpoint",
            )
    return weight_map


def is_file_name(file: Any) -> bool:
    """Return True for a file name without a folder."""
    if not isinstance(file, str) or not 0 < len(file.encode()) <= 255:
        return False
    return Path(file).name == file and "\\" not in file and "\0" not in file


def open_shards(folder: Path, files: set[str]) -> dict[str, Shard]:
    """Read the headers of these shards. Raises UserError when one is missing or broken."""
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise MissingShards(
            f"{folder / INDEX}",
            f"{len(missing)} of {len(files)} shards missing, first {missing[0]}",
            "every shard that the index names",
            "fetch or rebuild it",
        )
    return {file: read_shard(folder / file) for file in sorted(files)}


def check_index(checkpoint: Checkpoint, todo: str) -> None:
    """Raise UserError unless index and shards name the same tensors in the same shards."""
    index = checkpoint.folder / INDEX
    for name, file in checkpoint.weight_map.items():
        if name not in checkpoint.shards[file].tensors:
            raise UserError(
                f"{index}: {name}", f"no such tensor in {file}", "it there", f"{todo} again"
            )
    for file, shard in checkpoint.shards.items():
        for name in shard.tensors:
            if checkpoint.weight_map.get(name) != file:
                raise UserError(
                    f"{checkpoint.folder / file}: {name}",
                    "no entry for it in the index",
                    f"{name} → {file}",
                    f"{todo} again",
                )


def unindexed_shards(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the shards in the folder that the index does not name."""
    on_disk = {path.name for path in checkpoint.folder.glob("*.safetensors")}
    known = {*checkpoint.shards, SIDECAR}
    return sorted(n for n in on_disk - known if not n.startswith("."))


def check_strangers(checkpoint: Checkpoint, todo: str) -> None:
    """Raise UserError when the folder holds a shard that the index does not name."""
    if strangers := unindexed_shards(checkpoint):
        raise UserError(
            f"{checkpoint.folder / strangers[0]}",
            "a shard that the index does not name",
            "only the index's shards",
            todo,
        )
