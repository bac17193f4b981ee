"""Level 1: the JSON and text files that steer a conversation, and the labels in config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from dsv4.model import defaults
from dsv4.model.configs import code_keys
from dsv4.model.json_schemas import FORMS
from dsv4.model.labels import EXPERT, SOURCE, TURBO, fp8_bases
from dsv4.model.names import GROUP, module_paths, parse_expert, switch_paths
from dsv4.model.naming_schemes import MLX_LM, MLX_VLM, RUNTIMES, STORAGE, VMLX
from dsv4.model.special_tokens import STOP_TOKENS, vocabulary
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_json
from dsv4.storage.safetensors_file import FLOATS
from dsv4.text import escape_line, short_repr
from dsv4.verification.checks.stored_formats import label_at
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

LABEL = ("group_size", "bits", "mode")
VMLX_GROUP = 64  # what vMLX 1.6.81 assumes when jang_config.json does not say


def check_code(bundle: Scan, findings: Findings) -> Check:
    """No key of a JSON file names code that a loader would run."""
    looked = 0
    for name, document in bundle.documents.items():
        if name not in (INDEX, "tokenizer.json"):
            looked += 1
            for place, value in code_keys(document):
                findings.add("config-runs-code", f"{name}: {place}", f"{value!r}", "no such key")
    return Check("documents without a key that names code", looked)


def check_stops(bundle: Scan, findings: Findings) -> Check:
    """Stop tokens, and jang_config.json's group size."""
    check_stop_tokens(bundle, findings)
    jang = bundle.documents.get("jang_config.json")
    wanted = group_size(bundle)
    if jang is not None and wanted:
        found = jang.get("quantization")
        found = found.get("group_size") if isinstance(found, dict) else None
        if found not in (
            wanted,
            None if names_no_group(bundle) or wanted == VMLX_GROUP else wanted,
        ):
            findings.add(
                "jang-config-group-size",
                "jang_config.json: quantization.group_size",
                short_repr(found),
                f"{wanted}",
            )
    elif wanted and "jang_config.json" not in bundle.files:
        findings.add("jang-config-group-size", "jang_config.json", "no such file", "it")
    return Check("files that steer a conversation", len(bundle.documents))


def names_no_group(bundle: Scan) -> bool:
    """True for jang 2.5.50's own jang_config.json, which names no group: vMLX 1.6.81 then goes by
    labels and shapes, and was right (measured on its 2- and 3-bit bundles of the nano)."""
    said = bundle.documents.get("jang_config.json", {}).get("quantization")
    return not bundle.is_ours and isinstance(said, dict) and "routed_experts" in said


def group_size(bundle: Scan) -> int:
    """The columns of a group of most of the bundle's affine modules, which vMLX has to know of;
    0 where it has nothing to know."""
    if VMLX not in bundle.scheme.runtimes:
        return 0
    if bundle.is_ours:
        return GROUP
    names = (n.removesuffix(".biases") for n in bundle.tensors if n.endswith(".biases"))
    sizes = Counter(label["group_size"] for n in names if (label := label_at(bundle, n)))
    return max(sizes, key=lambda size: sizes[size], default=0)


def check_defaults(bundle: Scan, source: Checkpoint | None, findings: Findings) -> Check:
    """No document limits answers, or overrides how generation_config.json samples."""
    theirs = {name: source_document(source, name) for name in defaults.DOCUMENTS}
    own = bundle.documents.get(defaults.GENERATION, {})
    generation = defaults.reference(own, theirs[defaults.GENERATION])
    looked = [name for name in defaults.DOCUMENTS if name in bundle.documents]
    for name in looked:
        document, original = bundle.documents[name], theirs[name] or {}
        for holder, place, key in defaults.overrides(name, document, generation, original):
            right = defaults.expected(generation, key)
            findings.add(
                "answer-limit" if key in defaults.LIMITS else "sampling-differs",
                f"{name}: {place}{key}",
                short_repr(holder[key]),
                "none" if right is None else f"{short_repr(right)}, by {defaults.GENERATION}",
            )
    return Check("documents that could limit answers", len(looked))


def source_document(source: Checkpoint | None, name: str) -> dict[str, Any] | None:
    """A JSON object of the source's folder; None when there is none."""
    path = source.folder / name if source is not None else None
    return read_json(path, FORMS.get(name, {})) if path is not None and path.is_file() else None


def stop_token_ids(tokenizer: dict[str, Any]) -> list[int] | None:
    """The ids of STOP_TOKENS in a parsed tokenizer.json, or None when one is not in it."""
    ids = vocabulary(tokenizer)
    found = [ids.get(token) for token in STOP_TOKENS]
    return None if None in found else found


