"""Level 1: check stop tokens, sampling defaults, and the labels in config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from dsv4.model import defaults, mtp
from dsv4.model.configs import code_keys
from dsv4.model.json_schemas import FORMS
from dsv4.model.labels import EXPERT, SOURCE, TURBO, fp8_bases, recorded_mtp
from dsv4.model.names import GROUP, module_paths, parse_expert, switch_paths
from dsv4.model.naming_schemes import MLX_LM, MLX_VLM, RUNTIMES, STORAGE, VMLX
from dsv4.model.special_tokens import STOP_TOKENS, vocabulary
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_json
from dsv4.storage.safetensors_file import FLOATS
from dsv4.text import escape_line, short_repr
from dsv4.verification.checks.stored_formats import (
    LABEL_KEYS,
    config_labels,
    label_at,
    own_label,
    top_label,
)
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

VMLX_GROUP = 64  # the group size that vMLX 1.6.81 assumes without one in jang_config.json


def check_code(bundle: Scan, findings: Findings) -> Check:
    """Check that no key of a JSON file names code that a loader would run."""
    names = [name for name in bundle.documents if name not in (INDEX, "tokenizer.json")]
    for name in names:
        for key, value in code_keys(bundle.documents[name]):
            findings.add("config-runs-code", f"{name}: {key}", f"{value!r}", "no such key")
    return Check("documents without a key that names code", len(names))


def check_stops(bundle: Scan, findings: Findings) -> Check:
    """Check the stop tokens, and jang_config.json's group size."""
    check_stop_tokens(bundle, findings)
    if "jang_config.json" in bundle.documents:
        if wrong := wrong_jang_group(bundle):
            where = "jang_config.json: quantization.group_size"
            findings.add("jang-config-group-size", where, *wrong)
    elif group_size(bundle) and "jang_config.json" not in bundle.files:
        findings.add("jang-config-group-size", "jang_config.json", "no such file", "one")
    return Check("files that steer a conversation", len(bundle.documents))


def wrong_jang_group(bundle: Scan) -> tuple[str, str] | None:
    """Return (found, expected) when vMLX would take another group size than the tensors have.

    The jang_config.json that jang 2.5.50 writes names no group size: vMLX 1.6.81 then uses labels
    and shapes, and was right (measured on its 2- and 3-bit bundles of the nano model).
    """
    quantization = bundle.documents.get("jang_config.json", {}).get("quantization")
    quantization = quantization if isinstance(quantization, dict) else {}
    found, expected = quantization.get("group_size"), group_size(bundle)
    by_jang = not bundle.is_ours and "routed_experts" in quantization
    if expected in (0, found) or (found is None and (by_jang or expected == VMLX_GROUP)):
        return None
    return short_repr(found), f"{expected}"


def group_size(bundle: Scan) -> int:
    """Return the group size of most affine modules without a label, for vMLX's jang_config.json.

    0 where vMLX does not load the bundle, or each affine module has a label of its own.
    """
    if VMLX not in bundle.scheme.runtimes:
        return 0
    if bundle.is_ours:
        return GROUP
    names = [n.removesuffix(".biases") for n in bundle.tensors if n.endswith(".biases")]
    names = [name for name in names if own_label(bundle.config, name) is None]
    sizes = Counter(label["group_size"] for n in names if (label := label_at(bundle, n)))
    return max(sizes, key=lambda size: sizes[size], default=0)


def check_defaults(bundle: Scan, source: Checkpoint | None, findings: Findings) -> Check:
    """Check that no document limits answers or overrides generation_config.json's sampling."""
    theirs = {name: source_document(source, name) for name in defaults.DOCUMENTS}
    own = bundle.documents.get(defaults.GENERATION, {})
    generation = defaults.reference(own, theirs[defaults.GENERATION])
    names = [name for name in defaults.DOCUMENTS if name in bundle.documents]
    for name in names:
        document, original = bundle.documents[name], theirs[name] or {}
        for holder, prefix, key in defaults.overrides(name, document, generation, original):
            right = defaults.expected(generation, key)
            expected = "none" if right is None else f"{short_repr(right)}, by {defaults.GENERATION}"
            fault = "answer-limit" if key in defaults.LIMITS else "sampling-differs"
            findings.add(fault, f"{name}: {prefix}{key}", short_repr(holder[key]), expected)
    return Check("documents that could limit answers", len(names))


def source_document(source: Checkpoint | None, name: str) -> dict[str, Any] | None:
    """Return a JSON object of the source's folder; None without a source or file."""
    path = source.folder / name if source is not None else None
    return read_json(path, FORMS.get(name, {})) if path is not None and path.is_file() else None


def stop_token_ids(tokenizer: dict[str, Any]) -> list[int] | None:
    """Return the ids of STOP_TOKENS in a parsed tokenizer.json; None when it lacks one."""
    ids = vocabulary(tokenizer)
    found = [ids.get(token) for token in STOP_TOKENS]
    return None if None in found else found


