"""Apply the unified diffs of patches/ to the installed jang_tools, or undo them.

A file is pristine, patched, not needed (it lacks the faulty code) or unknown. patch(1) is not used,
as it differs between systems.
"""

from __future__ import annotations

import contextlib
import py_compile
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dsv4.errors import UserError
from dsv4.storage.atomic import write_bytes
from dsv4.toolchain import python_env

PATCHES = python_env.ROOT / "patches"
DEFAULT = (PATCHES / "load_jangtq.patch", PATCHES / "mlx_model.patch")


@dataclass(frozen=True)
class Hunk:
    """The lines before and after one hunk, and the line number (from 1) that its header names."""

    line: int
    old: list[str]
    new: list[str]

    @property
    def reversed(self) -> Hunk:
        return Hunk(self.line, self.new, self.old)


@dataclass(frozen=True)
class Patch:
    """A unified diff of one file with its DEP-3 header."""

    path: Path
    header: dict[str, str]
    target: str
    hunks: list[Hunk]

    @property
    def concerns_this_machine(self) -> bool:
        """Return False for a patch that only machines without Metal need, on one with Metal."""
        return self.header.get("Needed-Where") != "no Metal" or not python_env.has_metal()


def read_patch(path: Path) -> Patch:
    """Parse a one-file unified diff with DEP-3 header fields before its `--- a/…` line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if line.startswith("--- a/")), None)
    if start is None or not lines[start + 1].startswith("+++ b/"):
        raise UserError(f"{path}", "no `--- a/` and `+++ b/` lines", "a unified diff", "restore it")
    fields = (line.split(":", 1) for line in lines[:start] if re.match(r"[A-Z][\w-]*:", line))
    header = {key: value.strip() for key, value in fields}
    hunks: list[Hunk] = []
    for line in lines[start + 2 :]:
        if line.startswith("@@"):
            hunks.append(Hunk(int(re.findall(r"\d+", line)[0]), [], []))
        elif line[:1] in " -+\n":
            text = line[1:] if line != "\n" else line
            if line[:1] != "+":
                hunks[-1].old.append(text)
            if line[:1] != "-":
                hunks[-1].new.append(text)
    return Patch(path, header, lines[start + 1][len("+++ b/") :].strip(), hunks)


def find_hunk(lines: list[str], hunk: Hunk) -> int | None:
    """Return the index in `lines` of the only match of `hunk.old`; None without exactly one."""
    width = len(hunk.old)
    places = [i for i in range(len(lines) - width + 1) if lines[i : i + width] == hunk.old]
    return places[0] if len(places) == 1 else None


def apply_hunks(text: str, hunks: list[Hunk]) -> str | None:
    """Replace every hunk's old lines by its new ones; return None when one does not match."""
    lines = text.splitlines(keepends=True)
    for hunk in hunks:
        place = find_hunk(lines, hunk)
        if place is None:
            return None
        lines[place : place + len(hunk.old)] = hunk.new
    return "".join(lines)


def patch_state(text: str, patch: Patch) -> str:
    """Return 'pristine', 'patched', 'not needed' or 'unknown'."""
    if apply_hunks(text, [hunk.reversed for hunk in patch.hunks]) is not None:
        return "patched"
    if apply_hunks(text, patch.hunks) is not None:
        return "pristine"
    return "unknown" if patch.header.get("Needed-While", "") in text else "not needed"


def reject_text(text: str, patch: Patch) -> str:
    """Return the hunks that do not match, as in a reject file; absent lines are marked with !."""
    present = set(text.splitlines(keepends=True))
    out = [f"--- {patch.path.name}, the hunks that do not fit ({patch.target}):"]
    for hunk in patch.hunks:
        if find_hunk(text.splitlines(keepends=True), hunk) is None:
            out += [f"@@ line {hunk.line} @@"]
            out += [("  " if line in present else "! ") + line.rstrip("\n") for line in hunk.old]
    return "\n".join(out)


def backup_path(file: Path) -> Path:
    return file.with_name(file.name + ".orig")


def read_python(file: Path) -> str:
    """Return a Python file's text, newlines kept. Raises UserError if missing or not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}", str(error), "a Python file", "check --file") from error


def patch_file(file: Path, patch: Patch) -> str:
    """Patch a pristine `file`; return a status line. Raises UserError in an unknown state."""
    text = read_python(file)
    found = patch_state(text, patch)
    if found == "unknown":
        print(reject_text(text, patch))
        raise UserError(
            f"{file}",
            f"code that {patch.path.name} does not fit",
            "jang 2.5.8 or 2.5.9 as published",
            "reinstall jang, or adapt the patch (README, When a version changes)",
        )
    if found != "pristine":
        return {"patched": "patched already", "not needed": "not needed by this version"}[found]
    patched = apply_hunks(text, patch.hunks) or ""
    check_compiles(patched, file.name)
    write_bytes(backup_path(file), file.read_bytes())
    write_bytes(file, patched.encode("utf-8"))
    return f"patched (original kept as {backup_path(file).name})"


def unpatch_file(file: Path, patch: Patch) -> str:
    """Restore the original; return a status line. Raises UserError when it would not be exact."""
    text = read_python(file)
    if patch_state(text, patch) != "patched":
        return "not patched, nothing to undo"
    original = (apply_hunks(text, [hunk.reversed for hunk in patch.hunks]) or "").encode("utf-8")
    backup = backup_path(file)
    if backup.is_file() and backup.read_bytes() != original:
        raise UserError(
            f"{file}",
            f"changes beside the patch since {backup.name} was kept",
            "the patched file as this script wrote it",
            "compare the two by hand, or reinstall jang",
        )
    write_bytes(file, original)
    backup.unlink(missing_ok=True)
    return "original restored"


def check_compiles(text: str, name: str) -> None:
    """Compile the patched text before it replaces anything."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / name
        trial.write_text(text, encoding="utf-8")
        try:
            py_compile.compile(str(trial), doraise=True)
        except py_compile.PyCompileError as error:
            raise UserError(name, f"{error.exc_value}", "Python", "adapt the patch") from error


def pending(python: Path | None, app: Path) -> tuple[str, ...]:
    """Return the patches that the jang_tools of a toolchain or an app still lacks."""
    lacking = []
    for patch in map(read_patch, DEFAULT):
        if not patch.concerns_this_machine:
            continue
        with contextlib.suppress(UserError):  # no jang_tools: another check reports it
            file = python_env.module_file(python, patch.target, app)
            if patch_state(read_python(file), patch) == "pristine":
                lacking.append(patch.path.name)
    return tuple(lacking)
