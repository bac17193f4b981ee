"""Level 1: what a bundle's headers and JSON say, without one tensor read.

Every check takes a `Survey` (and the source's `Checkpoint`, where there is one), adds what is wrong
to the `Findings` and returns how much it looked at. None stops at the first fault.
"""

from __future__ import annotations

import itertools
from collections import Counter
from itertools import filterfalse
from typing import Any

from dsv4.model.labels import EXPERT, MXFP8, label_of
from dsv4.model.names import is_control, kind, module_paths, parse_expert, switch_paths
from dsv4.model.opening import block_counts, expert_bases
from dsv4.model.plan import bundle_keys
from dsv4.proof.findings import Check, Findings
from dsv4.proof.survey import Survey
from dsv4.stop import Stop
from dsv4.storage.bounds import DOCUMENT
from dsv4.storage.checkpoint import INDEX, Checkpoint
from dsv4.storage.durable import TEMPORARY_SUFFIX
from dsv4.storage.junk import is_junk
from dsv4.storage.shard import FLOATS, Tensor
from dsv4.storage.typed import misfit
from dsv4.words import several, shown

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
COUNTS = (
    "num_hidden_layers",
    "n_routed_experts",
    "hidden_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "head_dim",
    "vocab_size",
)


def check_index(bundle: Survey, findings: Findings) -> Check:
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
    if junk := [file for file in bundle.files if is_junk(file)]:
        note += f"; ignored, as runtimes do: {several(junk)}"
    return Check("tensors where the index says", len(holders), note)


def check_strangers(bundle: Survey, findings: Findings) -> None:
    """No safetensors file that the index does not name, and nothing half-written."""
    named = set(bundle.checkpoint.weight_map.values())
    for file in filterfalse(is_junk, bundle.files):
        if file.startswith(".") and file.endswith(TEMPORARY_SUFFIX):
            findings.add("leftover-files", file, f"{bundle.files[file]:,} bytes", "nothing")
        elif "/" not in file and file.endswith(".safetensors") and file not in named:
            findings.add("shard-stranger", file, "not in the index", "only the index's shards")
        elif bundle.files[file] > DOCUMENT and file not in named and file[0] != ".":
            found = f"{bundle.files[file]:,} bytes"
            findings.add("file-unhashed", file, found, f"at most {DOCUMENT:,}")


def quantizer_of(bundle: Survey) -> dict[str, str]:
    """What the shards' metadata say of the requantization: MARKS → value; {} for a stock bundle.

    A shard without experts may keep the mark of an earlier quantizer: it was not written again.
    """
    marked = [s for s in bundle.checkpoint.shards.values() if MARKS[0] in s.metadata]
    with_experts = (s for s in marked if any(map(parse_expert, s.tensors)))
    for shard in itertools.chain(with_experts, marked):
        return {key: shard.metadata.get(key, "") for key in MARKS}
    return {}


def check_marks(bundle: Survey, findings: Findings) -> Check:
    """All shards with routed experts were made of one source by one quantizer, or none was.

    The quantizer mxfp4 leaves stock shards alone: they hold the source's bytes and have no mark.
    """
    marks = {}
    for file, shard in bundle.checkpoint.shards.items():
        if any(parse_expert(name) for name in shard.tensors):
            marks[file] = tuple(shard.metadata.get(key) for key in MARKS)
    if quantizer_of(bundle).get("requantize_quantizer") == "mxfp4":
        marks = {file: mark for file, mark in marks.items() if any(mark)}
    usual = Counter(marks.values()).most_common(1)
    for file, mark in marks.items():
        if usual and mark != usual[0][0]:
            findings.add("marks-mixed", file, f"{mark}", f"{usual[0][0]} as in most shards")
    name = quantizer_of(bundle).get("requantize_quantizer")
    return Check("shards with experts", len(marks), f"quantizer {name or 'not recorded'}")


