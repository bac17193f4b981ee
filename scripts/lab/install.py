"""Make one of the recipe's environments: a venv, the packages that a file pins, and a test of them.

make runs it with PYTHON3 before .venv exists: it imports the standard library only, and prints one
line if that Python lacks something. pip keeps the user's indexes, proxies and certificates, but no
settings that would install elsewhere or leave packages out. At the end the given modules are
imported there, and then the stamp is written: a copy of the pins, so that dates do not matter. With
that stamp in place nothing is done.

A venv whose Python is gone or has another version, as after `brew upgrade`, is made again. So is
one in which an installation was killed, and with --anew one that has other pins. Only an
environment with this script's mark is emptied or added to, and none is emptied through a link.

    python3 -I scripts/lab/install.py .venv/installed requirements.txt mlx.core numba

Exit status: 0 installed, or there already; 1 failed; 2 usage.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST, TRIED, NEWEST = (3, 11), (3, 13), (3, 14)
# pip ignores an empty variable, and the value in its configuration with it.
ELSEWHERE = ("USER", "TARGET", "PREFIX", "ROOT", "PYTHON", "DRY_RUN", "NO_DEPS", "REQUIREMENT")
OURS = {"PIP_" + name: "" for name in ELSEWHERE}
MARK, UNFINISHED = "made-by-install", "unfinished\n"  # the Makefile reads it too


def check_python() -> None:
    """Exit with one line if this Python cannot make the environments."""
    here, now = ".".join(map(str, sys.version_info[:3])), sys.version_info[:2]
    todo = "make … PYTHON3=/path/to/another, such as python3.13"
    if not OLDEST <= now <= NEWEST:
        sys.exit(f"error: PYTHON3: found Python {here}, expected 3.11 to 3.13; {todo}")
    if now > TRIED:
        print(f"note: nothing of this was run on Python {here} yet; if it fails: {todo}")
    try:
        import ensurepip
        import venv  # noqa: F401

        ensurepip.version()
    except (ImportError, OSError):
        debian = "apt install python3-venv on Debian and Ubuntu"
        sys.exit(f"error: PYTHON3: found Python {here} without venv or ensurepip, expected both; "
                 f"{debian}, or {todo}")  # fmt: skip


def run(python: Path, *arguments: str, **options: object) -> subprocess.CompletedProcess:
    """Run a Python isolated: no variable, user site or working directory affects its imports."""
    return subprocess.run([str(python), "-I", *arguments], **options)


def is_alive(python: Path) -> bool:
    """Return True when the environment's own Python runs and finds its pip."""
    try:
        return run(python, "-c", "import pip", stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def is_own(folder: Path) -> bool:
    """Return True for an environment of this script; until 2026-11 it had stamps and no mark."""
    return any((folder / name).is_file() for name in (MARK, "installed", "tests-installed"))


def is_unfinished(folder: Path) -> bool:
    """Return True when an installation into it was interrupted."""
    mark = folder / MARK
    return mark.is_file() and mark.stat().st_size > 0


def is_occupied(folder: Path) -> bool:
    """Return True for a file, a link or a folder that is not empty."""
    return os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir()))


def empty(folder: Path) -> None:
    """Remove everything in an environment but its mark, which still says that it is unfinished.

    Exits with one line if the folder or its parent is a link: this script made no links.
    """
    for path in (folder, folder.parent):
        if path.is_symlink():
            sys.exit(
                f"error: {folder}: found a link on the way ({path}), expected an environment "
                "that may be replaced; remove that link, or make it anew where it lies"
            )
    for path in folder.iterdir():
        if path.name != MARK:
            whole = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if whole else path.unlink()


def prepare(folder: Path, anew: bool) -> None:
    """Make an environment with a working Python in the folder, marked as unfinished."""
    python, there = folder / "bin" / "python", is_occupied(folder)
    if there and not is_own(folder):
        sys.exit(f"error: {folder}: found something that install.py did not make, expected nothing "
                 "there; look at it, and move it away")  # fmt: skip
    stale = anew or is_unfinished(folder) or not is_alive(python)
    folder.mkdir(parents=True, exist_ok=True)
    if there and stale:
        (folder / MARK).write_text(UNFINISHED)
        empty(folder)
    (folder / MARK).write_text(UNFINISHED)
    if not is_alive(python) and run(sys.executable, "-m", "venv", folder).returncode:
        sys.exit(f"error: {folder}: venv failed, see above; check the disk, or choose PYTHON3=…")


def fill(folder: Path, pins: Path) -> None:
    """Install the pinned packages with pip.

    If it fails before anything was changed, as without a network, the environment is usable as
    before; else it stays marked as unfinished.
    """
    python, place = folder / "bin" / "python", "lib/python*/site-packages/*"
    before = sorted(folder.glob(place))
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-user")
    print(f"{folder}: installing {pins}", flush=True)
    status = run(python, *pip, "--requirement", pins, env={**os.environ, **OURS}).returncode
    if not status or sorted(folder.glob(place)) == before:
        (folder / MARK).write_text("")
    if status:
        sys.exit(f"error: {folder}: pip could not install {pins}, see above; run the same "
                 f"command again, or see {python} -m pip config list")  # fmt: skip


def check_modules(folder: Path, modules: list[str]) -> None:
    """Exit with one line unless these modules can be imported there."""
    python = folder / "bin" / "python"
    test = run(python, "-c", f"import {', '.join(modules)}", stderr=subprocess.PIPE, text=True)
    if test.returncode:
        last = (test.stderr.strip().splitlines() or ["no answer"])[-1]
        sys.exit(f"error: {folder}: found {last}, expected {', '.join(modules)} to be there; "
                 f"{python} -m pip config list shows whether pip put them elsewhere")  # fmt: skip


def write(stamp: Path, pins: bytes) -> None:
    """Write a copy of the pins atomically."""
    temporary = stamp.with_name(f".{stamp.name}.partial")
    with temporary.open("wb") as file:
        file.write(pins)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(stamp)


def is_older_form(stamp: Path, pins: Path) -> bool:
    """Return True for an empty stamp, as before 2026-12, that is newer than the pins."""
    if not stamp.is_file() or stamp.stat().st_size:
        return False
    return stamp.stat().st_mtime > pins.stat().st_mtime


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--anew", action="store_true", help="empty the environment first")
    parser.add_argument(
        "stamp", type=Path, help="file in the environment that becomes a copy of PINS"
    )
    parser.add_argument("pins", type=Path, help="requirements file")
    parser.add_argument("modules", nargs="+", help="modules to import as a test")
    args = parser.parse_args()
    check_python()
    folder, pins = args.stamp.parent, args.pins.read_bytes()
    usable = not is_unfinished(folder) and is_alive(folder / "bin" / "python")
    if usable and args.stamp.is_file() and args.stamp.read_bytes() == pins:
        return 0
    if usable and is_older_form(args.stamp, args.pins):
        (folder / MARK).touch()
    else:
        prepare(folder, args.anew)
        # tests-installed depends on installed and must be installed again
        for stamp in (args.stamp, *folder.glob(f"*-{args.stamp.name}")):
            stamp.unlink(missing_ok=True)
        fill(folder, args.pins)
    check_modules(folder, args.modules)
    write(args.stamp, pins)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as problem:
        sys.exit(f"error: {problem.filename}: {problem.strerror}; check that path and the disk")
