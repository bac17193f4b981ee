"""A bundle opened by its shards, whatever its index says, and what of it headers prove wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import labels
from dsv4.model.labels import stored_label
from dsv4.model.load import expert_bases, read_config
from dsv4.model.names import columns_of, is_control, is_expert, parse_expert, stack_base
from dsv4.storage.checkpoint import INDEX, SIDECAR, Checkpoint, read_index
from dsv4.storage.safetensors_file import Tensor, read_shard
from dsv4.verification.checks.headers import check_triple
from dsv4.verification.checks.stored_formats import config_label
from dsv4.verification.report.findings import Findings


def open_by_shards(folder: Path) -> Checkpoint:
    """The bundle with an index made of its shards, whatever the one on disk says.

    Raises UserError for an unreadable config.json, a missing or broken shard, a tensor in two of
    them.
    """
    return open_with(folder, read_config(folder))


def open_with(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """The same with another config.json than the folder's. Raises UserError as `open_whole`
    does."""
    shards = {file: read_shard(folder / file) for file in shard_files(folder)}
    weight_map: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in weight_map:
                raise UserError(f"{folder}: {name}", f"it in {weight_map[name]} and {file}", "one shard",
                           "fetch or convert it again")  # fmt: skip
            weight_map[name] = file
    return Checkpoint(folder, config, weight_map, shards)


def shard_paths(folder: Path) -> set[str]:
    """What has a shard's name in a bundle; hidden files are no shards, a folder may be one's."""
    return {path.name for path in folder.glob("*.safetensors") if path.name[0] != "."}


def shard_files(folder: Path) -> list[str]:
    """The shards that the index names, and others of their set. When one of these is missing, or
    there is no index to go by: the one whole set that is there and holds a model.

    An index can be another checkpoint's: mlx-vlm's convert leaves the source's (mlx-vlm#624).
    Raises UserError when no set is whole.
    """
    there = {file for file in shard_paths(folder) - {SIDECAR} if (folder / file).is_file()}
    sets = {parse_set_name(file) for file in there}
    try:
        named = set(read_index(folder).values())
    except UserError:
        named = set()
    of = set(map(parse_set_name, named))
    files = named | {file for file in there if parse_set_name(file) in of}
    if not named and len(sets) == 1:
        files = set(set_names(*sets))
    missing = sorted(files - there)
    if files and not missing:
        return sorted(files)
    models = [set_names(one) for one in sorted(sets) if int(one[1] or 1) <= len(there)]
    names = [model_of(folder, whole) if there.issuperset(whole) else set() for whole in models]
    most = max(names, key=len, default=set())
    if most and all(one < most for one in names if one is not most):  # one shard may look like one
        return sorted(models[names.index(most)])
    if not files:
        raise UserError(f"{folder}", f"no index, and {len(sets)} sets of shards", "one set",
                   f"fetch {INDEX} again")  # fmt: skip
    raise UserError(f"{folder}", f"{len(missing)} of {len(files)} shards missing, first "
               f"{missing[0]}", "all of them", "fetch it again, then make repair")  # fmt: skip


def model_of(folder: Path, files: list[str]) -> set[str]:
    """The tensors of these shards, when all can be read and together they hold an MLX model: its
    embedding, and all experts of as many layers as they name; else nothing."""
    try:
        tensors = {n: t for file in files for n, t in read_shard(folder / file).tensors.items()}
    except UserError:
        return set()
    parsed = [one[:4] for name in tensors if (one := parse_expert(name)) and one[4] == "weight"]
    main = {one[1:] for one in parsed if one[0] == "layers"}
    layers, experts = (1 + max((one[axis] for one in main), default=-1) for axis in (0, 1))
    whole = len(main) == 3 * layers * experts > 0 and "embed.weight" in tensors
    packed = any(tensor.dtype == "U32" for tensor in tensors.values())
    return set(tensors) if whole and packed else set()


def parse_set_name(file: str) -> tuple[str, str]:
    """The set that a shard's own name calls for: (NAME, N) of NAME-k-of-N; else (file, "")."""
    numbered = re.fullmatch(r"(.+)-[0-9]{5}-of-([0-9]{5})\.safetensors", file)
    return (numbered[1], numbered[2]) if numbered else (file, "")


def set_names(of: tuple[str, str]) -> list[str]:
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
        if stored_label(bundle.tensors, base, bundle.config) == labels.MXFP4:
            if not {"mxfp4", *labels.COPYING} & {
                *meant,
                config_label(bundle.config, base).get("mode"),
            }:
                wrong[base] = "stock-experts"
        elif findings.names:
            wrong[base] = min(findings.names)
        elif any(tensor.path.name in strangers for tensor in has.values()):
            wrong[base] = "marks-mixed"
    return wrong


def expert_formats(bundle: Checkpoint) -> dict[str, dict[str, Any] | None]:
    """Storage name → the label that a routed-expert matrix is stored by, None where none fits."""
    return {base: expert_format(bundle, base) for base in expert_bases(bundle)}


def expert_format(bundle: Checkpoint, base: str) -> dict[str, Any] | None:
    """The label that one routed-expert matrix is stored by."""
    packed = bundle.tensors.get(f"{stack_base(base)}.tq_packed")
    columns = columns_of(base, bundle.config)
    if packed is not None and packed.shape and columns:
        return labels.TURBO2 | {"bits": 32 * packed.shape[-1] // columns}
    return stored_label(bundle.tensors, base, bundle.config)


def files_of_experts(bundle: Checkpoint) -> set[str]:
    """The shards that hold any part of a routed expert."""
    return {tensor.path.name for name, tensor in bundle.tensors.items() if is_expert(name)}


def rounded_controls(bundle: Checkpoint) -> list[str]:
    """Control tensors that are not F32."""
    return [n for n, t in bundle.tensors.items() if is_control(n) and t.dtype != "F32"]


def has_quantized_head(bundle: Checkpoint) -> bool:
    """True for a head that mlx-vlm cannot load; level 1 takes it, because other runtimes can."""
    return "head.scales" in bundle.tensors
