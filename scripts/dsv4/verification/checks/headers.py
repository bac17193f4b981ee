"""Level 1: check index, names, shapes, dtypes and config.json, without reading a tensor.

Every check takes a `Scan` (and the source's `Checkpoint`, if there is one), adds faults to the
`Findings`, and returns the number of items that it checked. None stops at the first fault.
"""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import filterfalse
from typing import Any

from dsv4.errors import UserError
from dsv4.model import mtp
from dsv4.model.labels import has_turboquant, label_of, recorded_mtp
from dsv4.model.load import block_counts
from dsv4.model.names import (
    ROUTER,
    columns_of,
    is_control,
    is_expert,
    kind,
    mtp_layer,
    parse_expert,
)
from dsv4.model.naming_schemes import STORAGE
from dsv4.model.quantizer_table import quantizer_properties
from dsv4.storage.atomic import TEMPORARY_SUFFIX
from dsv4.storage.checkpoint import INDEX, SIDECAR, Checkpoint
from dsv4.storage.json_types import first_mismatch
from dsv4.storage.limits import DOCUMENT
from dsv4.storage.safetensors_file import FLOATS, Tensor
from dsv4.storage.system_files import is_system_file
from dsv4.text import join_some, short_repr
from dsv4.verification.checks.stored_formats import (
    AFFINE_PARTS,
    MX_PARTS,
    PARTS,
    SOURCE_PARTS,
    TURBOQUANT_PARTS,
    config_label,
    counterpart_names,
    display_name,
    label_at,
    label_from_parts,
    module_parts,
    shape_of,
)
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

VISION = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "mm_projector")
# Metadata of shards with requantized experts.
METADATA_KEYS = (
    "requantize_layout",
    "requantize_source",
    "requantize_quantizer",
    "requantize_table",
)
BITS_DTYPES = ("U8", "I32")  # of tq_bits: of a stack, and of a single expert
# Fields of config.json that the stages write; all others must be the source's.
WRITTEN_FIELDS = {
    "quantization",
    "quantization_config",
    "requantize",
    "eos_token_id",
    "_name_or_path",
    "group_size",
    "routed_expert_bits",
    "mxtq_seed",
    "rope_parameters",
    "transformers_version",
}
# Fields that no runtime computes with; other tools drop or rewrite them.
UNUSED_FIELDS = {"torch_dtype", "dtype", "use_cache", "architectures", "initializer_range"}
COUNTS = (
    "num_hidden_layers",
    "n_routed_experts",
    "hidden_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "head_dim",
    "vocab_size",
)


def check_index(bundle: Scan, findings: Findings) -> Check:
    """Check that index and shards name the same tensors, each once, and that no shard is extra."""
    checkpoint = bundle.checkpoint
    holders: dict[str, list[str]] = {}
    for file, shard in checkpoint.shards.items():
        for name in shard.tensors:
            holders.setdefault(name, []).append(file)
    for name, file in checkpoint.weight_map.items():
        files = holders.get(name)
        if files is None and name not in bundle.unread:
            findings.add("index-entry-dangling", f"{INDEX}: {name}", "no such tensor", f"in {file}")
        elif files is not None and file not in files:
            findings.add("index-entry-wrong", f"{INDEX}: {name}", file, files[0])
    for name, files in holders.items():
        if name not in checkpoint.weight_map:
            where = f"{files[0]}: {name}"
            findings.add("index-entry-missing", where, "no entry", f"one in {INDEX}")
        if len(files) > 1:
            findings.add("tensor-twice", name, " and ".join(files), "one shard")
    check_extra_files(bundle, findings)
    note = f"{len(checkpoint.shards)} shards"
    if junk := [file for file in bundle.files if is_system_file(file)]:
        note += f"; ignored, as runtimes do: {join_some(junk)}"
    return Check("tensors where the index says", len(holders), note)


def check_extra_files(bundle: Scan, findings: Findings) -> None:
    """Report safetensors files that the index lacks, half-written files, and large files."""
    named = set(bundle.checkpoint.weight_map.values())
    for file in filterfalse(is_system_file, bundle.files):
        if file.startswith(".") and file.endswith(TEMPORARY_SUFFIX):
            findings.add("leftover-files", file, f"{bundle.files[file]:,} bytes", "nothing")
        elif file == SIDECAR and has_turboquant(bundle.tensors):
            continue
        elif "/" not in file and file.endswith(".safetensors") and file not in named:
            findings.add("shard-stranger", file, "not in the index", "only the index's shards")
        elif bundle.files[file] > DOCUMENT and file not in named and file[0] != ".":
            found = f"{bundle.files[file]:,} bytes"
            findings.add("file-unhashed", file, found, f"at most {DOCUMENT:,}")


