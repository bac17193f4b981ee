"""repair's first steps: config.json, and the files beside the bundle's own.

The other steps count by config.json, and MLX loads every shard that it finds, so both come first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsv4.conversion.requantize import quantizer_record, sidecar_bytes
from dsv4.errors import UserError
from dsv4.model import configs, labels
from dsv4.model.bundle_plan import missing_weights, weights_of
from dsv4.model.load import block_counts, config_count, read_config
from dsv4.quantization import turboquant
from dsv4.quantization.formats import QUANTIZERS
from dsv4.repair import foreign_layouts
from dsv4.repair.context import NEEDS_SOURCE, RepairContext
from dsv4.repair.document_steps import recorded_quantizer
from dsv4.repair.shards_on_disk import (
    expert_formats,
    open_by_shards,
    open_with,
    shard_files,
    shard_paths,
)
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.storage.checkpoint import SIDECAR, Checkpoint
from dsv4.storage.limits import list_files
from dsv4.storage.system_files import is_system_file
from dsv4.text import join_some
from dsv4.verification.checks import turboquant_files
from dsv4.verification.checks.headers import COUNTS


def config_fault(repair: RepairContext) -> str:
    """Why config.json cannot be used; '' when it can. It has every count that the source has."""
    folder = repair.bundle
    try:
        config = read_config(folder)
        block_counts(Checkpoint(folder, config, {}, {}))
        for key in COUNTS:
            if (
                repair.source
                and repair.source.config.get(key)
                and not config_count(config, key, folder)
            ):
                raise UserError(f"{folder / 'config.json'}: {key}", "0", "1 or more", "restore it")
    except UserError as stop:
        return f"{stop}"
    return ""


def mend_config(repair: RepairContext) -> None:
    """A config.json that cannot be used is made anew, from the source's and the shards."""
    if not (fault := config_fault(repair)):
        return
    if repair.source is None:
        raise UserError(fault, "no source", "its config.json", NEEDS_SOURCE)
    content = rebuilt_config(repair, open_with(repair.bundle, repair.source.config))
    if repair.report(f"config-broken: {fault}", "made anew from the source's config.json"):
        repair.backup.keep(["config.json"])
        write_json(repair.bundle / "config.json", content)


def rebuilt_config(repair: RepairContext, bundle: Checkpoint) -> dict[str, Any]:
    """The source's config.json as a bundle has it, with labels as the experts lie there.

    FP4 bytes are labelled as what they are when the shards or --quantizer say that they were meant
    so; else they are a stock bundle's, and to be made anew. Raises UserError for another model's
    shards.
    """
    missing = missing_weights(weights_of(repair.source.tensors), bundle.tensors)
    if missing:
        raise UserError(f"{bundle.folder}", f"no {missing[0]} ({len(missing):,} tensors missing)",
                   "every tensor of the source", "check SOURCE and BUNDLE")  # fmt: skip
    record = recorded_quantizer(bundle)
    name = record["quantizer"] if record else repair.args.quantizer
    experts = expert_formats(bundle)
    stock = labels.MXFP4 in experts.values() and name not in ("mxfp4", *labels.PLANNED)
    if stock or not labels.in_stacks(experts, name in labels.MIXTURES):
        experts = dict.fromkeys(experts, labels.EXPERT)
    label = labels.most_common_label(experts)
    content = configs.bundle_config(repair.source, label)
    content["quantization"] = labels.quantization(experts)
    if all(one == labels.MXFP4 for one in experts.values()):
        record = record or quantizer_record(QUANTIZERS["mxfp4"]())
    return {**content, labels.RECORD: record} if record else content


def mend_strangers(repair: RepairContext) -> None:
    """Shards that are none of the bundle's are moved to the originals, whence undo brings them.

    Raises UserError when the bundle's own do not hold a whole model: then they may be what lacks.
    """
    files = shard_files(repair.bundle)
    bundle = foreign_layouts.scan_bundle(open_by_shards(repair.bundle))
    known = {*files, SIDECAR} if labels.has_turboquant(bundle.tensors) else {*files}
    strangers = sorted(shard_paths(repair.bundle) - known)
    if not strangers:
        return
    named = f"shard-stranger: {join_some(strangers)}"
    held = {name.rpartition(".")[0] for name in bundle.tensors}
    if not all(base in held for base in bundle.bases):
        raise UserError(f"{repair.bundle}", named, "the index's shards alone to hold every expert",
                   "see what else is named, then move them away")  # fmt: skip
    if repair.report(named, f"moved to {repair.backup.files}"):
        for name in strangers:
            repair.attempt(move_to_originals, name)


def mend_sidecar(repair: RepairContext) -> None:
    """What runtimes in Swift want to know of TurboQuant, in a bundle that this recipe made."""
    bundle = foreign_layouts.scan_bundle(open_by_shards(repair.bundle))
    forms = turboquant_files.stack_formats(bundle)
    if not bundle.is_ours or {bits for _, bits in forms} != {turboquant.BITS}:
        return
    path, data = repair.bundle / SIDECAR, sidecar_bytes({columns for columns, _ in forms})
    same = path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    if not same and repair.report(f"{SIDECAR}: other signs or levels than the codes'", "written"):
        repair.backup.keep([SIDECAR])
        write_bytes(path, data)


def move_to_originals(repair: RepairContext, name: str) -> None:
    repair.backup.take(name)


def list_system_files(bundle: Path) -> None:
    """Name what a system left in the folder: it stays, and no runtime reads it."""
    files = [name for name in list_files(bundle) if is_system_file(name)]
    if files:
        print(f"left alone: {join_some(files)}; the system's own, which no runtime reads")
