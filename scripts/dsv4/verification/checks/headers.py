"""Level 1: check index, names, shapes, dtypes and config.json, without reading a tensor.

Every check takes a `Scan` (and the source's `Checkpoint`, where there is one), adds what is wrong
to the `Findings` and returns how much it looked at. None stops at the first fault.
"""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import filterfalse
from typing import Any

from dsv4.errors import UserError
from dsv4.model.labels import (
    has_turboquant,
    label_of,
)
from dsv4.model.load import block_counts
from dsv4.model.names import (
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
    FORMS,
    PARTS,
    config_label,
    display_name,
    module_parts,
    shape_of,
    stored_label,
    wanted_keys,
)
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

VISION = ("vision_tower", "vision_model", "visual", "multi_modal_projector", "mm_projector")
MARKS = ("requantize_layout", "requantize_source", "requantize_quantizer", "requantize_table")
# What the stages write into config.json; everything else must be the source's.
OURS = {
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
# What no runtime computes by, and other tools leave out or write anew.
THEIRS = {"torch_dtype", "dtype", "use_cache", "architectures", "initializer_range"}
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
    """Index and shards name the same tensors, each once, and no other shard lies beside them."""
    checkpoint = bundle.checkpoint
    holders: dict[str, list[str]] = {}
    for file, shard in checkpoint.shards.items():
        for name in shard.tensors:
            holders.setdefault(name, []).append(file)
    for name, file in checkpoint.weight_map.items():
        at = holders.get(name)
        if at is None and name not in bundle.unread:
            findings.add("index-entry-dangling", f"{INDEX}: {name}", "no such tensor", f"in {file}")
        elif at is not None and file not in at:
            findings.add("index-entry-wrong", f"{INDEX}: {name}", file, at[0])
    for name, at in holders.items():
        if name not in checkpoint.weight_map:
            findings.add("index-entry-missing", f"{at[0]}: {name}", "no entry", f"one in {INDEX}")
        if len(at) > 1:
            findings.add("tensor-twice", name, " and ".join(at), "one shard")
    check_strangers(bundle, findings)
    note = f"{len(checkpoint.shards)} shards"
    if junk := [file for file in bundle.files if is_system_file(file)]:
        note += f"; ignored, as runtimes do: {join_some(junk)}"
    return Check("tensors where the index says", len(holders), note)


def check_strangers(bundle: Scan, findings: Findings) -> None:
    """No safetensors file that the index does not name, and nothing half-written."""
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
    """What the shards' metadata say of the requantization: MARKS → value; {} for a stock bundle.

    A shard without experts may keep the mark of an earlier quantizer: it was not written again.
    """
    marked = [s for s in bundle.checkpoint.shards.values() if MARKS[0] in s.metadata]
    with_experts = (s for s in marked if any(map(is_expert, s.tensors)))
    for shard in itertools.chain(with_experts, marked):
        return {key: shard.metadata.get(key, "") for key in MARKS}
    return {}


def check_marks(bundle: Scan, findings: Findings) -> Check:
    """All shards with routed experts were made of one source by one quantizer, or none was.

    The quantizer mxfp4 leaves stock shards alone: they hold the source's bytes and have no mark.
    """
    marks = {}
    for file, shard in bundle.checkpoint.shards.items():
        if any(map(is_expert, shard.tensors)):
            marks[file] = tuple(shard.metadata.get(key) for key in MARKS)
    if quantizer_properties(quantizer_of(bundle).get("requantize_quantizer")).accepts_stock:
        marks = {file: mark for file, mark in marks.items() if any(mark)}
    usual = Counter(marks.values()).most_common(1)
    for file, mark in marks.items():
        if usual and mark != usual[0][0]:
            findings.add("marks-mixed", file, f"{mark}", f"{usual[0][0]} as in most shards")
    name = quantizer_of(bundle).get("requantize_quantizer")
    said = f"quantizer {name or 'not recorded'}"
    return Check("shards with experts", len(marks), said, optional=not bundle.is_ours)


def check_layout(bundle: Scan, findings: Findings) -> Check:
    """The tensors' names are those of one layout; what no layout has is named."""
    seen, layout = bundle.view.recognized, bundle.scheme
    for other, names in seen.others.items():
        where = f"{names[0]}, as {other} has it"
        findings.add("layout-mixed", where, f"{len(names):,} such names",
                     f"those of {layout.name}, which {seen.known:,} have", len(names))  # fmt: skip
    if seen.known <= len(bundle.checkpoint.tensors) // 2:
        names = seen.unknown or [name for of in seen.others.values() for name in of]
        findings.add("layout-unknown", join_some(names), f"{len(names):,} names that nobody knows",
                     f"a known layout; the nearest, {layout.name}, has {seen.known:,} of them",
                     max(1, len(names)))  # fmt: skip
    for name, why in bundle.view.odd.items():
        fault = "tensor-twice" if why.startswith("also") else "shape-wrong"
        findings.add(fault, name, why, "what its layout calls for")
    return Check("tensors by the names of their layout", seen.known, describe_layout(bundle))


def describe_layout(bundle: Scan) -> str:
    """The layout in words, and what is left out or added as makers of bundles do."""
    said = [f"{bundle.scheme.name} ({bundle.scheme.who})"]
    has_mtp = any(mtp_layer(name) is not None for name in bundle.tensors)
    if not has_mtp and bundle.config.get("num_nextn_predict_layers"):
        said.append("MTP left out")
    seen = [name for name in bundle.view.recognized.unknown if is_vision(name)]
    if seen:
        said.append(f"a vision tower of {len(seen):,} tensors, not judged")
    fewer = pruned(bundle)
    if fewer:
        said.append(f"{len(fewer)} layers with fewer experts, the least {min(fewer.values())}")
    return "; ".join(said)


def is_vision(name: str) -> bool:
    """True for a tensor of a vision tower, or of what joins it to the model."""
    return any(part in name.split(".") for part in VISION)


def pruned(bundle: Scan) -> dict[int, int]:
    """Layer → its number of experts, where it has fewer than config.json counts."""
    counts = Counter(
        one[1] for base in bundle.bases
        if (one := parse_expert(f"{base}.weight")) and one[0] == "layers" and one[3] == "w1"
    )  # fmt: skip
    most = bundle.config.get("n_routed_experts", 0)
    return {layer: n for layer, n in counts.items() if n < most}


def check_experts(bundle: Scan, findings: Findings) -> list[Check]:
    """Every routed expert that is called for is there; main layers and MTP apart."""
    tensors, unread, bases = bundle.tensors, bundle.unread, bundle.bases
    for base in bases:
        ways = (f"{base}.weight", f"{base}.tq_packed")
        disk = bundle.view.name_on_disk(ways[0])
        if not any(way in tensors or way in unread for way in ways) and disk not in unread:
            findings.add("expert-missing", display_name(bundle, base), "no weight", "one")
    known = set(bases)
    for name in tensors:
        if parse_expert(name) and name.rpartition(".")[0] not in known:
            more = f"{len(bases):,} matrices, by config.json and routers"
            findings.add("expert-extra", display_name(bundle, name), "beyond the counts", more)
    main = sum(base.startswith("layers.") for base in bases)
    return [
        Check("routed-expert matrices in the main layers", main),
        Check("routed-expert matrices in MTP layers", len(bases) - main, optional=True),
    ]


def check_triples(bundle: Scan, findings: Findings) -> Check:
    """Every quantized module has its parts, and they fit each other."""
    tensors, unread = bundle.tensors, bundle.unread
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if part in PARTS[1:] or tensor.dtype == "U32":
            parts.setdefault(base, {})[part] = tensor
    for base, has in parts.items():
        if any(f"{base}.{part}" in unread for part in ("weight", "scales", "biases")):
            continue
        if bundle.scheme is STORAGE and "tq_packed" not in has and "scale" not in has:
            check_triple(base, has, bundle.config, findings)
        elif stored_label(module_parts(bundle, base), columns_of(base, bundle.config)) is None:
            shown = ", ".join(f"{part} {t.dtype} {list(t.shape)}" for part, t in has.items())
            whole = any(set(has) | {"weight"} >= set(form) for form in FORMS)
            name = "triple-misfit" if whole else "triple-incomplete"
            findings.add(name, display_name(bundle, base), shown, "the parts of one mode")
    return Check("quantized modules", len(parts), optional=not bundle.is_ours)


def check_triple(
    base: str, has: dict[str, Tensor], config: dict[str, Any], findings: Findings
) -> None:
    """One module: affine (weight, scales, biases), or MXFP4 (weight, U8 scales) under its label."""
    weight, scales, biases = (has.get(part) for part in ("weight", "scales", "biases"))
    shown = ", ".join(f"{part} {t.dtype} {list(t.shape)}" for part, t in has.items())
    exponents = scales is not None and scales.dtype in ("U8", "F8_E8M0")
    if exponents and biases is not None:
        findings.add("u8-scales-beside-biases", base, shown, "F16 scales")
    elif exponents and weight is not None:
        label = config_label(config, base)
        if label.get("mode") == "affine" and parse_expert(f"{base}.weight"):
            findings.add("stock-experts", base, shown, "F16 scales and biases, or mode mxfp4")
        elif label_of(weight, scales, biases) is None:
            findings.add("triple-misfit", base, shown, "4 or 8 bits × 32 columns a scale")
    elif weight is None or scales is None or biases is None:
        findings.add("triple-incomplete", base, shown or "nothing", "weight, scales and biases")
    elif stored_label(has, columns_of(base, config)) is None:
        findings.add("triple-misfit", base, shown, "U32 weight, scales and biases of one group")


def check_controls(bundle: Scan, findings: Findings) -> Check:
    """Control tensors are F32."""
    controls = [t for name, t in bundle.tensors.items() if is_control(name)]
    for tensor in controls:
        if tensor.dtype != "F32":
            name = "controls-rounded" if tensor.dtype in ("F16", "BF16") else "dtype-wrong"
            findings.add(name, display_name(bundle, tensor.name), tensor.dtype, "F32")
    return Check("control tensors, F32", len(controls))


def check_counterparts(bundle: Scan, source: Checkpoint, findings: Findings) -> Check:
    """Every source tensor has its counterpart of the right kind and shape, and nothing is extra."""
    tensors, called_for = bundle.tensors, set(bundle.bases)
    wanted: set[str] = set()
    for name, tensor in source.tensors.items():
        what, base = kind(name), name.removesuffix(".weight")
        left_out = name.startswith("mtp.") and not bundle.has_mtp
        if what == "scale" or left_out or (what == "expert" and base not in called_for):
            continue
        keys = wanted_keys(bundle, name, what)
        wanted |= {f"{base}.{part}" for part in PARTS} if what == "expert" else set(keys)
        for key in keys:
            if key not in tensors and not {key, bundle.view.name_on_disk(key)} & bundle.unread:
                where = display_name(bundle, key)
                findings.add("tensor-missing", where, "not there", f"the counterpart of {name}")
        check_counterpart(bundle, tensor, what, findings)
    for name in sorted({*(set(tensors) - wanted), *bundle.view.recognized.unknown}):
        if not is_vision(name):
            where = display_name(bundle, name)
            findings.add("tensor-extra", where, "no such tensor in the source", "none")
    return Check("source tensors with their counterparts", len(source.tensors))


def check_counterpart(bundle: Scan, origin: Tensor, what: str, findings: Findings) -> None:
    """Shape and dtype of what a bundle makes of one source tensor."""
    base = origin.name.removesuffix(".weight")
    tensor = bundle.tensors.get(origin.name) or bundle.tensors.get(f"{base}.tq_packed")
    if tensor is None:
        return
    shape = origin.shape
    if what in ("expert", "matrix", "head"):
        columns = shape[-1] * (2 if what == "expert" else 1) if shape else 0
        label = stored_label(module_parts(bundle, base), columns)
        if label is None and tensor.dtype not in FLOATS:
            return  # reported with the triples
        shape = (*shape[:-1], columns)
        found = tensor.shape if label is None else shape_of(tensor, label, columns)
    else:
        found = tensor.shape
    if found != shape and not is_pruned_router(bundle, origin.name, found, shape):
        where = display_name(bundle, tensor.name)
        findings.add("shape-wrong", where, f"{list(found)}", f"{list(shape)}")
    whole = origin.dtype not in (*FLOATS, "F64")
    fits = (origin.dtype, *(("I32", "I64") if not bundle.is_ours else ())) if whole else FLOATS
    if what == "passthrough" and tensor.dtype not in fits:
        expected = origin.dtype if whole else "F16"
        findings.add("dtype-wrong", display_name(bundle, tensor.name), tensor.dtype, expected)


def is_pruned_router(
    bundle: Scan, name: str, found: tuple[int, ...], shape: tuple[int, ...]
) -> bool:
    """True for a router with a row for each expert of a layer that has fewer than the source's."""
    rows = found[0] if name.endswith((".ffn.gate.weight", ".ffn.gate.bias")) and found else 0
    return rows in pruned(bundle).values() and (rows, *shape[1:]) == found


def check_config(bundle: Scan, source: Checkpoint | None, findings: Findings) -> Check:
    """config.json's counts are numbers, and what describes the model is the source's."""
    config = bundle.config
    for key in COUNTS:
        value = config.get(key)
        if first_mismatch(value, int) or value < 1:
            findings.add(
                "config-broken", f"config.json: {key}", short_repr(value), "a whole number"
            )
    if "config-broken" not in findings:
        try:
            block_counts(bundle.view)
        except UserError as stop:
            findings.add("config-broken", "config.json", f"{stop}", "counts of a model")
    if source is None:
        return Check("fields of config.json", len(COUNTS))
    keys = set(source.config) - OURS - (set() if bundle.is_ours else THEIRS)
    for key in sorted(keys):
        if config.get(key) != source.config[key]:
            findings.add(
                "config-differs",
                f"config.json: {key}",
                short_repr(config.get(key)),
                f"{short_repr(source.config[key])} as in the source",
            )
    return Check("fields of config.json as in the source", len(keys))