def check_stop_tokens(bundle: Scan, findings: Findings) -> None:
    """Both places that runtimes read hold the ids of end of sentence and <｜User｜>."""
    tokenizer = bundle.documents.get("tokenizer.json")
    if tokenizer is None:
        return
    eos = stop_token_ids(tokenizer)
    if eos is None:
        findings.add(
            "tokenizer-missing",
            "tokenizer.json",
            f"no {' or '.join(STOP_TOKENS)}",
            "DeepSeek-V4's tokenizer",
        )
        return
    for name in ("config.json", "generation_config.json"):
        document = bundle.documents.get(name)
        found = document.get("eos_token_id") if document is not None else eos
        if found != eos:
            few = bundle.scheme is not STORAGE and found in (eos[0], eos[:1])
            fault = "eos-few" if few else "eos-wrong"
            findings.add(fault, f"{name}: eos_token_id", short_repr(found), f"{eos}")


def labels_in_use(bundle: Scan) -> Iterator[tuple[str, str, str]]:
    """(key in config.json, storage name of a module that is looked up under it, by whom).

    Of a layout with other names, everything that has scales; a stack of experts by its first.
    """
    if bundle.scheme is not STORAGE:
        yield from paths_in_use(bundle)
        return
    for base in bundle.bases:
        block, layer, _, matrix, _ = parse_expert(f"{base}.weight") or ("", 0, 0, "w1", "")
        if block == "layers":
            yield from zip(switch_paths(layer, matrix), (base, base), RUNTIMES[:2], strict=True)
        yield base, base, RUNTIMES[2]
    if not bundle.is_ours:
        yield from paths_of_others(bundle)
    for base in fp8_bases(bundle.tensors):
        names = module_paths(base)
        yield from zip(names, [base] * len(names), RUNTIMES, strict=False)
        yield base, base, RUNTIMES[2]


def paths_of_others(bundle: Scan) -> Iterator[tuple[str, str, str]]:
    """Where mlx_lm looks up what is no routed expert, where the top level may not say it."""
    top = {"embed": "model.embed", "head": "lm_head"}
    for name in bundle.tensors:
        base, _, part = name.rpartition(".")
        if part == "scales" and not parse_expert(name) and not name.startswith("mtp."):
            for path in (top[base],) if base in top else module_paths(base)[:1]:
                yield path, base, MLX_LM


def paths_in_use(bundle: Scan) -> Iterator[tuple[str, str, str]]:
    """The same for a layout that has module paths on disk: a runtime looks them up as they are.

    mlx-vlm also takes a label under a shorter name, and its own path begins with language_model.
    """
    labels = bundle.config.get("quantization")
    labels = labels if isinstance(labels, dict) else {}
    seen = set()
    for name in bundle.tensors:
        base, _, part = name.rpartition(".")
        path = bundle.scheme.runtime_name(f"{base}.weight") if part == "scales" else None
        if path is None or path in seen:
            continue
        seen.add(path)
        path = path.removesuffix(".weight").removesuffix(".G")
        if MLX_VLM in bundle.scheme.runtimes:
            own = f"language_model.{path.removeprefix('language_model.')}"
            short = own.removeprefix("language_model.")
            aliases = (own, short, short.removeprefix("model."), base)
            yield next((a for a in aliases if a in labels), own), base, MLX_VLM
        else:
            yield path, base, bundle.scheme.who


def check_labels(bundle: Scan, findings: Findings) -> Check:
    """The label that each runtime finds for a module is the one that its tensors are stored by."""
    labels = bundle.config.get("quantization")
    if "quantization_config" in bundle.config:
        if bundle.config["quantization_config"] != labels:
            findings.add(
                "label-two-dicts", "config.json", "quantization_config", "quantization alone"
            )
        elif bundle.is_ours:
            findings.add("label-twice", "config.json", "quantization_config", "quantization alone")
    bases = {n.rpartition(".")[0] for n in bundle.tensors if n.endswith(".scales")}
    if not isinstance(labels, dict):
        if bases or bundle.is_ours:
            findings.add(
                "label-absent", "config.json", f"quantization {short_repr(labels)}", "labels"
            )
        return Check("labels", 0, "nothing is quantized", optional=not bases)
    top = {key: labels.get(key) for key in LABEL}
    named = list(labels_in_use(bundle))
    experts = {base for _, base, _ in named}
    if bundle.scheme is STORAGE:
        named += [(base, base, "every runtime") for base in sorted(bases - experts)]
    seen: set[tuple[str, str]] = set()
    for key, base, runtime in named:
        found = label_at(bundle, base)
        if found and found["mode"] == "mxfp4" and "stock-experts" in findings:
            found = EXPERT  # what requantize will make of them
        if found is not None and found["mode"] not in (TURBO, SOURCE):
            judge_label(labels, top, key, found, runtime, seen, findings)
    known = {key for key, _, _ in named}
    check_plain(bundle, labels, findings)
    check_stray(labels, known | aliases_of(named) if not bundle.is_ours else known, findings)
    lost = dropped_by_unpatched_loader(bundle)
    said = f"jang 2.5.8 and 2.5.9 drop {lost:,} of them unless make patch_loader mends them"
    return Check("labels that runtimes look up", len(named), said if lost else "")