def check_stop_tokens(bundle: Scan, findings: Findings) -> None:
    """Check that both files that runtimes read hold the ids of end of sentence and <｜User｜>."""
    tokenizer = bundle.documents.get("tokenizer.json")
    if tokenizer is None:
        return
    eos = stop_token_ids(tokenizer)
    if eos is None:
        found = f"no {' or '.join(STOP_TOKENS)}"
        findings.add("tokenizer-missing", "tokenizer.json", found, "DeepSeek-V4's tokenizer")
        return
    for name in ("config.json", "generation_config.json"):
        document = bundle.documents.get(name)
        found = document.get("eos_token_id") if document is not None else eos
        if found != eos:
            few = bundle.scheme is not STORAGE and found in (eos[0], eos[:1])
            fault = "eos-few" if few else "eos-wrong"
            findings.add(fault, f"{name}: eos_token_id", short_repr(found), f"{eos}")


def labels_in_use(bundle: Scan) -> Iterator[tuple[str, str, str]]:
    """Yield (key of `quantization`, storage name of the module that it labels, who looks it up).

    A bundle with other names than storage names: every module with scales, once for each stack of
    experts.
    """
    if bundle.scheme is not STORAGE:
        yield from disk_paths_in_use(bundle)
        return
    for base in bundle.bases:
        block, layer, _, matrix, _ = parse_expert(f"{base}.weight") or ("", 0, 0, "w1", "")
        if block == "layers":
            yield from zip(switch_paths(layer, matrix), (base, base), RUNTIMES[:2], strict=True)
        yield base, base, RUNTIMES[2]
    if not bundle.is_ours:
        yield from module_paths_in_use(bundle)
    for base in fp8_bases(bundle.tensors):
        names = module_paths(base)
        yield from zip(names, [base] * len(names), RUNTIMES, strict=False)
        yield base, base, RUNTIMES[2]


def module_paths_in_use(bundle: Scan) -> Iterator[tuple[str, str, str]]:
    """Yield what mlx_lm looks up for modules that are no routed experts, as `labels_in_use`.

    The bundles that this recipe makes need none: their top-level label holds for these modules.
    """
    top = {"embed": "model.embed", "head": "lm_head"}
    for name in bundle.tensors:
        base, _, part = name.rpartition(".")
        if part == "scales" and not parse_expert(name) and not mtp.is_mtp(name):
            for path in (top[base],) if base in top else module_paths(base)[:1]:
                yield path, base, MLX_LM


def disk_paths_in_use(bundle: Scan) -> Iterator[tuple[str, str, str]]:
    """Yield the same for a bundle with module paths on disk: runtimes look up these paths.

    mlx-vlm also accepts shorter names; its own path begins with language_model.
    """
    labels = config_labels(bundle.config)
    yielded = set()
    for name in bundle.tensors:
        base, _, part = name.rpartition(".")
        path = bundle.scheme.runtime_name(f"{base}.weight") if part == "scales" else None
        if path is None or path in yielded:
            continue
        yielded.add(path)
        path = path.removesuffix(".weight").removesuffix(".G")
        if MLX_VLM in bundle.scheme.runtimes:
            own = f"language_model.{path.removeprefix('language_model.')}"
            short = own.removeprefix("language_model.")
            aliases = (own, short, short.removeprefix("model."), base)
            yield next((a for a in aliases if a in labels), own), base, MLX_VLM
        else:
            yield path, base, bundle.scheme.who


def check_labels(bundle: Scan, findings: Findings) -> Check:
    """Check that the label that each runtime finds for a module fits the module's tensors."""
    labels = bundle.config.get("quantization")
    second = bundle.config.get("quantization_config", labels)
    if second != labels or ("quantization_config" in bundle.config and bundle.is_ours):
        name = "label-twice" if second == labels else "label-two-dicts"
        findings.add(name, "config.json", "quantization_config", "quantization alone")
    bases = {n.rpartition(".")[0] for n in bundle.tensors if n.endswith(".scales")}
    if not isinstance(labels, dict):
        if bases or bundle.is_ours:
            found = f"quantization {short_repr(labels)}"
            findings.add("label-absent", "config.json", found, "labels")
        return Check("labels", 0, "nothing is quantized", optional=not bases)
    named = list(labels_in_use(bundle))
    experts = {base for _, base, _ in named}
    if bundle.scheme is STORAGE:
        named += [(base, base, "every runtime") for base in sorted(bases - experts)]
    exact_mtp = recorded_mtp(bundle.config) == mtp.SOURCE
    wrong: set[str] = set()  # 256 experts share a key, which is reported once
    for key, base, runtime in named:
        stored = label_at(bundle, base)
        stays = exact_mtp and mtp.is_mtp(base)
        if stored and stored["mode"] == "mxfp4" and "stock-experts" in findings and not stays:
            stored = EXPERT  # the label after requantize
        if stored is not None and stored["mode"] not in (TURBO, SOURCE) and key not in wrong:
            right = check_label(labels, key, stored, runtime, findings)
            wrong |= set() if right else {key}
    known = {key for key, _, _ in named}
    check_needless_labels(bundle, known if bundle.is_ours else known | aliases_of(named), findings)
    dropped = dropped_by_unpatched_loader(bundle)
    note = f"jang 2.5.8 and 2.5.9 drop {dropped:,} of them unless make patch_loader repairs them"
    return Check("labels that runtimes look up", len(named), note if dropped else "")


