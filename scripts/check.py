"""Say whether the build can succeed, before anything is spent on it.

One line for each check: what was found, what is needed, what to do. Looks at the toolchain Python
and its packages; at what these versions mean for the user, and those inside /Applications/vMLX.app
(works, works after patch_loader, known to fail because …, unknown); at the loader patches, the
volumes, and the free space against what is really needed: the hub's file sizes for the download,
and for the bundle its exact size, computed from the source's safetensors headers (the hub's by
ranged requests when the source is not there yet); and which Mac that size fits. What a volume lacks
(locks, flushing, links) is tried in a hidden folder that goes again; nothing else is written. Exit
1 when the build could not succeed; a line with ?? does not stop it.

    .venv/bin/python scripts/check.py --source DIR --bundle DIR [--python PYTHON] [--repo REPO]
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv4.conversion import recorded_format
from dsv4.conversion.size_planner import planned_shards, unloaded_bytes
from dsv4.conversion.source_state import SourceState, source_state
from dsv4.errors import UserError, run
from dsv4.model import mac_memory, mtp
from dsv4.model.bundle_tensors import SHARD_BYTES
from dsv4.model.expected_tensors import SourceFaults
from dsv4.model.folder_roles import bundle_path
from dsv4.model.load import open_bundle
from dsv4.quantization.formats import (
    QuantizerOptions,
    add_mtp_options,
    add_quantizer_options,
    quantizer_options,
)
from dsv4.settings import add_setting, parse_path
from dsv4.storage import disk_space, filesystem
from dsv4.storage.atomic import format_bytes
from dsv4.storage.disk_space import staging_folder
from dsv4.text import LINE, escape_line
from dsv4.toolchain import patches, python_env
from dsv4.verification.checks import runtimes

NEEDED = {
    "jang": "the model",
    "mlx": "quantization and serving",
    "mlx-lm": "the loader",
    "vmlx": "the server",
    "torch": "CONVERTER=jang",
}
UPSTREAM = ("2.5.8", "2.5.9")  # versions of jang whose converter CONVERTER=jang can run
SHOWN = 20  # faults of a source that are printed


@dataclass(frozen=True)
class Line:
    """One check: does it hold, what was found, and what to do when it does not.

    doubt: nothing that stops the build, but read it.
    """

    holds: bool
    what: str
    found: str
    todo: str = ""
    doubt: bool = False

    def __str__(self) -> str:
        mark = "NO " if not self.holds else "?? " if self.doubt else "ok "
        todo = "" if self.holds or not self.todo else f"; {self.todo}"
        return escape_line(f"{mark} {self.what}: {self.found}{todo}", LINE)


def check_toolchain(python: Path, converter: str, app: Path, quantizer: str) -> list[Line]:
    """The toolchain Python and its packages; torch only where upstream's converter is to run."""
    try:
        info = python_env.probe(python)
    except UserError as stop:
        return [Line(False, "toolchain", str(stop))]
    lines = [Line(True, "toolchain", f"Python {info['python']} at {info['executable']}")]
    for name, role in NEEDED.items():
        if name == "torch" and converter != "jang":
            continue
        version = info["packages"][name]
        lines.append(
            Line(version is not None, name, f"{version or 'not installed'} ({role})",
                 f"install it into {python}")
        )  # fmt: skip
    if converter == "jang" and info["packages"]["jang"] not in UPSTREAM:
        found = f"jang {info['packages']['jang']}"
        todo = f"it is known to work with {' and '.join(UPSTREAM)}: STACK=old"
        lines.append(Line(False, "CONVERTER=jang", found, todo))
    metal = info["metal"]
    if isinstance(metal, str):
        lines.append(Line(False, "mlx", f"does not import ({metal})", "reinstall mlx"))
    else:
        lines.append(Line(True, "Metal", "yes" if metal else "no: MLX runs on the CPU"))
    lines.append(meaning("runtime", info["packages"], patches.pending(python, app), quantizer))
    if app.is_dir() and app not in Path(info["executable"]).parents:
        versions = python_env.app_versions(app)
        lines.append(meaning(f"runtime in {app}", versions, patches.pending(None, app), quantizer))
    return lines


