"""Make one of the recipe's environments: a venv, the packages that a file pins, and a test of them.

make runs it with PYTHON3, before anything else is there: it needs nothing but that Python, and it
says in one line what that Python lacks. A venv whose own Python is gone, or is another version by
now, as after `brew upgrade`, is made anew. Indexes, proxies and certificates stay as the user's pip
has them; what would put packages elsewhere, or leave some out, is taken away. At the end the
modules that are named are imported there, and only then does make touch its stamp.

    python3 -I scripts/lab/install.py .venv requirements.txt mlx.core numba
"""

import os
import subprocess
import sys
from pathlib import Path

OLDEST, TRIED, NEWEST = (3, 11), (3, 13), (3, 14)
# An empty variable is none to pip, and goes before what lies in its configuration.
ELSEWHERE = ("USER", "TARGET", "PREFIX", "ROOT", "PYTHON", "DRY_RUN", "NO_DEPS", "REQUIREMENT")
OURS = {"PIP_" + name: "" for name in ELSEWHERE}


def check_python() -> None:
    """End with one line for a Python that cannot make the environments."""
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
    """Run a Python by itself: no variable, user site or folder of another one counts."""
    return subprocess.run([str(python), "-I", *arguments], **options)


def is_alive(python: Path) -> bool:
    """True when the environment's own Python runs and finds the environment's own pip."""
    try:
        return run(python, "-c", "import pip", stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def main() -> int:
    folder, requirements, modules = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    check_python()
    python = folder / "bin" / "python"
    if not is_alive(python) and run(sys.executable, "-m", "venv", "--clear", folder).returncode:
        sys.exit(f"error: {folder}: venv failed, see above; check the disk, or choose PYTHON3=…")
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-user")
    print(f"{folder}: installing {requirements}", flush=True)
    if run(python, *pip, "--requirement", requirements, env={**os.environ, **OURS}).returncode:
        sys.exit(f"error: {folder}: pip could not install {requirements}, see above; run the same "
                 f"command again, or see {python} -m pip config list")  # fmt: skip
    test = run(python, "-c", f"import {', '.join(modules)}", stderr=subprocess.PIPE, text=True)
    if test.returncode:
        last = (test.stderr.strip().splitlines() or ["no answer"])[-1]
        sys.exit(f"error: {folder}: found {last}, expected {', '.join(modules)} to be there; "
                 f"{python} -m pip config list shows whether pip put them elsewhere")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
