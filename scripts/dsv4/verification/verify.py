"""Verify a bundle on both levels, and return the result as text and as verify.json."""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsv4.errors import UserError
from dsv4.hub.provenance import read_record
from dsv4.model.names import is_control, parse_expert
from dsv4.model.source import open_source
from dsv4.quantization.imatrix import EVEN, importances, open_imatrix
from dsv4.quantization.weight_samples import WeightSamples
from dsv4.storage.atomic import format_bytes
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.tensor_reader import TensorReader
from dsv4.text import escape_line
from dsv4.toolchain.python_env import probe
from dsv4.verification.checks import check_all, turboquant_files
from dsv4.verification.checks.headers import quantizer_of
from dsv4.verification.numbers import aggregate, compare_all
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan, scan

FORMAT = 1  # of verify.json


@dataclass(frozen=True)
class VerifyOptions:
    """What to verify, and how.

    level: 1 for headers and JSON, 2 for every number too; python: of the toolchain, whose loaders
    run unless without_loader; imatrix: the quantizer's; jobs: threads of level 2; hashes: SHA-256
    of all files at level 1 too.
    """

    bundle: Path
    source: Path | None = None
    level: int = 2
    python: Path | None = None
    without_loader: bool = False
    imatrix: Path | None = None
    jobs: int = 1
    hashes: bool = False


def check_level_1(
    options: VerifyOptions, source: Checkpoint | None, findings: Findings
) -> tuple[Scan | None, list[Check]]:
    """Scan the bundle and run the checks of level 1."""
    bundle = scan(options.bundle, findings)
    if bundle is None:
        return None, []
    checks = check_all.check_headers(bundle, source, findings)
    if not options.without_loader:
        checks += check_all.check_toolchain(bundle, source, options.python, findings)
    return bundle, checks


def check_level_2(
    options: VerifyOptions, bundle: Scan, source: Checkpoint | None, findings: Findings
) -> tuple[compare_all.Numbers, list[Check], float]:
    """Compare every number; return the results, the checks and the seconds that it took."""
    start = time.perf_counter()
    importance = EVEN
    if options.imatrix and source:
        importance = importances(open_imatrix(options.imatrix), source)
    with tqdm(
        total=bundle.checkpoint.nbytes, unit="B", unit_scale=True, desc="level 2", disable=None
    ) as bar:
        numbers = compare_all.read_numbers(bundle, source, options.jobs, bar.update, importance)
    checks = aggregate.aggregate(numbers, findings)
    if source:
        checks.append(check_source_values(source, findings))
    checks += turboquant_files.check_sidecar(bundle, findings)
    return numbers, checks, time.perf_counter() - start


def check_source_values(source: Checkpoint, findings: Findings) -> Check:
    """Check samples of the source's matrices: a legal checkpoint may hold no weights."""
    samples = WeightSamples(source)
    with contextlib.closing(TensorReader()) as reader:
        faults = samples.faults(reader.read, source.shards)
    for fault in faults:
        name, _, found = fault.partition(": ")
        findings.add("source-implausible", f"{source.folder}: {name}", found, "values of weights")
    return Check("source's matrices with values of weights, by samples", samples.number)