def meaning(
    what: str, versions: runtimes.Versions, lacking: tuple[str, ...], quantizer: str
) -> Line:
    """Return what installed versions mean, by dsv4/verification/checks/runtimes.py."""
    works, line = runtimes.recognize_stack(versions, lacking, python_env.has_metal(), quantizer)
    return Line(not runtimes.refusal_reason(versions, quantizer), what, line, doubt=not works)


def check_patch(python: Path, app: Path, path: Path) -> Line:
    """The state of one loader patch; pristine is fine, because patch_loader comes next."""
    patch = patches.read_patch(path)
    what = f"patch {path.stem}"
    if not patch.concerns_this_machine:
        return Line(True, what, "not needed where Metal is")
    try:
        file = python_env.module_file(python, patch.target, app)
        state = patches.patch_state(patches.read_python(file), patch)
    except UserError as stop:
        return Line(False, what, str(stop))
    found = {
        "pristine": "not applied yet; patch_loader does it",
        "patched": "applied",
        "not needed": "not needed by this version",
        "unknown": f"does not fit {file}",
    }
    return Line(state != "unknown", what, found[state], "reinstall jang, or adapt the patch")


def check_volume(what: str, folder: Path, written: bool) -> list[Line]:
    """Is the volume of `folder` mounted, and, if it is written to, writable; and what lacks on it?

    /Volumes/NAME must exist for a path on it.
    """
    parts = folder.absolute().parts
    mount = Path(*parts[:3]) if parts[:2] == ("/", "Volumes") else None
    if mount is not None and not mount.is_dir():
        todo = "attach that disk, or set another path"
        return [Line(False, what, f"{mount} is not mounted", todo)]
    parent = disk_space.existing_parent(folder)
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    line = Line(writable or not written, what, f"{folder} on {parent}, {room(folder)} free",
                f"{parent} is not writable: choose another path")  # fmt: skip
    lacks = filesystem.missing_features(parent) if writable and written else []
    return [line, *(Line(True, what, one, doubt=True) for one in lacks)]


def room(folder: Path) -> str:
    """What is free on the volume of `folder`, for a reader."""
    there = disk_space.free_bytes(folder)
    return "an unknown number of bytes" if there is None else format_bytes(there)


def source_lines(args: argparse.Namespace) -> tuple[list[Line], SourceState | None]:
    """Judge the source. Returns the lines, and the state of a source that is not refused."""
    has_tokenizer = bool(args.reference or args.base)
    try:
        state = source_state(args.source, args.repo, args.revision, args.low_disk, has_tokenizer)
    except SourceFaults as stop:
        lines = [Line(False, "source", fault) for fault in stop.faults[:SHOWN]]
        where, _, expected, todo = stop.parts
        counted = f"{len(stop.faults):,} faults" if len(stop.faults) > 1 else "1 fault"
        return [
            *lines,
            Line(False, "source", f"{where}: {counted}, expected {expected}", todo),
        ], None
    except UserError as stop:
        return [Line(False, "source", str(stop))], None
    return [Line(True, "source", state.description)], state


