"""repair's other steps: the index, the tokenizer's files, and what runtimes read of JSON files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.conversion import runtime_documents
from dsv4.conversion.requantize import quantizer_record
from dsv4.conversion.tokenizer_files import REQUIRED, copy_files, required_files
from dsv4.errors import UserError
from dsv4.model import defaults, labels
from dsv4.model.chat_template import CHAT_TEMPLATE, ENCODING, encoding_release, template_for
from dsv4.model.names import GROUP
from dsv4.quantization.formats import QUANTIZERS
from dsv4.repair import foreign_layouts
from dsv4.repair.context import (
    NEEDS_SOURCE,
    RepairContext,
    is_broken,
    level1_findings,
    set_aside,
    write_index,
)
from dsv4.repair.shards_on_disk import (
    expert_formats,
    files_of_experts,
    open_by_shards,
    wrong_experts,
)
from dsv4.storage import limits, safe_paths
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_json
from dsv4.verification.checks import conversation, turboquant_files
from dsv4.verification.checks.documents import group_size
from dsv4.verification.report.findings import Findings

# Faults, by how their names begin → the files that hold them, for those that patch writes.
DOCUMENTS = ("config.json", "generation_config.json", "jang_config.json", "tokenizer_config.json")
METADATA = {
    "config-runs-code": DOCUMENTS,
    "answer-limit": defaults.DOCUMENTS,
    "sampling-differs": defaults.DOCUMENTS,
    "label-": ("config.json",),
    "scales-without-label": ("config.json",),
    "eos-": ("config.json", "generation_config.json"),
    "special-token-": ("config.json", "generation_config.json", "tokenizer_config.json"),
    "chat-template": ("tokenizer_config.json",),
    "tokenizer-config-": ("tokenizer_config.json",),
    "generation-config-": ("generation_config.json",),
    "jang-config-": ("jang_config.json",),
    "turbo-config-": turboquant_files.DOCUMENTS,
}
# Faults that a file of the source cures → that file; "" where only absence or JSON was at fault.
FILES = {
    "encoding-missing": "",
    "encoding-differs": ENCODING,
    "tokenizer-missing": "tokenizer.json",
    "tokenizer-differs": "tokenizer.json",
    "token-out-of-range": "tokenizer.json",
    "tokenizer-config-broken": "",
    "tokenizer-config-differs": "tokenizer_config.json",
    "special-token-wrong": "tokenizer_config.json",
    "special-tokens-differ": conversation.SPECIAL,
    "generation-config-differs": "generation_config.json",
}


def mend_index(repair: RepairContext) -> None:
    """The index names what the shards hold. What it calls missing is another checkpoint's: the
    bundle's own shards are there, or no step had begun."""
    found = level1_findings(repair).names
    named = [n for n in sorted(found) if n.startswith("index-") or n == "shard-missing"]
    if named and repair.report(", ".join(named), f"rebuilt: {INDEX}"):
        repair.backup.keep([INDEX])
        write_index(repair)


def mend_files(repair: RepairContext) -> None:
    """Tokenizer and encoding files that are missing, empty or broken: from source or reference."""
    named = sorted(level1_findings(repair).names & set(FILES))
    if not named:
        return
    origin = repair.args.reference or repair.args.source
    if origin is None:
        raise UserError(f"{repair.bundle}", ", ".join(named), "tokenizer and encoding files",
                   f"{NEEDS_SOURCE}, or a bundle that has them: REFERENCE=…")  # fmt: skip
    bad = {n for n in REQUIRED if n.endswith(".json") and is_broken(repair.bundle, n)}
    bad |= {FILES[name] for name in named}
    bad |= {conversation.SPECIAL} if "special-token-wrong" in named else set()
    names = [n for n in required_files(origin) if n in bad or size_of(repair.bundle / n) == 0]
    stale = {conversation.SPECIAL} & bad - set(required_files(origin))  # the source does without it
    done = f"copied from {origin}: {', '.join(names)}" if names else "moved away"
    if repair.report(", ".join(named), done):
        repair.backup.keep([*names, *sorted(stale)])
        copy_files(origin, repair.bundle, names)
        for name in stale:
            safe_paths.remove(repair.bundle, name)


def size_of(path: Path) -> int:
    """A file's size in bytes; 0 when it is not there."""
    return path.stat().st_size if path.is_file() else 0


