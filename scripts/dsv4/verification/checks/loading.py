"""Level 1: check that the installed loaders give every parameter a tensor that fits.

`write_headers_only` writes the bundle's JSON, and shards with its headers and sparse data: for a
180 GB bundle some 30 MB on disk. loader_replay.py runs the real loaders on that folder, in the
toolchain's Python.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model.configs import known_fields
from dsv4.model.naming_schemes import MLX_LM
from dsv4.storage import own_folders
from dsv4.storage.checkpoint import INDEX, read_json
from dsv4.storage.safetensors_file import TensorSpec, header_bytes
from dsv4.toolchain import child_process
from dsv4.toolchain.patches import DEFAULT, patch_state, read_patch, read_python
from dsv4.toolchain.python_env import environment_with_dsv4, probe
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

REPLAY = "dsv4.verification.checks.loader_replay"
LIMIT = 300  # seconds; the headers of 180 GB take some ten
NAMES = [str]
PARAMETERS = {"parameters": int, "unfed": NAMES, "unused": NAMES, "misfit": [NAMES]}
RESULTS = {str: ({"error": str}, PARAMETERS)}


def write_headers_only(bundle: Scan, folder: Path) -> None:
    """Write the files that loaders read into `folder`: configuration, index, shards without data.

    config.json keeps only known fields, so that no key that names code reaches a loader.
    """
    documents = {"config.json": known_fields(bundle.config)}
    documents[INDEX] = {"weight_map": bundle.checkpoint.weight_map}
    if "jang_config.json" in bundle.documents:
        documents["jang_config.json"] = bundle.documents["jang_config.json"]
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    for file, shard in bundle.checkpoint.shards.items():
        specs = [TensorSpec(t.name, t.dtype, t.shape) for t in shard.tensors.values()]
        header = header_bytes(specs, {"format": "mlx"})
        with (folder / file).open("wb") as sparse:
            sparse.write(header)
            sparse.truncate(len(header) + sum(spec.nbytes for spec in specs))


def run_loader_replay(python: Path, bundle: Scan, runtime: str) -> dict[str, dict[str, Any]]:
    """Return loader → its result. Raises UserError when loader_replay.py writes none."""
    with tempfile.TemporaryDirectory(prefix="hollow-") as folder:
        own_folders.make_own(Path(folder))  # if this process is killed, the child removes it
        out, log = Path(folder) / "results.json", Path(folder) / "log"
        target = Path(folder) / "bundle"
        target.mkdir()
        write_headers_only(bundle, target)
        what = f"{REPLAY} in {python}"
        command = [str(python), "-m", REPLAY, "--folder", str(target), "--out", str(out),
                   "--runtime", runtime, "--end-with-parent"]  # fmt: skip
        status = child_process.run_child(command, environment_with_dsv4(), log, LIMIT, what)
        if status or not out.is_file():
            raise UserError(what, child_process.last_log_line(log), "a result", "make check")
        return read_json(out, RESULTS)


def check_loading(
    bundle: Scan, python: Path, findings: Findings, runtime: str = MLX_LM
) -> list[Check]:
    """Check that every parameter that a loader builds receives a tensor that fits."""
    try:
        results = run_loader_replay(python, bundle, runtime)
    except UserError as stop:
        findings.add("loader-not-checked", f"{python}", f"{stop}", "the loaders there")
        return [Check("parameters replayed", 0)]
    checks = []
    for loader, result in results.items():
        if "error" in result:
            findings.add("loader-fails", loader, result["error"], "a loaded model")
        for name in result.get("unfed", []):
            findings.add("loader-parameter-unfed", f"{loader}: {name}", "no tensor", "one")
        for name in result.get("unused", []):
            findings.add("loader-tensor-unused", f"{loader}: {name}", "no parameter", "one")
        for name, *pair in result.get("misfit", []):
            found, expected = [*pair, "", ""][:2]
            findings.add("loader-parameter-misfit", f"{loader}: {name}", found, expected)
        checks.append(Check(f"parameters fed by {loader}", result.get("parameters", 0)))
    return checks


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