def bundle_need(
    args: argparse.Namespace,
    state: SourceState | None,
    options: QuantizerOptions,
    made: recorded_format.RecordedFormat | None,
) -> tuple[list[Line], int]:
    """The bundle's final size, the Mac that it fits, and the bytes that its volume must still take.

    The size is that of the plan by which convert writes the shards; what is there already, of a
    bundle or a killed run, is taken off, and one shard is made room for.
    """
    if state is None:
        return [Line(False, "bundle size", "unknown", "see source")], 0
    try:
        disk_space.check_not_volume_root(args.bundle)
        size = None
        headers = mtp.without_dropped(state.headers, options.mtp)
        if args.fit or args.size:
            unloaded = unloaded_bytes(headers, options.name, options.mtp)
            size = mac_memory.size_goal(args, headers.config, unloaded)
        shards, goal = planned_shards(headers, options, made, args.shard_bytes, size)
    except UserError as stop:
        return [Line(False, "bundle size", f"unknown ({stop})")], 0
    total = sum(shard.size for shard in shards)
    final = goal or total
    if total > final:
        least = f"{format_bytes(goal)} asked for, {format_bytes(total)} at least"
        return [Line(False, "bundle size", least, "ask for a larger one, or a larger Mac")], 0
    try:
        have = open_bundle(args.bundle).nbytes
    except UserError:
        have = disk_space.folder_bytes(staging_folder(args.bundle))
    largest = max(shard.size for shard in shards)
    spare = largest if have or args.converter == "jang" else 0  # rewritten by requantize
    needed = max(0, final - have) + spare
    about = "at most " * bool(goal)
    size = Line(
        True, "bundle size", f"{about}{format_bytes(final)} finished, {format_bytes(have)} there"
    )
    unloaded = mtp.unloaded_bytes(slot for shard in shards for slot in shard.layout.slots)
    return [size, memory_line(args, state.headers.config, final - unloaded)], needed


def memory_line(args: argparse.Namespace, config: dict[str, Any], loaded: int) -> Line:
    """Return the line that says which Mac the bundle fits. loaded: its bytes without MTP."""
    fit = mac_memory.describe_fit(config, loaded, args.context or mac_memory.CONTEXT, args.fit or 0)
    return Line(True, "memory", fit, doubt="does not" in fit)


def check_space(source: Path, bundle: Path, fetch: int, build: int) -> list[Line]:
    """Free space for each volume, or for both folders together when they share one."""
    if disk_space.same_volume(source, bundle):
        needs = [("space", bundle, fetch + build)]
    else:
        needs = [("space for the source", source, fetch), ("space for the bundle", bundle, build)]
    return [
        Line((there := disk_space.free_bytes(folder)) is None or there >= need, what,
             f"{room(folder)} free, {format_bytes(need)} needed",
             "free some, or move SOURCE or BUNDLE to another volume", doubt=there is None)
        for what, folder, need in needs
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True)
    add_setting(parser, "BUNDLE", required=True)
    python = python_env.default_python()
    add_setting(parser, "TOOLCHAIN_PYTHON", option="--python", default=python, help="toolchain")
    parser.add_argument("--app", type=parse_path, default=python_env.APP)
    add_setting(parser, "REPO", default="", help="where the source can be fetched from")
    add_setting(parser, "REVISION", default="main")
    add_setting(parser, "REFERENCE", help="folder that has the tokenizer and encoding files")
    add_setting(parser, "BASE", default="", help="repository that has them")
    add_setting(parser, "CONVERTER", choices=("native", "jang"), default="native")
    add_setting(parser, "SHARD_BYTES", default=SHARD_BYTES)
    add_setting(parser, "LOW_DISK")
    parser.add_argument("--ours", action="store_true", help="stop at another maker's bundle")
    add_quantizer_options(parser)
    add_mtp_options(parser)
    mac_memory.add_goal(parser)
    args = parser.parse_args()
    mac_memory.check_goal(args)
    source, bundle = args.source, bundle_path(args.bundle, args.source)
    args.bundle, made = bundle, recorded_format.read_recorded_format(bundle, args.quantizer)
    recorded_format.check_ours(bundle, made, args.quantizer, args.converter, args.ours)
    options = recorded_format.resolve_quantizer(quantizer_options(args), made, bundle)
    lines = check_toolchain(args.python, args.converter, args.app, options.name)
    lines += [check_patch(args.python, args.app, path) for path in patches.DEFAULT]
    judged, state = source_lines(args)
    fetch = state.fetch if state else 0
    bundle_lines, build = bundle_need(args, state, options, made)
    lines += check_volume("source volume", source, written=fetch > 0 or args.low_disk)
    lines += check_volume("bundle volume", bundle, written=True)
    lines += [*judged, *bundle_lines, *check_space(source, bundle, fetch, build)]
    print(*lines, sep="\n")
    failed = [line for line in lines if not line.holds]
    if failed:
        raise UserError("check", f"{len(failed)} of {len(lines)} lines NO", "none", "see above")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
