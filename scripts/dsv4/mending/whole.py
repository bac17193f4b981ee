"""A bundle opened by its shards, whatever its index says, and what of it headers prove wrong."""

from __future__ import annotations

import re
from pathlib import Path

from dsv4.model import labels
from dsv4.model.names import is_control, parse_expert
from dsv4.model.opening import expert_bases, read_config
from dsv4.proof.findings import Findings
from dsv4.proof.headers import check_triple, labelled
from dsv4.stop import Stop
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_index
from dsv4.storage.shard import Tensor, read_shard


def open_whole(folder: Path) -> Checkpoint:
    """The bundle with an index made of its shards, whatever the one on disk says.

    Raises Stop for an unreadable config.json, a missing or broken shard, a tensor in two of them.
    """
    config = read_config(folder)
    shards = {file: read_shard(folder / file) for file in shard_files(folder)}
    weight_map: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in weight_map:
                raise Stop(f"{folder}: {name}", f"it in {weight_map[name]} and {file}", "one shard",
                           "delete the bundle and fetch or convert it again")  # fmt: skip
            weight_map[name] = file
    return Checkpoint(folder, config, weight_map, shards)


def shard_files(folder: Path) -> list[str]:
    """The shards that the index names, and others of their set; without an index the whole set.

    Raises Stop when one of them is not there.
    """
    on_disk = {path.name for path in folder.glob("*.safetensors") if path.name[0] != "."}
    try:
        named = set(read_index(folder).values())
        sets = set(map(set_of, named))
        files = named | {file for file in on_disk if set_of(file) in sets}
    except Stop as stop:
        sets = {set_of(file) for file in on_disk}
        if len(sets) != 1:
            raise Stop(f"{folder}", f"no index, and {len(sets)} sets of shards", "one set",
                       f"fetch {INDEX} again") from stop  # fmt: skip
        files = set(whole_set(sets.pop()))
    missing = sorted(files - on_disk)
    if missing:
        raise Stop(f"{folder}", f"{len(missing)} of {len(files)} shards missing, first "
                   f"{missing[0]}", "all of them", "fetch it again, then make repair")  # fmt: skip
    return sorted(files)


def set_of(file: str) -> tuple[str, str]:
    """The set that a shard's own name calls for: (NAME, N) of NAME-k-of-N; else (file, "")."""
    numbered = re.fullmatch(r"(.+)-[0-9]{5}-of-([0-9]{5})\.safetensors", file)
    return (numbered[1], numbered[2]) if numbered else (file, "")


def whole_set(of: tuple[str, str]) -> list[str]:
    """The names of a whole set: NAME-00001-of-N to NAME-N-of-N."""
    name, n = of
    return [f"{name}-{k:05d}-of-{n}.safetensors" for k in range(1, int(n) + 1)] if n else [name]


def parts_of(bundle: Checkpoint, base: str) -> dict[str, Tensor]:
    """A module's tensors that are there: 'weight', 'scales', 'biases'."""
    names = {part: f"{base}.{part}" for part in ("weight", "scales", "biases")}
    return {part: bundle.tensors[name] for part, name in names.items() if name in bundle.tensors}


def wrong_experts(bundle: Checkpoint) -> dict[str, str]:
    """Storage name → fault, of the routed-expert matrices that headers prove wrong.

    FP4 bytes are right where a label says mxfp4, or the bundle tells that they were meant so. In a
    bundle that requantize made, the experts of a shard without its mark are wrong too.
    """
    files = files_of_experts(bundle)
    marks = {f: bundle.shards[f].metadata.get("requantize_quantizer") for f in files}
    meant = {*marks.values(), labels.recorded_quantizer(bundle.config)}
    strangers = {f for f, mark in marks.items() if any(marks.values()) and not mark}
    wrong = {}
    for base in expert_bases(bundle):
        findings, has = Findings(), parts_of(bundle, base)
        check_triple(base, has, bundle.config, findings)
        if labels.stored_label(bundle.tensors, base) == labels.MXFP4:
            if not {"mxfp4", "lossless"} & {*meant, labelled(bundle.config, base).get("mode")}:
                wrong[base] = "stock-experts"
        elif findings.names:
            wrong[base] = min(findings.names)
        elif any(tensor.path.name in strangers for tensor in has.values()):
            wrong[base] = "marks-mixed"
    return wrong


def files_of_experts(bundle: Checkpoint) -> set[str]:
    """The shards that hold any part of a routed expert."""
    return {tensor.path.name for name, tensor in bundle.tensors.items() if parse_expert(name)}


def rounded(bundle: Checkpoint) -> list[str]:
    """Control tensors that are not F32."""
    return [n for n, t in bundle.tensors.items() if is_control(n) and t.dtype != "F32"]


def has_quantized_head(bundle: Checkpoint) -> bool:
    """True for a head that mlx-vlm cannot load; level 1 takes it, because other runtimes can."""
    return "head.scales" in bundle.tensors