def aliases_of(named: list[tuple[str, str, str]]) -> set[str]:
    """Return every name under which a runtime may look up one of these modules."""
    found = set()
    for key, base, _ in named:
        expert = parse_expert(f"{base}.weight")
        found |= {key, base, *module_paths(base)}
        if expert:
            found |= set(switch_paths(expert[1], expert[3]))
    return found


def check_needless_labels(bundle: Scan, known: set[str], findings: Findings) -> None:
    """Check that no label is of an unquantized module, or of a module that does not exist."""
    for key, label in bundle.config["quantization"].items():
        where = f"config.json: quantization[{short_repr(key)}]"
        if labels_unquantized(bundle, key, label):
            findings.add("label-for-plain", where, describe_label(label), "none")
        if key not in known and isinstance(label, dict) and set(LABEL_KEYS) & set(label):
            findings.add("label-stray", where, "a label", "none")


def labels_unquantized(bundle: Scan, key: str, label: Any) -> bool:
    """Return whether this is the label of a module with a tensor of floats.

    False for a bundle with storage names, where runtimes accept such a label.
    """
    if not isinstance(label, dict) or bundle.scheme is STORAGE:
        return False
    found = bundle.scheme.locate(f"{key}.weight")
    tensor = found and bundle.tensors.get(found.name.replace(".E.", ".0."))
    return tensor is not None and tensor.dtype in FLOATS


def dropped_by_unpatched_loader(bundle: Scan) -> int:
    """Return the number of labels that the loader of jang 2.5.8 and 2.5.9 discards.

    It infers a label for each triple but 5-bit ones, and keeps config.json's labels only if they
    agree with these and are as many (jang_tools.load_jangtq, _patch_quant_config_inplace).
    """
    labels = bundle.config["quantization"]
    own = {key: label for key, label in labels.items() if isinstance(label, dict)}
    if bundle.scheme is not STORAGE:
        return 0
    inferred = {}
    for name in bundle.tensors:
        base, _, part = name.rpartition(".")
        label = label_at(bundle, base) if part == "scales" else None
        if label and label["mode"] == "affine" and label["bits"] != 5:
            inferred[base] = label["bits"]
    agrees = all(
        own.get(base, labels).get("bits") == bits
        for base, bits in inferred.items()
        if base in own or "bits" in labels
    )
    if not inferred or (agrees and len(own) == len(inferred)):
        return 0
    return len(own.keys() - inferred.keys())


def effective_label(labels: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the label that a runtime uses for `key`: its own or the top level's.

    MLX takes a label without a mode as affine. {} for a label that is no object.
    """
    label = labels.get(key, top_label(labels))
    if not isinstance(label, dict):
        return {}
    return label if label.get("mode") is not None else {**label, "mode": "affine"}


def check_label(
    labels: dict[str, Any], key: str, stored: dict[str, Any], runtime: str, findings: Findings
) -> bool:
    """Compare the label that `runtime` finds at `key` with the tensors' label `stored`.

    Returns True when it is right.
    """
    label, expected = effective_label(labels, key), describe_label(stored)
    copied = stored["mode"] != "affine"
    where = f"config.json: quantization[{short_repr(key)}], which {runtime} looks up"
    if label == stored:
        only_at_top = copied and key not in labels and findings.storage
        if only_at_top:
            findings.add("label-at-top-only", where, "none", expected)
        return not only_at_top
    if copied and label.get("mode") != stored["mode"]:
        found = describe_label(label) if key in labels and label else "none"
        findings.add("scales-without-label", where, found, expected)
    if key not in labels:
        found = f"none, so {describe_label(top_label(labels))}"
        findings.add("label-missing", where, found, expected)
    for part, name in (
        ("bits", "label-bits-wrong"),
        ("mode", "label-mode-wrong"),
        ("group_size", "label-group-wrong"),
    ):
        if label.get(part) != stored[part]:
            found = f"{part} {_short(label.get(part))}"
            findings.add(name, where, found, f"{part} {stored[part]}")
    return False


def describe_label(label: dict[str, Any]) -> str:
    """Return a label as text: '4-bit affine, group 32'."""
    bits, mode, size = (
        escape_line(_short(label.get(key))) for key in ("bits", "mode", "group_size")
    )
    return f"{bits}-bit {mode}, group {size}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else short_repr(value)
