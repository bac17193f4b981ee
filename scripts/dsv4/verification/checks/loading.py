"""Level 1: check that the installed loaders give every parameter a tensor that fits.

`write_headers_only` writes the bundle's JSON, and shards with its headers and sparse data: for a
180 GB bundle some 30 MB on disk. loader_replay.py runs the real loaders on that folder, in the
toolchain's Python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model.configs import known_fields, without_code
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.safetensors_file import TensorSpec, header_bytes
from dsv4.toolchain.patches import DEFAULT, patch_state, read_patch, read_python
from dsv4.toolchain.python_env import probe
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

NAMES = [str]
PARAMETERS = {
    "parameters": int,
    "causes?": NAMES,
    "unfed": NAMES,
    "unused": NAMES,
    "misfit": [NAMES],
}


def write_headers_only(bundle: Scan, folder: Path) -> None:
    """Write the files that loaders read into `folder`: configuration, index, shards without data.

    config.json keeps only known fields, so that no key that names code reaches a loader.
    """
    documents = {"config.json": known_fields(bundle.config)}
    documents[INDEX] = {"weight_map": bundle.checkpoint.weight_map}
    if "jang_config.json" in bundle.documents:
        documents["jang_config.json"] = without_code(bundle.documents["jang_config.json"])
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    for file, shard in bundle.checkpoint.shards.items():
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in shard.tensors.values()]
        header = header_bytes(specs, {"format": "mlx"})
        with (folder / file).open("wb") as sparse:
            sparse.write(header)
            sparse.truncate(len(header) + sum(spec.nbytes for spec in specs))


def add_loader_results(results: dict[str, dict[str, Any]], findings: Findings) -> list[Check]:
    """Report each parameter that a loader builds and that receives no tensor that fits.

    results: loader → {"error"} or PARAMETERS, by loader_replay.py.
    """
    checks = []
    for loader, result in results.items():
        by = describe_causes(result.get("causes", []))
        if "error" in result:
            findings.add("loader-fails", loader, result["error"] + by, "a loaded model")
        for name in result.get("unfed", []):
            findings.add("loader-parameter-unfed", f"{loader}: {name}", f"no tensor{by}", "one")
        for name in result.get("unused", []):
            findings.add("loader-tensor-unused", f"{loader}: {name}", f"no parameter{by}", "one")
        for name, *pair in result.get("misfit", []):
            found, expected = [*pair, "", ""][:2]
            findings.add("loader-parameter-misfit", f"{loader}: {name}", found + by, expected)
        checks.append(Check(f"parameters fed by {loader}", result.get("parameters", 0)))
    return checks


def describe_causes(causes: list[str]) -> str:
    """Return the keys that cause a result, as the end of a sentence."""
    return f", by {'; '.join(causes)}" if causes else ""


def loader_states(python: Path) -> dict[str, str]:
    """Return patch target → 'pristine', 'patched', 'not needed' or 'unknown', of the toolchain.

    Raises UserError when the toolchain has no jang_tools.
    """
    jang = probe(python)["folders"].get("jang_tools")
    if jang is None:
        raise UserError(f"{python}", "no jang_tools", "the toolchain", "set TOOLCHAIN_PYTHON")
    states = {}
    for patch in map(read_patch, DEFAULT):
        if not patch.concerns_this_machine:
            continue
        file = Path(jang).parent / patch.target
        found = patch_state(read_python(file), patch) if file.is_file() else "not needed"
        states[patch.target] = found
    return states


def check_loader(python: Path, findings: Findings) -> Check:
    """Check that the installed loader is patched, or does not need to be."""
    try:
        states = loader_states(python)
    except UserError as stop:
        findings.add("loader-not-checked", f"{python}", f"{stop}", "jang_tools")
        return Check("loader files", 0)
    for target, found in states.items():
        if found in ("pristine", "unknown"):
            name = "loader-unpatched" if found == "pristine" else "loader-unknown"
            findings.add(name, target, found, "patched, or not needed")
    note = ", ".join(f"{Path(target).name} {found}" for target, found in states.items())
    return Check("loader files", len(states), note)