def aliases_of(named: list[tuple[str, str, str]]) -> set[str]:
    """Other names under which somebody may look a module of these up."""
    found = set()
    for key, base, _ in named:
        expert = parse_expert(f"{base}.weight")
        found |= {key, base, *module_paths(base)}
        if expert:
            found |= set(switch_paths(expert[1], expert[3]))
    return found


def check_plain(bundle: Scan, labels: dict[str, Any], findings: Findings) -> None:
    """No label for a module whose tensor is not quantized, in layouts with module paths."""
    for key, label in labels.items():
        if is_plain(bundle, key, label):
            where = f"config.json: quantization[{short_repr(key)}]"
            findings.add("label-for-plain", where, describe_label(label), "none")


def is_plain(bundle: Scan, key: str, label: Any) -> bool:
    """True for the label of a module that has a tensor of floats."""
    if not isinstance(label, dict) or bundle.scheme is STORAGE:
        return False
    place = bundle.scheme.locate(f"{key}.weight")
    tensor = place and bundle.tensors.get(place.name.replace(".E.", ".0."))
    return tensor is not None and tensor.dtype in FLOATS


def dropped_by_unpatched_loader(bundle: Scan) -> int:
    """How many labels jang 2.5.8's and 2.5.9's loader would throw away before using them.

    It infers a label for each triple and keeps the config's own only if they disagree nowhere and
    are as many (jang_tools.load_jangtq, _patch_quant_config_inplace); 5-bit triples it skips.
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


def judge_label(
    labels: dict[str, Any],
    top: dict[str, Any],
    key: str,
    stored_as: dict[str, Any],
    runtime: str,
    seen: set[tuple[str, str]],
    findings: Findings,
) -> None:
    """Compare one label with the tensors; a key that 256 experts share is reported once."""
    label = labels.get(key, top)
    if isinstance(label, dict) and label.get("mode") is None:
        label = {**label, "mode": "affine"}  # MLX's own default
    copied = stored_as["mode"] != "affine"
    by_top = copied and label == stored_as and key not in labels and findings.storage
    if (label == stored_as and not by_top) or (key, "") in seen:
        return
    seen.add((key, ""))
    where = f"config.json: quantization[{short_repr(key)}], which {runtime} looks up"
    if by_top:
        findings.add("label-at-top-only", where, "none", describe_label(stored_as))
        return
    if copied and (not isinstance(label, dict) or label.get("mode") != stored_as["mode"]):
        found = describe_label(label) if key in labels and isinstance(label, dict) else "none"
        findings.add("scales-without-label", where, found, describe_label(stored_as))
    if key not in labels:
        findings.add(
            "label-missing", where, f"none, so {describe_label(top)}", describe_label(stored_as)
        )
    label = label if isinstance(label, dict) else {}
    for part, name in (
        ("bits", "label-bits-wrong"),
        ("mode", "label-mode-wrong"),
        ("group_size", "label-group-wrong"),
    ):
        if label.get(part) != stored_as[part]:
            found = label.get(part)
            findings.add(name, where, f"{part} {_short(found)}", f"{part} {stored_as[part]}")


def describe_label(label: dict[str, Any]) -> str:
    """A label for a reader: '4-bit affine, group 32'."""
    bits, mode, size = (
        escape_line(_short(label.get(key))) for key in ("bits", "mode", "group_size")
    )
    return f"{bits}-bit {mode}, group {size}"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else short_repr(value)


def check_stray(labels: dict[str, Any], known: set[str], findings: Findings) -> None:
    """No label under a name that no module has."""
    for key in labels:
        label = labels[key] if isinstance(labels[key], dict) else {}
        if key not in known and set(LABEL) & set(label):
            findings.add(
                "label-stray", f"config.json: quantization[{short_repr(key)}]", "a label", "none"
            )
