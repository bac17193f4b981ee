"""Plan the repair of config.json and of files that are not the bundle's own.

The other steps read sizes from config.json, and MLX loads every shard in the folder, so both come
first.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dsv4.conversion.bundle_files import quantizer_record, sidecar_bytes
from dsv4.errors import UserError
from dsv4.model import configs, labels, mtp
from dsv4.model.bundle_tensors import missing_weights, weights_of
from dsv4.model.load import block_counts, config_count, read_config
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.quantization import turboquant
from dsv4.quantization.formats import get_quantizer
from dsv4.repair import foreign_layouts
from dsv4.repair.context import NEEDS_SOURCE, RepairContext
from dsv4.repair.document_steps import recorded_quantizer
from dsv4.repair.shards_on_disk import (
    expert_formats,
    open_by_shards,
    open_with,
    records_exact_mtp,
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
    """Return why config.json cannot be used, '' when it can.

    A count that the source has must be in it.
    """
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
    except UserError as error:
        return f"{error}"
    return ""


def plan_config(repair: RepairContext) -> None:
    """Plan a new config.json from the source's and the shards, when it cannot be used."""
    if not (fault := config_fault(repair)):
        return
    if repair.source is None:
        raise UserError(fault, "no source", "its config.json", NEEDS_SOURCE)
    content = rebuilt_config(repair, open_with(repair.bundle, repair.source.config))

    def apply() -> None:
        repair.backup.keep(["config.json"])
        write_json(repair.bundle / "config.json", content)

    repair.plan(f"config-broken: {fault}", "made anew from the source's config.json", apply)


def rebuilt_config(repair: RepairContext, bundle: Checkpoint) -> dict[str, Any]:
    """Return the source's config.json as a bundle has it, with the labels of the stored experts.

    FP4 experts are labelled mxfp4 when the shards' metadata or --quantizer names such a format.
    Otherwise they are a stock bundle's and will be made again. Raises UserError for another model's
    shards.
    """
    record = recorded_quantizer(bundle)
    source = mtp.without_dropped(repair.source, mtp.choice_of((record or {}).get("table")))
    missing = missing_weights(weights_of(source.tensors), bundle.tensors)
    if missing:
        raise UserError(f"{bundle.folder}", f"no {missing[0]} ({len(missing):,} tensors missing)",
                   "every tensor of the source", "check SOURCE and BUNDLE")  # fmt: skip
    name = record["quantizer"] if record else repair.options.quantizer
    experts = expert_formats(bundle)
    properties, exact_mtp = quantizer_properties(name), records_exact_mtp(bundle)
    main = {b: label for b, label in experts.items() if not (exact_mtp and mtp.is_mtp(b))}
    stock = labels.MXFP4 in main.values() and not properties.copies_fp4
    if stock or not labels.in_stacks(main, properties.mixed):
        main = experts = dict.fromkeys(experts, labels.EXPERT)
    label = labels.most_common_label(main)
    content = configs.bundle_config(repair.source, label)
    content["quantization"] = labels.quantization(experts)
    if all(one == labels.MXFP4 for one in experts.values()):
        record = record or quantizer_record(get_quantizer("mxfp4"))
    return {**content, labels.RECORD: record} if record else content


def plan_strangers(repair: RepairContext) -> None:
    """Plan to move shards that are not the bundle's to the backup, from which undo restores them.

    Raises UserError when the bundle's own shards hold no whole model: a stranger may be the missing
    one.
    """
    files = shard_files(repair.bundle)
    bundle = foreign_layouts.scan_bundle(open_by_shards(repair.bundle))
    known = {*files, SIDECAR} if labels.has_turboquant(bundle.tensors) else {*files}
    strangers = sorted(shard_paths(repair.bundle) - known)
    if not strangers:
        return
    found = f"shard-stranger: {join_some(strangers)}"
    held = {name.rpartition(".")[0] for name in bundle.tensors}
    if not all(base in held for base in bundle.bases):
        raise UserError(f"{repair.bundle}", found, "the index's shards alone to hold every expert",
                   "see what else is named, then move them away")  # fmt: skip
    move = functools.partial(move_to_backup, repair, strangers)
    repair.plan(found, f"moved to {repair.backup.files}", move)


def plan_sidecar(repair: RepairContext) -> None:
    """Plan the TurboQuant file that runtimes in Swift read, in a bundle that this recipe made."""
    bundle = foreign_layouts.scan_bundle(open_by_shards(repair.bundle))
    forms = turboquant_files.stack_formats(bundle)
    if not bundle.is_ours or {bits for _, bits in forms} != {turboquant.BITS}:
        return
    path, data = repair.bundle / SIDECAR, sidecar_bytes({columns for columns, _ in forms})
    same = path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data

    def apply() -> None:
        repair.backup.keep([SIDECAR])
        write_bytes(path, data)

    if not same:
        repair.plan(f"{SIDECAR}: other signs or levels than the codes'", "written", apply)


def move_to_backup(repair: RepairContext, names: list[str]) -> None:
    """Move every file that can be moved. Raises the first UserError after that."""
    errors = []
    for name in names:
        try:
            repair.backup.take(name)
        except UserError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def list_system_files(bundle: Path) -> None:
    """Print the operating system's own files in the folder. They stay; no runtime reads them."""
    files = [name for name in list_files(bundle) if is_system_file(name)]
    if files:
        print(f"left alone: {join_some(files)}; the system's own, which no runtime reads")