def quantizer_of(bundle: Scan) -> dict[str, str]:
    """Return what the shards record of the quantizer: METADATA_KEYS → value; {} without a record.

    Shards with experts come first: one without may keep the record of an earlier quantizer.
    """
    recorded = [s for s in bundle.checkpoint.shards.values() if METADATA_KEYS[0] in s.metadata]
    with_experts = (s for s in recorded if any(map(is_expert, s.tensors)))
    for shard in itertools.chain(with_experts, recorded):
        return {key: shard.metadata.get(key, "") for key in METADATA_KEYS}
    return {}


def check_metadata(bundle: Scan, findings: Findings) -> Check:
    """Check that all shards with experts record one source and quantizer, or none does.

    The quantizer mxfp4 keeps stock shards, which hold the source's bytes and have no record.
    """
    records = {}
    for file, shard in bundle.checkpoint.shards.items():
        if any(map(is_expert, shard.tensors)):
            records[file] = tuple(shard.metadata.get(key) for key in METADATA_KEYS)
    name = quantizer_of(bundle).get("requantize_quantizer")
    if quantizer_properties(name).accepts_stock:
        records = {file: record for file, record in records.items() if any(record)}
    usual = max(records.values(), key=Counter(records.values()).__getitem__, default=())
    for file, record in records.items():
        if record != usual:
            findings.add("marks-mixed", file, f"{record}", f"{usual} as in most shards")
    note = f"quantizer {name or 'not recorded'}"
    return Check("shards with experts", len(records), note, optional=not bundle.is_ours)


def check_layout(bundle: Scan, findings: Findings) -> Check:
    """Check that the tensors' names belong to one naming scheme; report names of no scheme."""
    scheme, layout = bundle.view.recognized, bundle.scheme
    for other, names in scheme.others.items():
        where, expected = f"{names[0]}, as {other} has it", f"those of {layout.name}"
        findings.add("layout-mixed", where, f"{len(names):,} such names",
                     f"{expected}, which {scheme.known:,} have", len(names))  # fmt: skip
    if scheme.known <= len(bundle.checkpoint.tensors) // 2:
        names = scheme.unknown or list(itertools.chain.from_iterable(scheme.others.values()))
        findings.add("layout-unknown", join_some(names), f"{len(names):,} unknown names",
                     f"a known layout; the nearest, {layout.name}, has {scheme.known:,} of them",
                     max(1, len(names)))  # fmt: skip
    for name, why in bundle.view.odd.items():
        fault = "tensor-twice" if why.startswith("also") else "shape-wrong"
        findings.add(fault, name, why, "what its layout calls for")
    return Check("tensors by the names of their layout", scheme.known, describe_layout(bundle))


def describe_layout(bundle: Scan) -> str:
    """Return the naming scheme as text, with MTP, vision tower and experts left out or added."""
    notes = [f"{bundle.scheme.name} ({bundle.scheme.who})"]
    has_mtp = any(mtp_layer(name) is not None for name in bundle.tensors)
    dropped = recorded_mtp(bundle.config) == mtp.DROPPED
    if not has_mtp and (dropped or bundle.config.get("num_nextn_predict_layers")):
        notes.append("MTP left out")
    vision = [name for name in bundle.view.recognized.unknown if is_vision(name)]
    if vision:
        notes.append(f"a vision tower of {len(vision):,} tensors, not checked")
    fewer = pruned_layers(bundle)
    if fewer:
        notes.append(f"{len(fewer)} layers with fewer experts, the least {min(fewer.values())}")
    return "; ".join(notes)


def is_vision(name: str) -> bool:
    """Return whether a tensor belongs to a vision tower or its projector."""
    return any(module in name.split(".") for module in VISION)


def pruned_layers(bundle: Scan) -> dict[int, int]:
    """Return layer → number of experts, of layers with fewer than config.json counts."""
    counts = Counter(
        one[1] for base in bundle.bases
        if (one := parse_expert(f"{base}.weight")) and one[0] == "layers" and one[3] == "w1"
    )  # fmt: skip
    most = bundle.config.get("n_routed_experts", 0)
    return {layer: n for layer, n in counts.items() if n < most}


