"""A folder of safetensors shards with an index and a config: the source and the bundle alike.

Opening one reads JSON and headers only (seconds for 180 GB) and checks that index and shards agree,
so that everything after it can trust a name to lead to its bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv4.fp4 import GROUP
from dsv4.names import expert_base, parse_expert
from dsv4.shard import Shard, Tensor, read_shard
from dsv4.stop import Stop

INDEX = "model.safetensors.index.json"
MODEL_TYPE = "deepseek_v4"


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: config.json, the index's weight_map, and every shard's header."""

    folder: Path
    config: dict[str, Any]
    weight_map: dict[str, str]
    shards: dict[str, Shard]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, over all shards."""
        return {n: t for shard in self.shards.values() for n, t in shard.tensors.items()}

    @property
    def nbytes(self) -> int:
        """The size of all shards on disk, in bytes."""
        return sum(shard.size for shard in self.shards.values())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises Stop when the file is missing, not JSON, or no object."""
    if not path.is_file():
        raise Stop(f"{path}", "no such file", "a JSON file", "check the folder")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Stop(f"{path}", f"no valid JSON ({error})", "JSON", "restore this file") from error
    if not isinstance(value, dict):
        raise Stop(f"{path}", f"a {type(value).__name__}", "a JSON object", "restore this file")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises Stop unless its model_type is deepseek_v4."""
    if not folder.is_dir():
        raise Stop(f"{folder}", "no such folder", "a checkpoint", "check SOURCE and BUNDLE")
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise Stop(
            f"{folder / 'config.json'}",
            f"model_type {config.get('model_type')!r}",
            f"{MODEL_TYPE!r}",
            "this recipe knows no other model",
        )
    return config


def count(config: dict[str, Any], key: str, folder: Path) -> int:
    """A count from config.json. Raises Stop when it is missing or no whole number."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Stop(
            f"{folder / 'config.json'}: {key}", repr(value), "a whole number", "restore config.json"
        )
    return value


