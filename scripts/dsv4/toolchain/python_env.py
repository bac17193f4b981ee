"""Run the toolchain's Python, which has jang_tools, mlx, mlx_lm and vmlx_engine.

It may lie in this project's .toolchain or inside a vMLX.app. It always runs as a child process;
nothing of it is imported here.
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
PATIENCE = 300  # seconds for a short command: importing MLX takes long at first
SCRIPT_SECONDS = 3600  # for a script, such as the logits or conversion of the nano
OUTPUT_BYTES = 4 << 20  # of stdout and of stderr
RUNS = "a Python that runs"
OTHERS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "__PYVENV_LAUNCHER__")
# For jang's model outside vMLX: without it the model has a cache for short prompts only, and
# decoding was off by up to .40.
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
    """Return this Python if it has jang_tools, else that of the toolchain of `make venv`."""
    here = Path(sys.executable)
    return here if importlib.util.find_spec("jang_tools") else ROOT / ".toolchain/new/bin/python"


def probe(python: Path) -> dict[str, Any]:
    """Ask `python` for its version, packages, Metal, and the folders of its modules.

    Returns {"python", "executable", "packages": {name: version | None}, "metal": bool | str (why
    mlx does not import), "folders": {module: path | None}}. Raises UserError when it cannot be run.
    """
    what = f"toolchain Python {python}"
    command = [str(python), "-c", _PROBE, *PACKAGES]
    output = run_python(what, command, RUNS, "check TOOLCHAIN_PYTHON")
    answer = (output.strip().splitlines() or [b""])[-1]
    try:
        return parse_json(answer, what, ANSWER)
    except UserError as stop:
        found = f"the answer {short_repr(answer.decode(errors='replace'))}"
        raise UserError(what, found, "what a Python says", "check TOOLCHAIN_PYTHON") from stop


def run_python(what: str, command: list[str], expected: str, todo: str) -> bytes:
    """Return the stdout of a command of the toolchain's Python.

    Raises UserError when it cannot be run, and with the last line of its stderr when it fails.
    """
    try:
        status, output, errors = run_bounded(command, PATIENCE)
    except OSError as error:
        venv = "run `make venv`, or set TOOLCHAIN_PYTHON"
        raise UserError(what, error.strerror or str(error), RUNS, venv) from error
    if status:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
        raise UserError(what, last, expected, todo)
    return output


def run_bounded(command: list[str], seconds: float) -> tuple[int, bytes, bytes]:
    """Run a child in the toolchain's environment; return (exit status, stdout, stderr).

    A child that writes more than OUTPUT_BYTES to one of them, or takes longer than `seconds`, is
    killed: status -9. Raises OSError when it cannot be run.
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
            output, errors = (text.result() for text in texts)
            return child.wait(), output, errors
        finally:
            alarm.cancel()
            kill_group(child)


def _communicate(child: subprocess.Popen, stream: IO[bytes]) -> bytes:
    text = stream.read(OUTPUT_BYTES + 1)
    if len(text) > OUTPUT_BYTES:
        kill_group(child)
    return text[:OUTPUT_BYTES]


def app_versions(app: Path = APP) -> dict[str, str | None]:
    """Return {package: version} of PACKAGES inside an app, None without a .dist-info folder."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for folder in sorted(app.rglob("*.dist-info")):
        name, _, version = folder.name.removesuffix(".dist-info").rpartition("-")
        if name.replace("_", "-") in found:
            found[name.replace("_", "-")] = version
    return found


def toolchain_environment() -> dict[str, str]:
    """Return the environment for a toolchain process.

    It has no variables of another Python, no user site, none of make's settings, no access to the
    hub, and does not import from the working directory, which may be a bundle. Without Metal, MLX
    would compile fused kernels with the machine's C++ compiler, which may be missing and takes over
    a minute for the first answer; there MLX interprets them.
    """
    interpret = {} if has_metal() else {"MLX_DISABLE_COMPILE": "1"}
    ours = {"PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    inherited = {k: v for k, v in environment_without_settings().items() if k not in OTHERS}
    return {**inherited, **ours, **interpret}


def environment_with_dsv4() -> dict[str, str]:
    """Return the environment for `-m dsv4.PACKAGE.MODULE` in the toolchain's Python."""
    return {**toolchain_environment(), "PYTHONPATH": str(SCRIPTS)}


def call_script(
    command: list[str], what: str, todo: str, stdin: str = "", env: Mapping[str, str] = {}
) -> str:
    """Run one of our scripts in the toolchain's environment, with `env` added; return its stdout.

    Raises UserError when it takes longer than SCRIPT_SECONDS, and with the last line of its stderr
    when it fails. todo: what the user should do then.
    """
    ours = {**toolchain_environment(), "PYTHONSAFEPATH": ""}  # scripts import what lies beside them
    try:
        result = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env={**ours, **env},
            timeout=SCRIPT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        found = f"no end in {SCRIPT_SECONDS:,} s"
        raise UserError(what, found, "exit status 0", todo) from error
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(what, last[:300], "exit status 0", todo)
    return result.stdout


def script_command(python: Path, name: str, *arguments: object) -> list[str]:
    """Return the command line of scripts/NAME.py, or of `lab/NAME`, in `python`."""
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
    """Return True on a Mac with Apple silicon."""
    return sys.platform == "darwin" and os.uname().machine == "arm64"