def check_experts(bundle: Survey, findings: Findings) -> list[Check]:
    """Every routed expert that config.json counts is there; main layers and MTP apart."""
    tensors, unread = bundle.checkpoint.tensors, bundle.unread
    bases = expert_bases(bundle.checkpoint)
    for base in bases:
        if f"{base}.weight" not in tensors and f"{base}.weight" not in unread:
            findings.add("expert-missing", base, "no weight", "one")
    stacked = [name for name in tensors if name.startswith("model.") or ".switch_mlp." in name]
    if stacked:
        findings.add("layout-unknown", stacked[0], "a module path", "storage names", len(stacked))
    known = set(bases)
    for name in tensors:
        if parse_expert(name) and name.rpartition(".")[0] not in known:
            findings.add("expert-extra", name, "beyond config.json's counts", f"{len(bases):,}")
    main = sum(base.startswith("layers.") for base in bases)
    return [
        Check("routed-expert matrices in the main layers", main),
        Check("routed-expert matrices in MTP layers", len(bases) - main, optional=True),
    ]


def check_triples(bundle: Survey, findings: Findings) -> Check:
    """Every quantized module has its parts, and they fit each other."""
    tensors, unread = bundle.checkpoint.tensors, bundle.unread
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        if part in ("scales", "biases") or tensor.dtype == "U32":
            parts.setdefault(base, {})[part] = tensor
    for base, has in parts.items():
        if any(f"{base}.{part}" in unread for part in ("weight", "scales", "biases")):
            continue
        check_triple(base, has, bundle.config, findings)
    return Check("quantized modules", len(parts))


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
        label = labelled(config, base)
        if label.get("mode") == "affine" and parse_expert(f"{base}.weight"):
            findings.add("stock-experts", base, shown, "F16 scales and biases, or mode mxfp4")
        elif stored(has) is None:
            findings.add("triple-misfit", base, shown, "4 or 8 bits × 32 columns a scale")
    elif weight is None or scales is None or biases is None:
        findings.add("triple-incomplete", base, shown or "nothing", "weight, scales and biases")
    elif stored(has) is None:
        findings.add("triple-misfit", base, shown, "U32 weight, F16 scales and biases, group 32")


def labelled(config: dict[str, Any], base: str) -> dict[str, Any]:
    """The label that stands under a storage name, else the one under its module path, else {}."""
    labels = config.get("quantization")
    labels = labels if isinstance(labels, dict) else {}
    expert = parse_expert(f"{base}.weight")
    paths = [base, *(switch_paths(expert[1], expert[3]) if expert else module_paths(base))]
    found = next((labels[path] for path in paths if isinstance(labels.get(path), dict)), None)
    return found or {key: labels.get(key) for key in ("group_size", "bits", "mode")}


def stored(has: dict[str, Tensor]) -> dict[str, Any] | None:
    """The label that fits a module's parts on disk, or None when none does."""
    return label_of(*(has.get(part) for part in ("weight", "scales", "biases")))


def module_parts(bundle: Survey, base: str) -> dict[str, Tensor]:
    """The tensors `base`.{weight,scales,biases} that are there."""
    tensors = bundle.checkpoint.tensors
    names = {part: f"{base}.{part}" for part in ("weight", "scales", "biases")}
    return {part: tensors[name] for part, name in names.items() if name in tensors}


def check_controls(bundle: Survey, findings: Findings) -> Check:
    """Control tensors are F32."""
    controls = [t for name, t in bundle.checkpoint.tensors.items() if is_control(name)]
    for tensor in controls:
        if tensor.dtype != "F32":
            name = "controls-rounded" if tensor.dtype in ("F16", "BF16") else "dtype-wrong"
            findings.add(name, tensor.name, tensor.dtype, "F32")
    return Check("control tensors, F32", len(controls))