def mend_metadata(repair: RepairContext) -> None:
    """Labels, stop tokens, template, group size: each JSON file in which a fault lies."""
    found = level1_findings(repair)
    files = {f for name in found.names for start, of in METADATA.items() if name.startswith(start)
             for f in of}  # fmt: skip
    bundle = open_by_shards(repair.bundle)
    makers = {
        "config.json": lambda: relabelled_config(repair, bundle),
        "generation_config.json": lambda: runtime_documents.generation_config(repair.bundle),
        "tokenizer_config.json": lambda: tokenizer_config(repair, found),
        "jang_config.json": lambda: jang_config(repair, found),
    }
    if repair.experts or recorded_quantizer(bundle) != bundle.config.get(labels.RECORD):
        files.add("config.json")
    if any(name.startswith("chat-template") for name in found.names):
        repair.attempt(mend_template)
    for name in sorted(files):
        repair.attempt(mend_document, name, makers[name])


def mend_template(repair: RepairContext) -> None:
    """Write chat_template.jinja as it is to go with tokenizer_config.json, if that changes it."""
    name = CHAT_TEMPLATE
    path = repair.bundle / name
    text = right_template(repair).encode()
    same = path.is_file() and limits.read_bounded(path) == text
    if not same and repair.report(f"{name}: another template than runtimes need", "written"):
        repair.backup.keep([name])
        write_bytes(path, text)


def right_template(repair: RepairContext) -> str:
    """The text for both places: one that is there and right, else this recipe's."""
    folder = repair.bundle
    encoding = folder / ENCODING
    release = (
        encoding_release(limits.read_bounded(encoding)) if encoding.is_file() else None
    ) or ""
    in_config = read_json(folder / "tokenizer_config.json").get("chat_template")
    for text in (runtime_documents.template_file(folder), in_config):
        if isinstance(text, str) and text and not conversation.judge_template(text, release):
            return text
    return template_for(folder)


def mend_document(repair: RepairContext, name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Write one JSON file, if that changes it."""
    if not repair.args.dry_run:
        set_aside(repair, [name])
    elif is_broken(repair.bundle, name):
        repair.report(f"{name}: no JSON object", "made anew")
        return
    source = repair.source.folder if repair.source is not None else None
    content = runtime_documents.cleaned(repair.bundle, source, name, make())
    runtime_documents.check_json(name, content)
    changes = runtime_documents.changed_keys(repair.bundle, {name: content})
    keys = [change.removeprefix(f"{name}: ") for change in changes]
    if changes and repair.report(f"{name}: other {', '.join(keys)} than runtimes need", "set"):
        repair.backup.keep([name])
        write_json(repair.bundle / name, content)


def relabelled_config(repair: RepairContext, bundle: Checkpoint) -> dict[str, Any]:
    """config.json with labels as the experts lie there, or as they were if some are wrong still."""
    experts = repair.experts
    if experts is None and foreign_layouts.keeps_experts(foreign_layouts.scan_bundle(bundle)):
        return foreign_layouts.patched_config(repair)
    if experts is None and not wrong_experts(bundle):
        experts = expert_formats(bundle)
        experts = experts if labels.in_stacks(experts) else None
    content = runtime_documents.patched_config(bundle, experts)
    copied = experts and all(one == labels.MXFP4 for one in experts.values())
    record = recorded_quantizer(bundle) or (
        quantizer_record(QUANTIZERS["mxfp4"]()) if copied else None
    )
    return {**content, labels.RECORD: record} if record else content


def recorded_quantizer(bundle: Checkpoint) -> dict[str, str] | None:
    """config.json's record of the quantizer: as the shards' marks have it, else its own."""
    keys = ("requantize_quantizer", "requantize_table")
    marks = {
        tuple(bundle.shards[file].metadata.get(key) for key in keys)
        for file in files_of_experts(bundle)
    }
    if len(marks) == 1 and all(mark := marks.pop()):
        return {"quantizer": mark[0], "table": mark[1]}
    return bundle.config.get(labels.RECORD)


def tokenizer_config(repair: RepairContext, found: Findings) -> dict[str, Any]:
    """tokenizer_config.json with this recipe's template where the file's own is wrong."""
    content = runtime_documents.tokenizer_config(repair.bundle)
    if any(name.startswith("chat-template") for name in found.names):
        content["chat_template"] = right_template(repair)
    return content


def jang_config(repair: RepairContext, found: Findings) -> dict[str, Any]:
    """jang_config.json; what it says of its source stays, and so do groups that are right."""
    path = repair.bundle / "jang_config.json"
    own = read_json(path) if path.is_file() else {}
    kept = {key: own[key] for key in ("source_model", "source") if key in own}
    content = runtime_documents.jang_config(repair.bundle, repair.args.source) | kept
    bundle = foreign_layouts.scan_bundle(open_by_shards(repair.bundle))
    quantized = own.get("quantization")
    if "jang-config-group-size" in found:
        content["quantization"]["group_size"] = group_size(bundle) or GROUP
    elif quantized is not None:
        content["quantization"] = quantized
    else:
        del content["quantization"]
    return content | turboquant_files.wrong_keys(content, bundle)