def check_experts(bundle: Scan, findings: Findings) -> list[Check]:
    """Check that the routed experts are those that config.json counts, in main and MTP layers."""
    tensors, unread, bases = bundle.tensors, bundle.unread, bundle.bases
    for base in bases:
        names = (f"{base}.weight", f"{base}.tq_packed")
        disk = bundle.view.name_on_disk(names[0])
        if not any(name in tensors or name in unread for name in names) and disk not in unread:
            findings.add("expert-missing", display_name(bundle, base), "no weight", "one")
    known = set(bases)
    for name in tensors:
        if parse_expert(name) and name.rpartition(".")[0] not in known:
            expected = f"{len(bases):,} matrices, by config.json and routers"
            findings.add("expert-extra", display_name(bundle, name), "beyond the counts", expected)
    main = sum(base.startswith("layers.") for base in bases)
    return [
        Check("routed-expert matrices in the main layers", main),
        Check("routed-expert matrices in MTP layers", len(bases) - main, optional=True),
    ]


def check_triples(bundle: Scan, findings: Findings) -> Check:
    """Check that every quantized module has all its parts, and that they fit each other."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in bundle.tensors.items():
        base, _, part = name.rpartition(".")
        if part in PARTS[1:] or tensor.dtype == "U32":
            modules.setdefault(base, {})[part] = tensor
    for base, parts in modules.items():
        if any(f"{base}.{part}" in bundle.unread for part in AFFINE_PARTS):
            continue
        if "tq_bits" in parts and parts["tq_bits"].dtype not in BITS_DTYPES:
            where = display_name(bundle, f"{base}.tq_bits")
            findings.add("dtype-wrong", where, parts["tq_bits"].dtype, " or ".join(BITS_DTYPES))
        if bundle.scheme is STORAGE and "tq_packed" not in parts and "scale" not in parts:
            check_triple(base, parts, bundle.config, findings)
        elif label_at(bundle, base) is None:
            sets = (AFFINE_PARTS, MX_PARTS, TURBOQUANT_PARTS, SOURCE_PARTS)
            complete = any({*parts, "weight"} >= set(needed) for needed in sets)
            name = "triple-misfit" if complete else "triple-incomplete"
            where = display_name(bundle, base)
            findings.add(name, where, describe_parts(parts), "the parts of one mode")
    return Check("quantized modules", len(modules), optional=not bundle.is_ours)


def describe_parts(parts: dict[str, Tensor]) -> str:
    """Return a module's tensors as text: 'weight U32 [8, 128], scales F16 [8, 32]'."""
    return ", ".join(f"{part} {t.dtype} {list(t.shape)}" for part, t in parts.items())


def check_triple(
    base: str, parts: dict[str, Tensor], config: dict[str, Any], findings: Findings
) -> None:
    """Check one module: affine (weight, scales, biases), or MXFP4 and FP8 (weight, U8 scales)."""
    weight, scales, biases = (parts.get(part) for part in AFFINE_PARTS)
    shown = describe_parts(parts)
    exponents = scales is not None and scales.dtype in ("U8", "F8_E8M0")
    if exponents and biases is not None:
        findings.add("u8-scales-beside-biases", base, shown, "F16 scales")
    elif exponents and weight is not None:
        label = config_label(config, base)
        kept = mtp.is_mtp(base) and recorded_mtp(config) == mtp.SOURCE  # `check_labels` reports it
        if label.get("mode") == "affine" and parse_expert(f"{base}.weight") and not kept:
            findings.add("stock-experts", base, shown, "F16 scales and biases, or mode mxfp4")
        elif label_of(weight, scales, biases) is None:
            findings.add("triple-misfit", base, shown, "4 or 8 bits × 32 columns a scale")
    elif weight is None or scales is None or biases is None:
        findings.add("triple-incomplete", base, shown or "nothing", "weight, scales and biases")
    elif label_from_parts(parts, columns_of(base, config)) is None:
        findings.add("triple-misfit", base, shown, "U32 weight, scales and biases of one group")


def check_controls(bundle: Scan, findings: Findings) -> Check:
    """Check that control tensors are F32."""
    controls = [t for name, t in bundle.tensors.items() if is_control(name)]
    for tensor in controls:
        if tensor.dtype != "F32":
            name = "controls-rounded" if tensor.dtype in ("F16", "BF16") else "dtype-wrong"
            findings.add(name, display_name(bundle, tensor.name), tensor.dtype, "F32")
    return Check("control tensors, F32", len(controls))