def read_index(folder: Path) -> dict[str, str]:
    """Read the index's weight_map. Raises Stop when an entry leads out of the folder."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Stop(f"{path}", "no weight_map", "tensor names and their shards", "restore the index")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or "\0" in file:
            raise Stop(
                f"{path}: {name}",
                f"the file {file!r}",
                "a file name inside the folder",
                "do not use this checkpoint",
            )
    return weight_map


def open_source(folder: Path) -> Checkpoint:
    """Open the FP4/FP8 source and check it whole: index ↔ shards, weight ↔ scale, every expert.

    Raises Stop for a missing shard, a tensor that index or shard lacks, a shard that the index does
    not know (upstream's converter would read it), a missing expert, weight or scale.
    """
    config = read_config(folder)
    weight_map = read_index(folder)
    shards = _open_shards(folder, set(weight_map.values()))
    source = Checkpoint(folder, config, weight_map, shards)
    check_index(source, "download")
    check_strangers(source, "move it away: the converter reads every shard that it finds")
    _check_scales(source)
    check_experts(source, ("weight", "scale"))
    return source


def open_bundle(folder: Path) -> Checkpoint:
    """Open a bundle: every shard that its index names; index and shards may still disagree.

    A requantization that was killed leaves new keys in shards that the index does not name yet.
    """
    config = read_config(folder)
    weight_map = read_index(folder)
    return Checkpoint(folder, config, weight_map, _open_shards(folder, set(weight_map.values())))


def _open_shards(folder: Path, files: set[str]) -> dict[str, Shard]:
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise Stop(
            f"{folder / INDEX}",
            f"{len(missing)} of {len(files)} shards missing, first {missing[0]}",
            "every shard that the index names",
            "fetch or rebuild it",
        )
    return {file: read_shard(folder / file) for file in sorted(files)}


def check_index(checkpoint: Checkpoint, todo: str) -> None:
    """Raise Stop unless index and shards name the same tensors in the same shards."""
    index = checkpoint.folder / INDEX
    for name, file in checkpoint.weight_map.items():
        if name not in checkpoint.shards[file].tensors:
            raise Stop(f"{index}: {name}", f"no such tensor in {file}", "it there", f"{todo} again")
    for file, shard in checkpoint.shards.items():
        for name in shard.tensors:
            if checkpoint.weight_map.get(name) != file:
                raise Stop(
                    f"{checkpoint.folder / file}: {name}",
                    "no entry for it in the index",
                    f"{name} → {file}",
                    f"{todo} again",
                )


def check_strangers(checkpoint: Checkpoint, todo: str) -> None:
    """Raise Stop when the folder holds a shard that the index does not name."""
    on_disk = {path.name for path in checkpoint.folder.glob("*.safetensors")}
    strangers = sorted(n for n in on_disk - set(checkpoint.shards) if not n.startswith("."))
    if strangers:
        raise Stop(
            f"{checkpoint.folder / strangers[0]}",
            "a shard that the index does not name",
            "only the index's shards",
            todo,
        )


def _check_scales(source: Checkpoint) -> None:
    """Every FP4 and FP8 weight needs its `.scale`, every `.scale` its weight."""
    tensors = source.tensors
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        quantized = part == "weight" and tensor.dtype in ("I8", "F8_E4M3")
        partner = f"{base}.scale" if quantized else f"{base}.weight"
        if (quantized or part == "scale") and partner not in tensors:
            raise Stop(
                f"{source.folder}: {name}",
                f"no {partner}",
                "a weight and its scale",
                "fetch the source again",
            )


def expert_bases(checkpoint: Checkpoint) -> list[str]:
    """Storage names of all routed-expert matrices that config.json and the tensors call for.

    Main layers: num_hidden_layers × n_routed_experts × 3. MTP layers: as many as config.json's
    num_nextn_predict_layers or the tensors' own names say, whichever is more.
    """
    config, folder = checkpoint.config, checkpoint.folder
    experts = count(config, "n_routed_experts", folder)
    layers = {"layers": count(config, "num_hidden_layers", folder), "mtp": 0}
    if "num_nextn_predict_layers" in config:
        layers["mtp"] = count(config, "num_nextn_predict_layers", folder)
    for name in checkpoint.tensors:
        parsed = parse_expert(name)
        if parsed and parsed[0] == "mtp":
            layers["mtp"] = max(layers["mtp"], parsed[1] + 1)
    return [
        expert_base(block, layer, expert, matrix)
        for block, n in layers.items()
        for layer in range(n)
        for expert in range(experts)
        for matrix in ("w1", "w2", "w3")
    ]


def check_experts(checkpoint: Checkpoint, parts: tuple[str, ...]) -> None:
    """Raise Stop when a routed expert lacks one of `parts`, or when one is there that should not.

    For parts ("weight", "scale") dtypes and shapes of the FP4 source are checked too.
    """
    bases = expert_bases(checkpoint)
    tensors = checkpoint.tensors
    expected = {f"{base}.{part}" for base in bases for part in parts}
    missing = [name for name in sorted(expected) if name not in tensors]
    if missing:
        raise Stop(
            f"{checkpoint.folder}",
            f"no {missing[0]} ({len(missing):,} tensors missing)",
            f"{len(expected):,} routed-expert tensors",
            "fetch or rebuild it",
        )
    known = set(bases)
    extra = [n for n in tensors if parse_expert(n) and n.rpartition(".")[0] not in known]
    if extra:
        raise Stop(
            f"{checkpoint.folder}: {extra[0]}",
            "an expert beyond config.json's counts",
            f"{len(bases):,} matrices",
            "restore config.json",
        )
    if parts == ("weight", "scale"):
        for base in bases:
            _check_fp4(checkpoint.folder, tensors[f"{base}.weight"], tensors[f"{base}.scale"])


def _check_fp4(folder: Path, weight: Tensor, scale: Tensor) -> None:
    if weight.dtype != "I8" or len(weight.shape) != 2:
        raise Stop(
            f"{folder}: {weight.name}",
            f"{weight.dtype} {list(weight.shape)}",
            "I8 (out, in/2): FP4 codes",
            "use the FP4 release",
        )
    out, half = weight.shape
    expected = (out, half * 2 // GROUP)
    if scale.dtype not in ("F8_E8M0", "U8") or scale.shape != expected or half * 2 % GROUP:
        raise Stop(
            f"{folder}: {scale.name}",
            f"{scale.dtype} {list(scale.shape)}",
            f"F8_E8M0 {list(expected)}",
            "fetch the source again",
        )
