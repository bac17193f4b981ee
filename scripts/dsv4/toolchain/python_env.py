"""The toolchain that converts and serves: a Python with jang_tools, mlx, mlx_lm and vmlx_engine.

It may lie in this project's .toolchain or inside a vMLX.app, so it is always asked from outside, in
a process of its own, and never imported here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from dsv4.errors import UserError
from dsv4.settings import environment_without_settings
from dsv4.storage.checkpoint import parse_json
from dsv4.text import short_repr
from dsv4.toolchain.child_process import kill_group

APP = Path("/Applications/vMLX.app")
ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "scripts"
PATIENCE = 300  # seconds until a Python has said what it is: importing MLX takes long at first
HEARD = 4 << 20  # bytes
RUNS = "a Python that runs"
OTHERS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "__PYVENV_LAUNCHER__")
# jang's model outside vMLX: without it the cache is one for short prompts, and decoding was off by
# up to .40.
LONG_PROMPTS = {"DSV4_LONG_CTX": "1"}
PACKAGES = ("jang", "vmlx", "mlx", "mlx-lm", "mlx-vlm", "transformers", "torch")

ANSWER = {
    "python": str,
    "executable": str,
    "packages": dict.fromkeys(PACKAGES, (str, None)),
    "metal": (bool, str, None),
    "folders": dict.fromkeys(("jang_tools", "mlx_lm", "vmlx_engine"), (str, None)),
}

_PROBE = """
import importlib.metadata as m, importlib.util as u, json, platform, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
def folder(name):
    spec = u.find_spec(name)
    return spec.submodule_search_locations[0] if spec else None
metal = None
try:
    import mlx.core as mx
    metal = bool(mx.metal.is_available())
except Exception as error:
    metal = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps({"python": platform.python_version(), "executable": sys.executable,
    "packages": {n: version(n) for n in sys.argv[1:]}, "metal": metal,
    "folders": {n: folder(n) for n in ("jang_tools", "mlx_lm", "vmlx_engine")}}))
"""


def default_python() -> Path:
    """What --python means when it is not given: this Python if it has jang_tools, else the
    toolchain that `make venv` installs.
    """
    here = Path(sys.executable)
    return here if importlib.util.find_spec("jang_tools") else ROOT / ".toolchain/new/bin/python"


def probe(python: Path) -> dict[str, Any]:
    """Ask `python` for its version, packages, whether MLX sees Metal, and where its modules lie.

    Returns {"python", "executable", "packages": {name: version | None}, "metal": bool | str (why
    mlx does not import), "folders": {module: path | None}}. Raises UserError when it cannot be run.
    """
    what = f"toolchain Python {python}"
    said = run_python(what, [str(python), "-c", _PROBE, *PACKAGES], RUNS, "check TOOLCHAIN_PYTHON")
    answer = (said.strip().splitlines() or [b""])[-1]
    try:
        return parse_json(answer, what, ANSWER)
    except UserError as stop:
        found = f"the answer {short_repr(answer.decode(errors='replace'))}"
        raise UserError(what, found, "what a Python says", "check TOOLCHAIN_PYTHON") from stop


def run_python(what: str, command: list[str], expected: str, todo: str) -> bytes:
    """What a Python of the toolchain's prints. Raises UserError when it does not run, or when it
    fails: with the last line of its stderr, and what was `expected`.
    """
    try:
        status, said, errors = run_bounded(command, PATIENCE)
    except OSError as error:
        venv = "run `make venv`, or set TOOLCHAIN_PYTHON"
        raise UserError(what, error.strerror or str(error), RUNS, venv) from error
    if status:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
        raise UserError(what, last, expected, todo)
    return said


def run_bounded(command: list[str], seconds: float) -> tuple[int, bytes, bytes]:
    """Run a child in the toolchain's environment: (exit status, stdout, stderr).

    Of each at most HEARD bytes; who says more, or takes longer than `seconds`, is ended: status
    -9. Raises OSError when it cannot be run.
    """
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
                         env=toolchain_environment(), start_new_session=True) as child,
        ThreadPoolExecutor(2) as pool,
    ):  # fmt: skip
        alarm = threading.Timer(seconds, kill_group, (child,))
        alarm.start()
        try:
            texts = [
                pool.submit(_communicate, child, stream) for stream in (child.stdout, child.stderr)
            ]
            said, errors = (text.result() for text in texts)
            return child.wait(), said, errors
        finally:
            alarm.cancel()
            kill_group(child)


def _communicate(child: subprocess.Popen, stream: IO[bytes]) -> bytes:
    text = stream.read(HEARD + 1)
    if len(text) > HEARD:
        kill_group(child)
    return text[:HEARD]


def app_versions(app: Path = APP) -> dict[str, str | None]:
    """Versions of PACKAGES inside an app, by its .dist-info folders; None for those without one."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for folder in sorted(app.rglob("*.dist-info")):
        name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
        if name.replace("_", "-") in found:
            found[name.replace("_", "-")] = version
    return found


def toolchain_environment() -> dict[str, str]:
    """The environment for a toolchain process: nothing of another Python's, no user site, none of
    make's settings, nothing fetched from the hub, and no module found in the folder that the user
    happens to stand in, which may be a bundle.

    Without Metal, MLX compiles fused kernels with the machine's C++ compiler, which may be missing
    and takes over a minute for the first answer; there it interprets them instead.
    """
    interpret = {} if has_metal() else {"MLX_DISABLE_COMPILE": "1"}
    ours = {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    inherited = {k: v for k, v in environment_without_settings().items() if k not in OTHERS}
    return {**inherited, **ours, **interpret}


def environment_with_dsv4() -> dict[str, str]:
    """The same for what runs as `-m dsv4.ROOM.MODULE` there: the rooms are found."""
    return {**toolchain_environment(), "PYTHONPATH": str(SCRIPTS)}


def call_script(
    command: list[str], what: str, todo: str, stdin: str = "", env: Mapping[str, str] = {}
) -> str:
    """Run one of our scripts in the toolchain's environment, with `env` added; return its stdout.

    Raises UserError with the last line of its stderr when it fails; `todo` is what to do then.
    """
    ours = {**toolchain_environment(), "PYTHONSAFEPATH": ""}  # scripts find what lies beside them
    result = subprocess.run(
        command, input=stdin, capture_output=True, text=True, env={**ours, **env}
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(what, last[:300], "exit status 0", todo)
    return result.stdout


def script_command(python: Path, name: str, *arguments: object) -> list[str]:
    """The command line of scripts/NAME.py, or of `lab/NAME`, in a Python of one's choice."""
    return [str(python), str(SCRIPTS / f"{name}.py"), *map(str, arguments)]


def module_file(python: Path | None, name: str, app: Path = APP) -> Path:
    """Find `name` (as `jang_tools/load_jangtq.py`): in the toolchain Python, else in the app.

    Raises UserError when it is in neither place, or more than once in the app.
    """
    package, _, rest = name.partition("/")
    if python is not None:
        folder = probe(python)["folders"].get(package)
        if folder is not None and (Path(folder) / rest).is_file():
            return Path(folder) / rest
    found = sorted(app.rglob(name)) if app.is_dir() else []
    if len(found) != 1:
        raise UserError(
            name,
            f"{len(found)} copies under {app} and none in {python}",
            "one",
            "name it with --file PATH, or set TOOLCHAIN_PYTHON",
        )
    return found[0]


def has_metal() -> bool:
    """True on the machines that MLX runs on with Metal: Macs with Apple silicon."""
    return sys.platform == "darwin" and os.uname().machine == "arm64"