def check_counterparts(bundle: Scan, source: Checkpoint, findings: Findings) -> Check:
    """Check that each source tensor has a counterpart of its shape, and that no tensor is extra."""
    tensors, bases = bundle.tensors, set(bundle.bases)
    expected: set[str] = set()
    for name, tensor in source.tensors.items():
        what, base = kind(name), name.removesuffix(".weight")
        left_out = mtp.is_mtp(name) and not bundle.has_mtp
        if what == "scale" or left_out or (what == "expert" and base not in bases):
            continue
        counterparts = counterpart_names(bundle, name, what)
        expected |= {f"{base}.{part}" for part in PARTS} if what == "expert" else {*counterparts}
        for key in counterparts:
            if key not in tensors and not {key, bundle.view.name_on_disk(key)} & bundle.unread:
                where = display_name(bundle, key)
                findings.add("tensor-missing", where, "not there", f"the counterpart of {name}")
        check_counterpart(bundle, tensor, what, findings)
    for name in sorted({*(set(tensors) - expected), *bundle.view.recognized.unknown}):
        if not is_vision(name):
            where = display_name(bundle, name)
            findings.add("tensor-extra", where, "no such tensor in the source", "none")
    return Check("source tensors with their counterparts", len(source.tensors))


def check_counterpart(bundle: Scan, origin: Tensor, what: str, findings: Findings) -> None:
    """Check shape and dtype of the counterpart of one source tensor.

    what: the tensor's treatment, as `kind` returns it.
    """
    base = origin.name.removesuffix(".weight")
    tensor = bundle.tensors.get(origin.name) or bundle.tensors.get(f"{base}.tq_packed")
    if tensor is None:
        return
    shape = origin.shape
    if what in ("expert", "matrix", "head"):
        columns = shape[-1] * (2 if what == "expert" else 1) if shape else 0
        label = label_from_parts(module_parts(bundle, base), columns)
        if label is None and tensor.dtype not in FLOATS:
            return  # `check_triples` reports it
        shape = (*shape[:-1], columns)
        found = tensor.shape if label is None else shape_of(tensor, label, columns)
    else:
        found = tensor.shape
    if found != shape and not is_pruned_router(bundle, origin.name, found, shape):
        where = display_name(bundle, tensor.name)
        findings.add("shape-wrong", where, f"{list(found)}", f"{list(shape)}")
    integers = origin.dtype not in (*FLOATS, "F64")
    allowed = FLOATS
    if integers:
        allowed = (origin.dtype,) if bundle.is_ours else (origin.dtype, "I32", "I64")
    if what == "image" and bundle.is_ours:
        allowed = (origin.dtype,)
    if what in ("passthrough", "image") and tensor.dtype not in allowed:
        expected = origin.dtype if integers or what == "image" else "F16"
        findings.add("dtype-wrong", display_name(bundle, tensor.name), tensor.dtype, expected)


def is_pruned_router(
    bundle: Scan, name: str, found: tuple[int, ...], shape: tuple[int, ...]
) -> bool:
    """Return whether this is the router of a pruned layer, with one row for each expert left."""
    rows = found[0] if name.endswith(ROUTER) and found else 0
    return rows in pruned_layers(bundle).values() and (rows, *shape[1:]) == found


def check_config(bundle: Scan, source: Checkpoint | None, findings: Findings) -> Check:
    """Check that config.json's counts are numbers, and that its fields are the source's."""
    config = bundle.config
    for key in COUNTS:
        value = config.get(key)
        if first_mismatch(value, int) or value < 1:
            where = f"config.json: {key}"
            findings.add("config-broken", where, short_repr(value), "a whole number")
    if "config-broken" not in findings:
        try:
            block_counts(bundle.view)
        except UserError as stop:
            findings.add("config-broken", "config.json", f"{stop}", "a model's counts")
    if source is None:
        return Check("fields of config.json", len(COUNTS))
    keys = set(source.config) - WRITTEN_FIELDS - (set() if bundle.is_ours else UNUSED_FIELDS)
    for key in sorted(keys):
        if config.get(key) != source.config[key]:
            expected = f"{short_repr(source.config[key])} as in the source"
            where = f"config.json: {key}"
            findings.add("config-differs", where, short_repr(config.get(key)), expected)
    return Check("fields of config.json as in the source", len(keys))
