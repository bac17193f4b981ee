"""Plan the repair of the index, the tokenizer's files and the JSON files that runtimes read."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.conversion import runtime_documents
from dsv4.conversion.bundle_files import quantizer_record
from dsv4.conversion.tokenizer_files import REQUIRED, copy_files, required_files
from dsv4.errors import UserError
from dsv4.model import defaults, labels
from dsv4.model.chat_template import CHAT_TEMPLATE, ENCODING, encoding_release, template_for
from dsv4.model.names import GROUP
from dsv4.quantization.formats import get_quantizer
from dsv4.repair import foreign_layouts
from dsv4.repair.context import (
    NEEDS_SOURCE,
    RepairContext,
    is_broken,
    remove_broken,
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
from dsv4.verification.checks import (
    check_all,
    conversation,
    runtime_outcomes,
    turboquant_files,
)
from dsv4.verification.checks.documents import group_size
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

# Prefix of a finding's name → the files with the fault, for files that patch writes.
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
# Finding → the file to copy from the source; "" when that file is missing or no JSON anyway.
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


def plan_index(repair: RepairContext) -> None:
    """Plan a new index when it does not match the shards.

    A shard that it names and the folder lacks is another checkpoint's: repair does not start when
    one of the bundle's own shards is missing.
    """
    found = repair.findings.names
    faults = [n for n in sorted(found) if n.startswith("index-") or n == "shard-missing"]
    if faults:
        write = functools.partial(write_index, repair)
        repair.plan(", ".join(faults), f"rebuilt: {INDEX}", write)


def plan_files(repair: RepairContext) -> None:
    """Plan copies of missing or wrong tokenizer and encoding files, from source or reference."""
    faults = sorted(repair.findings.names & set(FILES))
    if not faults:
        return
    origin = repair.options.reference or repair.options.source
    if origin is None:
        raise UserError(f"{repair.bundle}", ", ".join(faults), "tokenizer and encoding files",
                   f"{NEEDS_SOURCE}, or a bundle that has them: REFERENCE=…")  # fmt: skip
    bad = {n for n in REQUIRED if n.endswith(".json") and is_broken(repair.bundle, n)}
    bad |= {FILES[name] for name in faults}
    bad |= {conversation.SPECIAL} if "special-token-wrong" in faults else set()
    names = [n for n in required_files(origin) if n in bad or size_of(repair.bundle / n) == 0]
    stale = {conversation.SPECIAL} & bad - set(required_files(origin))  # the source has none
    change = f"copied from {origin}: {', '.join(names)}" if names else "moved away"

    def apply() -> None:
        repair.backup.keep([*names, *sorted(stale)])
        copy_files(origin, repair.bundle, names)
        for name in stale:
            safe_paths.remove(repair.bundle, name)

    repair.plan(", ".join(faults), change, apply)


def size_of(path: Path) -> int:
    """Return a file's size in bytes, 0 when it does not exist."""
    return path.stat().st_size if path.is_file() else 0


def plan_metadata(repair: RepairContext) -> None:
    """Plan every JSON file with a fault: labels, stop tokens, template, group size."""
    found = repair.findings
    files = {f for name in found.names for start, of in METADATA.items() if name.startswith(start)
             for f in of}  # fmt: skip
    bundle = open_by_shards(repair.bundle)
    makers = {
        "config.json": lambda: relabelled_config(repair),
        "generation_config.json": lambda: runtime_documents.generation_config(repair.bundle),
        "tokenizer_config.json": lambda: tokenizer_config(repair, found),
        "jang_config.json": lambda: jang_config(repair, found),
    }
    if repair.experts or recorded_quantizer(bundle) != bundle.config.get(labels.RECORD):
        files.add("config.json")
    if any(name.startswith("chat-template") for name in found.names):
        repair.attempt(plan_template)
    for name in sorted(files):
        repair.attempt(plan_document, name, makers[name])


def plan_outcomes(repair: RepairContext) -> None:
    """Plan the keys to be put back that make a runtime answer wrongly, when nothing else is left.

    The runtimes are asked only then, because that takes seconds.
    """
    options = repair.options
    if options.without_loader or (repair.actions and not options.dry_run):
        return
    bundle = scan(repair.bundle, Findings())
    if bundle is None or "layout-unknown" in repair.findings:
        return
    loaders, mended = check_all.promised_loaders(bundle), {}
    with contextlib.suppress(UserError):  # a toolchain that does not run is verify's to report
        mended = runtime_outcomes.mended_documents(bundle, repair.source, options.python, loaders)
    for name, (content, keys) in mended.items():
        what = f"{name}: {', '.join(filter(None, keys)) or 'a file'} that a runtime takes wrongly"
        write = functools.partial(write_document, repair, name, content)
        repair.plan(what, "set" if content else "moved away", write)


