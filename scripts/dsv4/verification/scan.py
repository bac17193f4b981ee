"""Read a bundle's headers and JSON; report files that cannot be read as findings.

Other stages open a checkpoint strictly and stop at the first fault; verify reports all of them.
The folder may be a bundle, or headers that `make inspect` fetched from a hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import mtp
from dsv4.model.json_schemas import FORMS
from dsv4.model.labels import RECORD, recorded_mtp
from dsv4.model.load import expert_bases
from dsv4.model.names import parse_expert
from dsv4.model.naming_schemes import NamingScheme
from dsv4.model.source_format import MODEL_TYPE
from dsv4.model.storage_view import StorageView, build_view
from dsv4.storage import limits
from dsv4.storage.checkpoint import INDEX, Checkpoint, is_file_name, read_json
from dsv4.storage.json_types import OBJECT
from dsv4.storage.safetensors_file import Shard, Tensor, read_shard
from dsv4.text import short_repr
from dsv4.verification.report.findings import Findings

# JSON file that runtimes read → the finding if it is missing or no JSON object.
DOCUMENTS = {
    "config.json": "config-broken",
    INDEX: "index-broken",
    "tokenizer.json": "tokenizer-missing",
    "tokenizer_config.json": "tokenizer-config-broken",
    "generation_config.json": "generation-config-broken",
    "jang_config.json": "jang-config-group-size",
}


@dataclass(frozen=True)
class Scan:
    """Headers and JSON of a bundle.

    files: relative path → size in bytes, of every file; documents: file name → parsed JSON object,
    for the readable ones of DOCUMENTS; unread: tensors that the index puts into missing or broken
    shards, which are reported already.
    """

    checkpoint: Checkpoint
    files: dict[str, int]
    documents: dict[str, dict[str, Any]]
    unread: frozenset[str] = frozenset()

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.checkpoint.config

    @cached_property
    def view(self) -> StorageView:
        """The tensors under storage names, whatever their names on disk."""
        return build_view(self.checkpoint)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Storage name → tensor."""
        return self.view.tensors

    @property
    def scheme(self) -> NamingScheme:
        """The naming scheme on disk."""
        return self.view.recognized.scheme

    @cached_property
    def is_ours(self) -> bool:
        """True if this recipe made the bundle: its shards or its config.json record it."""
        keys = ("convert_layout", "requantize_layout")
        shards = self.checkpoint.shards.values()
        return RECORD in self.config or any(key in s.metadata for s in shards for key in keys)

    @cached_property
    def bases(self) -> list[str]:
        """Storage names, without the part, of all routed-expert matrices that the bundle needs.

        config.json counts them. Bundles of other makers may have fewer in a layer, as many as its
        router has rows, and no MTP layers.
        """
        bases = expert_bases(self.view)
        if self.is_ours:
            return bases
        rows = {}
        for name, tensor in self.tensors.items():
            if name.endswith(".ffn.gate.weight") and tensor.shape:
                rows[name.removesuffix(".ffn.gate.weight")] = tensor.shape[0]
        kept = []
        for base in bases:
            block, layer, expert, *_ = parse_expert(f"{base}.weight")
            in_router = expert < rows.get(f"{block}.{layer}", expert + 1)
            if in_router and (block == "layers" or self.has_mtp):
                kept.append(base)
        return kept

    @cached_property
    def has_mtp(self) -> bool:
        """False for a bundle without MTP tensors that another maker made or that records it."""
        meant = self.is_ours and recorded_mtp(self.config) != mtp.DROPPED
        return meant or any(map(mtp.is_mtp, self.tensors))


def scan(folder: Path, findings: Findings) -> Scan | None:
    """Read a folder's JSON and headers; return None without a usable config.json and index.

    Raises UserError when the folder does not exist, or exceeds the limits on files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}", "no such folder", "a bundle", "check BUNDLE")
    known = any((folder / name).exists() for name in ("config.json", INDEX))
    files = limits.list_files(folder) if known else {}  # a wrong BUNDLE such as / is not listed
    check_shards_are_files(folder, files, findings)
    documents = read_json_documents(folder, files, findings)
    weight_map = check_weight_map(documents.get(INDEX), findings)
    config = documents.get("config.json")
    if config is not None and config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type")
        name = "another-model" if isinstance(found, str) else "config-broken"
        findings.add(name, "config.json: model_type", short_repr(found), repr(MODEL_TYPE))
        config = None
    if config is None or not weight_map:
        return None
    shards = read_shards(folder, set(weight_map.values()), files, findings)
    unread = frozenset(name for name, file in weight_map.items() if file not in shards)
    return Scan(Checkpoint(folder, config, weight_map, shards), files, documents, unread)


def check_shards_are_files(folder: Path, files: dict[str, int], findings: Findings) -> None:
    """Check that every *.safetensors is a file: loaders glob them and fail on a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in files and path.name[0] != ".":
            what = "a folder" if path.is_dir() else "a dangling link, or a device"
            findings.add("shard-stranger", path.name, what, "a file, or nothing")


def read_json_documents(
    folder: Path, files: dict[str, int], findings: Findings
) -> dict[str, dict[str, Any]]:
    """Parse the JSON files and validate them; report the missing and the invalid ones."""
    documents = {}
    for name, fault in DOCUMENTS.items():
        if name not in files:
            if name != "jang_config.json":  # `check_stops` reports it: only vMLX needs it
                findings.add(fault, name, "no such file", "one")
            continue
        try:
            documents[name] = read_json(folder / name, FORMS.get(name, OBJECT))
        except UserError as stop:
            findings.add(fault, name, f"{stop}", "a readable JSON object")
    return documents


def check_weight_map(index: dict[str, Any] | None, findings: Findings) -> dict[str, str]:
    """Return the index's entries that name a file inside the folder; {} when there is none."""
    weight_map = (index or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        if index is not None:
            findings.add("index-broken", INDEX, "no weight_map", "tensor names and their shards")
        return {}
    safe = {}
    for name, file in weight_map.items():
        if not is_file_name(file):
            findings.add("index-unsafe-path", f"{INDEX}: {name}", short_repr(file), "a file name")
        else:
            safe[name] = file
    return safe


def read_shards(
    folder: Path, names: set[str], files: dict[str, int], findings: Findings
) -> dict[str, Shard]:
    """Return the headers of the shards `names`; report missing and broken ones."""
    shards = {}
    for file in sorted(names):
        if file not in files:
            findings.add("shard-missing", INDEX, f"no {file}", "every shard that it names")
            continue
        try:
            shards[file] = read_shard(folder / file)
        except UserError as stop:
            findings.add("shard-broken", file, str(stop), "a complete safetensors file")
    return shards
