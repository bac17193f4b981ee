"""repair's other steps: the index, the tokenizer's files, and what runtimes read of JSON files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.making import metadata
from dsv4.making.requantization import record_of
from dsv4.making.tokenizer_files import REQUIRED, copy, wanted
from dsv4.mending import others
from dsv4.mending.job import NEEDS_SOURCE, Repair, faults, is_broken, set_aside, write_index
from dsv4.mending.whole import files_of_experts, forms, open_whole, wrong_experts
from dsv4.model import defaults, labels
from dsv4.model.names import GROUP
from dsv4.model.template import CHAT_TEMPLATE, ENCODING, release_of, template_for
from dsv4.proof import conversation, turbo_files
from dsv4.proof.documents import group_size
from dsv4.proof.findings import Findings
from dsv4.stop import Stop
from dsv4.storage import bounds
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_json
from dsv4.storage.durable import write_bytes, write_json
from dsv4.weights.quantizer import QUANTIZERS

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
    "turbo-config-": turbo_files.DOCUMENTS,
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


def mend_index(repair: Repair) -> None:
    """The index names what the shards hold. What it calls missing is another checkpoint's: the
    bundle's own shards are there, or no step had begun."""
    found = faults(repair).names
    named = [n for n in sorted(found) if n.startswith("index-") or n == "shard-missing"]
    if named and repair.say(", ".join(named), f"rebuilt: {INDEX}"):
        repair.backup.keep([INDEX])
        write_index(repair)


def mend_files(repair: Repair) -> None:
    """Tokenizer and encoding files that are missing, empty or broken: from source or reference."""
    named = sorted(faults(repair).names & set(FILES))
    if not named:
        return
    origin = repair.args.reference or repair.args.source
    if origin is None:
        raise Stop(f"{repair.bundle}", ", ".join(named), "tokenizer and encoding files",
                   f"{NEEDS_SOURCE}, or a bundle that has them: REFERENCE=…")  # fmt: skip
    bad = {n for n in REQUIRED if n.endswith(".json") and is_broken(repair.bundle, n)}
    bad |= {FILES[name] for name in named}
    bad |= {conversation.SPECIAL} if "special-token-wrong" in named else set()
    names = [n for n in wanted(origin) if n in bad or size_of(repair.bundle / n) == 0]
    stale = {conversation.SPECIAL} & bad - set(wanted(origin))  # the source does without it
    done = f"copied from {origin}: {', '.join(names)}" if names else "moved away"
    if repair.say(", ".join(named), done):
        repair.backup.keep([*names, *sorted(stale)])
        copy(origin, repair.bundle, names)
        for name in stale:
            (repair.bundle / name).unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """A file's size in bytes; 0 when it is not there."""
    return path.stat().st_size if path.is_file() else 0


def mend_metadata(repair: Repair) -> None:
    """Labels, stop tokens, template, group size: each JSON file in which a fault lies."""
    found = faults(repair)
    files = {f for name in found.names for start, of in METADATA.items() if name.startswith(start)
             for f in of}  # fmt: skip
    bundle = open_whole(repair.bundle)
    makers = {
        "config.json": lambda: config(repair, bundle),
        "generation_config.json": lambda: metadata.generation_config(repair.bundle),
        "tokenizer_config.json": lambda: tokenizer_config(repair, found),
        "jang_config.json": lambda: jang_config(repair, found),
    }
    if repair.experts or recorded(bundle) != bundle.config.get(labels.RECORD):
        files.add("config.json")
    if any(name.startswith("chat-template") for name in found.names):
        repair.attempt(mend_template)
    for name in sorted(files):
        repair.attempt(mend_document, name, makers[name])


def mend_template(repair: Repair) -> None:
    """Write chat_template.jinja as it is to go with tokenizer_config.json, if that changes it."""
    name = CHAT_TEMPLATE
    path = repair.bundle / name
    text = template(repair).encode()
    same = path.is_file() and bounds.read(path) == text
    if not same and repair.say(f"{name}: another template than runtimes need", "written"):
        repair.backup.keep([name])
        write_bytes(path, text)


def template(repair: Repair) -> str:
    """The text for both places: one that is there and right, else this recipe's."""
    folder = repair.bundle
    encoding = folder / ENCODING
    release = (release_of(bounds.read(encoding)) if encoding.is_file() else None) or ""
    in_config = read_json(folder / "tokenizer_config.json").get("chat_template")
    for text in (metadata.template_file(folder), in_config):
        if isinstance(text, str) and text and not conversation.judge(text, release):
            return text
    return template_for(folder)


def mend_document(repair: Repair, name: str, make: Callable[[], dict[str, Any]]) -> None:
    """Write one JSON file, if that changes it."""
    if not repair.args.dry_run:
        set_aside(repair, [name])
    elif is_broken(repair.bundle, name):
        repair.say(f"{name}: no JSON object", "made anew")
        return
    source = repair.source.folder if repair.source is not None else None
    content = metadata.cleaned(repair.bundle, source, name, make())
    metadata.check_json(name, content)
    changes = metadata.differences(repair.bundle, {name: content})
    keys = [change.removeprefix(f"{name}: ") for change in changes]
    if changes and repair.say(f"{name}: other {', '.join(keys)} than runtimes need", "set"):
        repair.backup.keep([name])
        write_json(repair.bundle / name, content)


def config(repair: Repair, bundle: Checkpoint) -> dict[str, Any]:
    """config.json with labels as the experts lie there, or as they were if some are wrong still."""
    experts = repair.experts
    if experts is None and others.keeps_experts(others.surveyed(bundle)):
        return others.config(repair)
    if experts is None and not wrong_experts(bundle):
        experts = forms(bundle)
        experts = experts if labels.in_stacks(experts) else None
    content = metadata.config(bundle, experts)
    copied = experts and all(one == labels.MXFP4 for one in experts.values())
    record = recorded(bundle) or (record_of(QUANTIZERS["mxfp4"]()) if copied else None)
    return {**content, labels.RECORD: record} if record else content


def recorded(bundle: Checkpoint) -> dict[str, str] | None:
    """config.json's record of the quantizer: as the shards' marks have it, else its own."""
    keys = ("requantize_quantizer", "requantize_table")
    marks = {
        tuple(bundle.shards[file].metadata.get(key) for key in keys)
        for file in files_of_experts(bundle)
    }
    if len(marks) == 1 and all(mark := marks.pop()):
        return {"quantizer": mark[0], "table": mark[1]}
    return bundle.config.get(labels.RECORD)


def tokenizer_config(repair: Repair, found: Findings) -> dict[str, Any]:
    """tokenizer_config.json with this recipe's template where the file's own is wrong."""
    content = metadata.tokenizer_config(repair.bundle)
    if any(name.startswith("chat-template") for name in found.names):
        content["chat_template"] = template(repair)
    return content


def jang_config(repair: Repair, found: Findings) -> dict[str, Any]:
    """jang_config.json; what it says of its source stays, and a group size that is right."""
    path = repair.bundle / "jang_config.json"
    own = read_json(path) if path.is_file() else {}
    kept = {key: own[key] for key in ("source_model", "source") if key in own}
    content = metadata.jang_config(repair.bundle, repair.args.source) | kept
    bundle = others.surveyed(open_whole(repair.bundle))
    quantized = own.get("quantization")
    if "jang-config-group-size" in found:
        content["quantization"]["group_size"] = group_size(bundle) or GROUP
    elif quantized is not None:
        content["quantization"] = quantized
    else:
        del content["quantization"]
    return content | turbo_files.corrections(content, bundle)