def write_document(repair: RepairContext, name: str, content: dict[str, Any] | None) -> None:
    """Write a JSON file, or remove it for None, after its original is kept."""
    repair.backup.keep([name])
    if content is None:
        safe_paths.remove(repair.bundle, name)
    else:
        write_json(repair.bundle / name, content)


def plan_template(repair: RepairContext) -> None:
    """Plan chat_template.jinja with the text that tokenizer_config.json gets."""
    path = repair.bundle / CHAT_TEMPLATE
    text = right_template(repair).encode()

    def apply() -> None:
        repair.backup.keep([CHAT_TEMPLATE])
        write_bytes(path, right_template(repair).encode())

    if not path.is_file() or limits.read_bounded(path) != text:
        repair.plan(f"{CHAT_TEMPLATE}: another template than runtimes need", "written", apply)


def right_template(repair: RepairContext) -> str:
    """Return the template for both places: a right one of the bundle, else this recipe's."""
    folder = repair.bundle
    encoding = folder / ENCODING
    release = (
        encoding_release(limits.read_bounded(encoding)) if encoding.is_file() else None
    ) or ""
    in_config = read_json(folder / "tokenizer_config.json").get("chat_template")
    for text in (runtime_documents.template_file(folder), in_config):
        if isinstance(text, str) and text and not conversation.template_faults(text, release):
            return text
    return template_for(folder)


def plan_document(repair: RepairContext, name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Plan one JSON file, if that changes it.

    The content is made again when the action is applied, after the actions before it.
    """
    source = repair.source.folder if repair.source is not None else None

    def content() -> dict[str, Any]:
        made = runtime_documents.cleaned(repair.bundle, source, name, make())
        runtime_documents.check_json(name, made)
        return made

    def apply() -> None:
        remove_broken(repair, [name])
        made = content()
        if runtime_documents.changed_keys(repair.bundle, {name: made}):
            repair.backup.keep([name])
            write_json(repair.bundle / name, made)

    if is_broken(repair.bundle, name):
        repair.plan(f"{name}: no JSON object", "made anew", apply)
        return
    changes = runtime_documents.changed_keys(repair.bundle, {name: content()})
    keys = [change.removeprefix(f"{name}: ") for change in changes]
    if changes:
        repair.plan(f"{name}: other {', '.join(keys)} than runtimes need", "set", apply)


def relabelled_config(repair: RepairContext) -> dict[str, Any]:
    """Return config.json with the labels of the stored experts; the old ones if some are wrong."""
    bundle = open_by_shards(repair.bundle)
    experts = repair.experts
    if experts is None and foreign_layouts.keeps_experts(foreign_layouts.scan_bundle(bundle)):
        return foreign_layouts.patched_config(repair)
    if experts is None and not wrong_experts(bundle):
        experts = expert_formats(bundle)
        experts = experts if labels.in_stacks(experts) else None
    content = runtime_documents.patched_config(bundle, experts)
    copied = experts and all(one == labels.MXFP4 for one in experts.values())
    record = recorded_quantizer(bundle) or (
        quantizer_record(get_quantizer("mxfp4")) if copied else None
    )
    return {**content, labels.RECORD: record} if record else content


def recorded_quantizer(bundle: Checkpoint) -> dict[str, str] | None:
    """Return the record of the quantizer: by the shards' metadata, else config.json's own."""
    keys = ("requantize_quantizer", "requantize_table")
    marks = {
        tuple(bundle.shards[file].metadata.get(key) for key in keys)
        for file in files_of_experts(bundle)
    }
    if len(marks) == 1 and all(mark := marks.pop()):
        return labels.make_record(*mark)
    return bundle.config.get(labels.RECORD)


def tokenizer_config(repair: RepairContext, found: Findings) -> dict[str, Any]:
    """Return tokenizer_config.json, with this recipe's template where the file's own is wrong."""
    content = runtime_documents.tokenizer_config(repair.bundle)
    if any(name.startswith("chat-template") for name in found.names):
        content["chat_template"] = right_template(repair)
    return content


def jang_config(repair: RepairContext, found: Findings) -> dict[str, Any]:
    """Return jang_config.json. Its record of the source and right group sizes stay."""
    path = repair.bundle / "jang_config.json"
    own = read_json(path) if path.is_file() else {}
    kept = {key: own[key] for key in ("source_model", "source") if key in own}
    content = runtime_documents.jang_config(repair.bundle, repair.options.source) | kept
    bundle = foreign_layouts.scan_bundle(open_by_shards(repair.bundle))
    quantized = own.get("quantization")
    if "jang-config-group-size" in found:
        content["quantization"]["group_size"] = group_size(bundle) or GROUP
    elif quantized is not None:
        content["quantization"] = quantized
    else:
        del content["quantization"]
    return content | turboquant_files.corrected_keys(content, bundle)