def package_versions(python: Path | None) -> dict[str, Any]:
    """Return the versions of this Python and of the toolchain's packages."""
    found: dict[str, Any] = {
        "verify_python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if python is not None:
        try:
            toolchain = probe(python)
        except UserError as stop:
            return {**found, "toolchain": str(stop)}
        found |= {"python": toolchain["python"], "metal": toolchain["metal"]}
        found |= {name: version for name, version in toolchain["packages"].items() if version}
    return found


def source_origin(folder: Path | None) -> dict[str, Any] | None:
    """Return the source's repository, revision and commit, as download recorded them."""
    if folder is None:
        return None
    record = read_record(folder)
    fields = {key: getattr(record, key, None) for key in ("repo", "revision", "commit")}
    return {"folder": str(folder), **fields}


def size_table(bundle: Scan, source: Checkpoint | None) -> dict[str, Any]:
    """Return the bytes of the bundle, in all and by kind of tensor, and of the source."""
    kinds = {"routed experts": 0, "control tensors": 0, "8-bit modules and the rest": 0}
    for name, tensor in bundle.tensors.items():
        kind = "routed experts" if parse_expert(name) else "8-bit modules and the rest"
        kinds["control tensors" if is_control(name) else kind] += tensor.nbytes
    return {
        "shards": len(bundle.checkpoint.shards),
        "tensors": len(bundle.checkpoint.tensors),
        "bundle_bytes": sum(bundle.files[file] for file in compare_all.visible_files(bundle.files)),
        "shard_bytes": bundle.checkpoint.nbytes,
        "by_kind": kinds,
        "source_shard_bytes": source.nbytes if source else None,
    }


@dataclass
class Verification:
    """Result of verify; level_1 and level_2: the checks of each level; numbers: of level 2."""

    findings: Findings
    bundle: Scan | None
    source: Checkpoint | None
    level_1: list[Check]
    level_2: list[Check]
    numbers: compare_all.Numbers | None
    seconds: dict[str, float]

    @property
    def passed(self) -> bool:
        """True if something was checked and no error was found."""
        return bool(self.level_1) and not self.findings.errors


def verify(options: VerifyOptions) -> Verification:
    """Run the levels that `options` names. Raises UserError when the source is incomplete."""
    findings = Findings()
    source = open_source(options.source) if options.source else None
    start = time.perf_counter()
    bundle, level_1 = check_level_1(options, source, findings)
    seconds = {"level 1": time.perf_counter() - start}
    numbers, level_2 = None, []
    if bundle is not None and options.level == 2:
        numbers, level_2, seconds["level 2"] = check_level_2(options, bundle, source, findings)
    check_all.require_nonempty([*level_1, *level_2], findings)
    return Verification(findings, bundle, source, level_1, level_2, numbers, seconds)


def describe_checks(options: VerifyOptions, done: Verification) -> str:
    """Return the checks, with the number of items and the worst value of each, as text."""
    lines = [
        escape_line(options.bundle),
        f"level 1, headers and JSON ({done.seconds['level 1']:.1f} s)",
    ]
    lines += [check.text() for check in done.level_1]
    if done.bundle is None:
        lines.append("nothing more can be checked without DeepSeek-V4's config.json and an index")
    elif done.numbers is not None:
        took, size = done.seconds["level 2"], done.bundle.checkpoint.nbytes
        rate = f"{took:.1f} s, {size / took / 1e9:.2f} GB/s of the bundle"
        lines.append(f"level 2, every number of {format_bytes(size)} ({rate})")
        lines += [check.text() for check in done.level_2]
        if done.numbers.compared:
            lines += aggregate.format_kinds(aggregate.by_kind(done.numbers.results))
    if done.source is None:
        values = ", every value" * (options.level == 2)
        lines.append(f"not compared, without a source: tensors, tokenizer, encoding{values}")
    return "\n".join(lines)


def verification_json(options: VerifyOptions, done: Verification) -> dict[str, Any]:
    """Return the content of verify.json."""
    bundle, numbers = done.bundle, done.numbers
    hashes = dict(numbers.hashes) if numbers else {}
    if options.hashes and bundle and not numbers:
        files = compare_all.files_to_hash(bundle)
        hashes = {file: compare_all.sha256(options.bundle / file) for file in files}
    errors = {}
    if numbers and numbers.compared:
        errors = {
            "experts": aggregate.by_layer(numbers.results),
            "others": aggregate.other_tensors(numbers.results),
            "kinds": aggregate.by_kind(numbers.results),
        }
    return {
        "format": FORMAT,
        "verdict": "passed" if done.passed else "failed",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bundle": str(options.bundle.resolve()),
        "source": source_origin(options.source),
        "levels": [1, 2] if options.level == 2 else [1],
        "loader_asked": not options.without_loader,
        "quantizer": quantizer_of(bundle) if bundle else {},
        "layout": bundle.scheme.name if bundle else "",
        "checks": [asdict(check) for check in (*done.level_1, *done.level_2)],
        "findings": [finding.as_json() for finding in done.findings],
        "sizes": size_table(bundle, done.source) if bundle else {},
        "versions": package_versions(None if options.without_loader else options.python),
        "seconds": done.seconds,
        "jobs": options.jobs,
        "errors": errors,
        "hashes": hashes,
    }