def check_counterparts(bundle: Survey, source: Checkpoint, findings: Findings) -> Check:
    """Every source tensor has its counterpart of the right kind and shape, and nothing is extra."""
    tensors = bundle.checkpoint.tensors
    wanted: set[str] = set()
    for name, tensor in source.tensors.items():
        what = kind(name)
        if what == "scale":
            continue
        keys = bundle_keys(name, EXPERT)
        if what == "expert":
            wanted |= set(keys)
            # MXFP4 has no biases; where affine lacks them, its triple tells
            keys = tuple(key for key in keys if not key.endswith(".biases"))
        elif what in ("affine8", "head"):  # other tools quantize the head, or leave a matrix
            plain = name in tensors and tensors[name].dtype in FLOATS
            keys = (name,) if plain else quantized_keys(name)
            fp8 = stored(module_parts(bundle, name.removesuffix(".weight"))) == MXFP8
            keys = keys[:2] if fp8 else keys
        wanted |= set(keys)
        for key in keys:
            if key not in tensors and key not in bundle.unread:
                findings.add("tensor-missing", key, "not there", f"the counterpart of {name}")
        check_counterpart(bundle, tensor, what, findings)
    for name in sorted(set(tensors) - wanted):
        findings.add("tensor-extra", name, "no such tensor in the source", "none")
    return Check("source tensors with their counterparts", len(source.tensors))


def quantized_keys(name: str) -> tuple[str, ...]:
    """The parts of a matrix that is quantized."""
    return tuple(f"{name.removesuffix('weight')}{part}" for part in ("weight", "scales", "biases"))


def check_counterpart(bundle: Survey, origin: Tensor, what: str, findings: Findings) -> None:
    """Shape and dtype of what a bundle makes of one source tensor."""
    base = origin.name.removesuffix(".weight")
    if what in ("expert", "affine8", "head"):
        label = stored(module_parts(bundle, base))
        weight = bundle.checkpoint.tensors.get(origin.name)
        if label is None or weight is None:
            return  # missing, reported with the triples, or not quantized
        if len(origin.shape) != 2:
            findings.add("shape-wrong", origin.name, f"{weight.shape}", f"{origin.shape}")
            return
        rows, words = weight.shape
        found = (rows, words * 32 // label["bits"])
        columns = origin.shape[1] * (2 if what == "expert" else 1)
        if found != (origin.shape[0], columns):
            findings.add("shape-wrong", origin.name, f"{found}", f"{(origin.shape[0], columns)}")
        return
    tensor = bundle.checkpoint.tensors.get(origin.name)
    if tensor is None:
        return
    if tensor.shape != origin.shape:
        findings.add("shape-wrong", tensor.name, f"{list(tensor.shape)}", f"{list(origin.shape)}")
    whole = origin.dtype not in (*FLOATS, "F64")
    if what == "passthrough" and tensor.dtype not in ((origin.dtype,) if whole else FLOATS):
        findings.add("dtype-wrong", tensor.name, tensor.dtype, origin.dtype if whole else "F16")


def check_config(bundle: Survey, source: Checkpoint | None, findings: Findings) -> Check:
    """config.json's counts are numbers, and what describes the model is the source's."""
    config = bundle.config
    for key in COUNTS:
        value = config.get(key)
        if misfit(value, int) or value < 1:
            findings.add("config-broken", f"config.json: {key}", shown(value), "a whole number")
    if "config-broken" not in findings:
        try:
            block_counts(bundle.checkpoint)
        except Stop as stop:
            findings.add("config-broken", "config.json", f"{stop}", "counts of a model")
    if source is None:
        return Check("fields of config.json", len(COUNTS))
    keys = set(source.config) - OURS
    for key in sorted(keys):
        if config.get(key) != source.config[key]:
            findings.add(
                "config-differs",
                f"config.json: {key}",
                shown(config.get(key)),
                f"{shown(source.config[key])} as in the source",
            )
    return Check("fields of config.json as in the source", len(keys))
