"""Open a bundle by its shards, not by its index, and find the experts that headers prove wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import labels, mtp
from dsv4.model.labels import stored_label
from dsv4.model.load import expert_bases, read_config
from dsv4.model.names import columns_of, is_control, is_expert, parse_expert, stack_base
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.storage.checkpoint import INDEX, SIDECAR, Checkpoint, read_index
from dsv4.storage.safetensors_file import Tensor, read_shard
from dsv4.verification.checks.headers import check_triple
from dsv4.verification.checks.stored_formats import config_label
from dsv4.verification.report.findings import Findings


def open_by_shards(folder: Path) -> Checkpoint:
    """Open a bundle with a weight_map made from its shards' headers.

    Raises UserError for an unreadable config.json, a missing or broken shard, and a tensor in two
    shards.
    """
    return open_with(folder, read_config(folder))


def open_with(folder: Path, config: dict[str, Any]) -> Checkpoint:
    """Open a bundle by its shards with this config. Raises UserError as `open_by_shards` does."""
    shards = {file: read_shard(folder / file) for file in shard_files(folder)}
    weight_map: dict[str, str] = {}
    for file, shard in shards.items():
        for name in shard.tensors:
            if name in weight_map:
                found = f"it in {weight_map[name]} and {file}"
                todo = "fetch or convert it again"
                raise UserError(f"{folder}: {name}", found, "one shard", todo)
            weight_map[name] = file
    return Checkpoint(folder, config, weight_map, shards)


def shard_paths(folder: Path) -> set[str]:
    """Return the names in a bundle that end as a shard's, folders too, without hidden ones."""
    return {path.name for path in folder.glob("*.safetensors") if path.name[0] != "."}


def shard_files(folder: Path) -> list[str]:
    """Return the shards that the index names, and the others of their set.

    If one of these is missing, or there is no index: the one complete set that holds a model.

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
    """Return the tensor names of these shards if together they hold an MLX model, else nothing.

    A model has its embedding, and all experts of as many layers as the names tell.
    """
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
    """Return the set that a shard belongs to: (NAME, N) for NAME-k-of-N, else (file, "")."""
    numbered = re.fullmatch(r"(.+)-[0-9]{5}-of-([0-9]{5})\.safetensors", file)
    return (numbered[1], numbered[2]) if numbered else (file, "")


def set_names(of: tuple[str, str]) -> list[str]:
    """Return the file names of a complete set: NAME-00001-of-N to NAME-N-of-N."""
    name, n = of
    return [f"{name}-{k:05d}-of-{n}.safetensors" for k in range(1, int(n) + 1)] if n else [name]


def parts_of(bundle: Checkpoint, base: str) -> dict[str, Tensor]:
    """Return a module's existing tensors by part: 'weight', 'scales', 'biases'."""
    names = {part: f"{base}.{part}" for part in ("weight", "scales", "biases")}
    return {part: bundle.tensors[name] for part, name in names.items() if name in bundle.tensors}


def wrong_experts(bundle: Checkpoint) -> dict[str, str]:
    """Return storage name → fault for the routed-expert matrices that headers prove wrong.

    FP4 experts are right if a label says mxfp4, or if the bundle's record names such a quantizer.
    In a bundle that requantize made, experts in a shard without its metadata are wrong too.
    """
    files = files_of_experts(bundle)
    marks = {f: bundle.shards[f].metadata.get("requantize_quantizer") for f in files}
    meant = {*marks.values(), labels.recorded_quantizer(bundle.config)}
    as_in_source = records_exact_mtp(bundle)
    copied = any(quantizer_properties(name).copies_fp4 for name in meant)
    strangers = {f for f, mark in marks.items() if any(marks.values()) and not mark}
    accepts_stock = any(quantizer_properties(name).accepts_stock for name in meant)
    wrong = {}
    for base in expert_bases(bundle):
        findings, has = Findings(), parts_of(bundle, base)
        check_triple(base, has, bundle.config, findings)
        fp4 = stored_label(bundle.tensors, base, bundle.config) == labels.MXFP4
        right = copied or (as_in_source and mtp.is_mtp(base))
        if fp4 and not right and config_label(bundle.config, base).get("mode") != "mxfp4":
            wrong[base] = "stock-experts"
        elif findings.names and not fp4:
            wrong[base] = min(findings.names)
        elif fp4 and accepts_stock:
            continue
        elif any(tensor.path.name in strangers for tensor in has.values()):
            wrong[base] = "marks-mixed"
    return wrong


def records_exact_mtp(bundle: Checkpoint) -> bool:
    """Return True if a shard with experts, or config.json, records MTP as the source has it."""
    metadata = [bundle.shards[file].metadata for file in files_of_experts(bundle)]
    choices = {mtp.choice_of(one.get("requantize_table")) for one in metadata}
    return mtp.SOURCE in {*choices, labels.recorded_mtp(bundle.config)}


def expert_formats(bundle: Checkpoint) -> dict[str, dict[str, Any] | None]:
    """Return storage name → label of the stored routed-expert matrix, None where none fits."""
    return {base: expert_format(bundle, base) for base in expert_bases(bundle)}


def expert_format(bundle: Checkpoint, base: str) -> dict[str, Any] | None:
    """Return the label of one stored routed-expert matrix."""
    packed = bundle.tensors.get(f"{stack_base(base)}.tq_packed")
    columns = columns_of(base, bundle.config)
    if packed is not None and packed.shape and columns:
        return labels.TURBO2 | {"bits": 32 * packed.shape[-1] // columns}
    return stored_label(bundle.tensors, base, bundle.config)


def files_of_experts(bundle: Checkpoint) -> set[str]:
    """Return the shards that hold any part of a routed expert."""
    return {tensor.path.name for name, tensor in bundle.tensors.items() if is_expert(name)}


def rounded_controls(bundle: Checkpoint) -> list[str]:
    """Return the names of control tensors that are not F32."""
    return [n for n, t in bundle.tensors.items() if is_control(n) and t.dtype != "F32"]


def has_quantized_head(bundle: Checkpoint) -> bool:
    """Return True for a quantized head: mlx-vlm cannot load it, other runtimes can."""
    return "head.scales" in bundle.tensors
