"""Sources and bundles that several tests share, made by the real scripts and the real converter.

They are made once a session and never written to; a test that changes one takes a copy. What only
other people's programs make is kept between sessions, under build/tests.

`make test` runs what has no marker, `make test-full` what is marked `full`; a file that is named to
pytest runs whole. SEED=N or SEED=random is the seed of what is random, FUZZ=N makes N times as much
of it.

Run a command in one of these ways, the first that will do:

- `here.here`, `here.must`, `here.refusal` call its `main` in this process, a few milliseconds. Not
  for a command that imports MLX, changes limits or the environment, or is to be killed.
- `script`, `must`, `refusal` of this module fork a process that has its imports done, 0.1 s. With
  options of subprocess.run, or after monkeypatch.setenv, they start a Python of its own, 1 s.
- `Forks` does the same and returns the process id at once: for commands that are killed.

`must` wants success and returns stdout; `refusal` wants exit status 1 and returns the one line.
"""

import atexit
import functools
import hashlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import portalocker
import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
NANO = SCRIPTS / "nano" / "checkpoint"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "lab")]
for name in [name for name in os.environ if name.startswith("RECIPE_")]:
    del os.environ[name]  # what make hands to every script, of whoever runs `make test`
# Workers share the cores; NumPy's and MLX's threads on top of them only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The workers of pytest-xdist inherit the environment, and so the number that is drawn here.
SEED = os.environ.get("SEED") or "20261201"
SEED = str(random.randrange(1 << 32)) if SEED == "random" else SEED
os.environ["SEED"] = SEED
# A job in the background ignores Ctrl-C, and so would the runs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The files that take longest, by CPU seconds, so that no worker ends with one of them alone.
LONGEST = (
    "test_recipe", "test_verify_mutations", "test_layouts", "test_default_stack",
    "test_nano_faults", "test_hub", "test_evaluate", "test_repair", "test_requantize",
    "test_lossless", "test_low_disk", "test_turboquant", "test_readonly", "test_removal",
    "test_dspark", "test_native", "test_fuzz", "test_volumes", "test_accept",
)  # fmt: skip
LEFT = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: left out of `make test`, run by `make test-full`")
    config.stash[LEFT] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Note the files of the marked tests that `-m "not full"` leaves out."""
    for item in items:
        if item.get_closest_marker("full"):
            item.config.stash[LEFT].append(item.path.stem)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the notes of a worker to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash[LEFT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Take a worker's notes; all workers collect the same tests."""
    node.config.stash[LEFT] = getattr(node, "workeroutput", {}).get("left", [])


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the seed, and as the last line what was left out."""
    if hasattr(config, "workerinput"):
        return
    print(f"seed {SEED} (SEED=N or SEED=random for another, FUZZ=N for N times as many cases)")
    counts = Counter(config.stash[LEFT])
    if counts:
        files = ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))
        print(f"left to `make test-full`: {counts.total()} tests ({files})")


class Commands:
    """Runs of the scripts that share their imports, most of their time, and leave out the tidying
    at a Python's end, most of the rest.

    One process imports these (MLX it must not: it has threads), lets Numba load a first kernel, and
    forks for each run, which then runs the script as `python scripts/NAME.py` would.
    """

    CODE = """
import gc, importlib, json, os, runpy, sys, traceback
import numpy as np
sys.path[0] = sys.argv.pop()
for path in sorted(os.listdir(sys.path[0])):
    if path.endswith(".py"):
        importlib.import_module(path[:-3])
from dsv4.quantization import least_squares
parts = np.empty(8, np.uint8), np.empty(1, np.uint16), np.empty(1, np.uint16)
codes, exponent = np.arange(16, dtype=np.uint8), np.full(1, 120, np.uint8)
least_squares.quantize(codes, exponent, None, (2, 32), parts)
assert "mlx" not in sys.modules
gc.collect()
gc.freeze()
for line in sys.stdin:
    argv, cwd, *files = json.loads(line)
    pid = os.fork()
    if not pid:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(cwd)
for number, path in enumerate((os.devnull, *files)):
    os.dup2(os.open(path, os.O_RDWR), number)
sys.argv[:], sys.path[0] = argv, os.path.dirname(argv[0])
try:
    runpy.run_path(argv[0], run_name="__main__")
    status = 0
except SystemExit as end:
    status = end.code or 0
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(SCRIPTS)], env=ENVIRON, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self._process.communicate)

    def run(self, argv: list[str]) -> subprocess.CompletedProcess:
        """As subprocess.run does it, stdout and stderr captured as text."""
        with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
            order = json.dumps([argv, str(Path.cwd()), out.name, err.name])
            print(order, file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            said = [Path(file.name).read_text() for file in (out, err)]
        return subprocess.CompletedProcess([sys.executable, *argv], status, *said)


def environ() -> dict[str, str]:
    """The environment, without what pytest puts there for each test."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


ENVIRON = environ()


@functools.cache
def commands() -> Commands:
    return Commands()


def script(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run scripts/NAME.py, or `lab/NAME`, as a user does; stdout and stderr are captured.

    With options of subprocess.run, or in another environment, in a Python of its own.
    """
    argv = [str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    if not options and environ() == ENVIRON:
        return commands().run(argv)
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, **options)


def must(name: str, *arguments: object) -> str:
    """Run a script that has to succeed; return what it prints."""
    result = script(name, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refusal(name: str, *arguments: object) -> str:
    """Run a script that has to stop: exit 1 and one clear line, which is returned."""
    result = script(name, *arguments)
    assert result.returncode == 1, (result.returncode, result.stdout, result.stderr)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    return last


class Forks:
    """Runs of scripts that share their imports, for tests that kill or trouble many of them.

    One process imports what takes long (MLX it must not: it has threads) and forks for each run.
    """

    CODE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import importlib, huggingface_hub, numba, tqdm
commands = {name: importlib.import_module(name) for name in sys.argv[2:]}
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        name, arguments, environment, log = json.loads(line)
        os.environ.update(environment)
        sys.argv = [commands[name].__file__, *arguments]
        sys.stdout = sys.stderr
        if log:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(commands[name].run(commands[name].main))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(
        self,
        *names: str,
        env: dict[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.names = names or ("convert",)
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, SCRIPTS, *self.names], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=before,
        )  # fmt: skip

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def start(self, *arguments: object) -> int:
        """Begin a run of the first script; returns its process id."""
        return self._start(self.names[0], arguments, {}, None)

    def _start(self, name: str, arguments: tuple, env: dict[str, str], log: Path | None) -> int:
        line = [name, [str(a) for a in arguments], env, log and str(log)]
        print(json.dumps(line), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def is_running(self) -> bool:
        """False when the run has ended; its status is still to be asked for."""
        return not select.select([self._process.stdout], [], [], 0)[0]

    def status(self) -> int:
        """Wait for the run's end; its exit status, negative for a signal."""
        return int(self._process.stdout.readline())

    def said(self, log: Path, name: str, *arguments: object, **env: str) -> tuple[int, str]:
        """Run a script to its end: exit status, and all that it said, which goes through `log`."""
        self._start(name, arguments, env, log)
        return self.status(), log.read_text()


def made_once(tmp_path_factory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of the tests' processes makes and the others find."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    (base / "made").mkdir(exist_ok=True)
    folder = base / "made" / name
    with portalocker.Lock(base / "made" / f"{name}.making", timeout=300):
        if not folder.exists():
            make(folder)
    return folder


def kept(name: str, make: Callable[[Path], object], ingredients: Iterable[Path]) -> Path:
    """Return build/tests/NAME-HASH, made by `make(folder)` if it is not there.

    The hash is of the ingredients, files and folders under the repository. Workers and sessions
    that run at the same time wait for the first. An older NAME-* is removed when one is made.
    """
    digest = hashlib.sha256()
    for path in sorted(ingredients):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    base = ROOT / "build" / "tests"
    base.mkdir(parents=True, exist_ok=True)
    folder = base / f"{name}-{digest.hexdigest()[:16]}"
    with portalocker.Lock(base / f"{name}.lock", timeout=300):
        if not folder.exists():
            for old in base.glob(f"{name}-" + "?" * 16):
                shutil.rmtree(old)
            making = base / f"{name}.making"
            if making.exists():  # of a session that was killed
                shutil.rmtree(making)
            make(making)
            making.rename(folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A random source with every kind of tensor, in five shards that part weights from scales."""

    def make(folder: Path) -> None:
        must("lab/make_source", "--source", folder, "--seed", 7)

    return made_once(tmp_path_factory, "source", make)


@pytest.fixture(scope="session")
def dspark(tmp_path_factory) -> Path:
    """A random source as -0731 is made: DSpark's three stages, after two main layers."""
    sizes = {"num_hidden_layers": 2, "n_routed_experts": 4, "compress_ratios": [4, 128]}

    def make(folder: Path) -> None:
        must("lab/make_source", "--source", folder, "--seed", 8, "--dspark",
             "--sizes", json.dumps(sizes))  # fmt: skip

    return made_once(tmp_path_factory, "dspark", make)


@pytest.fixture(scope="session")
def stock(source, tmp_path_factory) -> Path:
    """That source as upstream's converter leaves it."""

    def make(folder: Path) -> None:
        must("convert", "--source", source, "--bundle", folder, "--converter", "jang")

    return made_once(tmp_path_factory, "stock", make)


@pytest.fixture(scope="session")
def good(source, stock, tmp_path_factory) -> Path:
    """The stock bundle after requantize, finalize and patch."""

    def make(folder: Path) -> None:
        making = shutil.copytree(stock, folder.with_name("making"))
        must("requantize", "--source", source, "--bundle", making)
        must("finalize", "--source", source, "--bundle", making)
        must("patch", "--bundle", making)
        making.rename(folder)

    return made_once(tmp_path_factory, "good", make)


@pytest.fixture(scope="session")
def native(source, tmp_path_factory) -> Path:
    """That source converted natively."""

    def make(folder: Path) -> None:
        must("convert", "--source", source, "--bundle", folder)

    return made_once(tmp_path_factory, "native", make)


@pytest.fixture
def source_copy(source, tmp_path) -> Path:
    return shutil.copytree(source, tmp_path / "source")


@pytest.fixture
def stock_copy(stock, tmp_path) -> Path:
    return shutil.copytree(stock, tmp_path / "stock")


@pytest.fixture
def good_copy(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "good")
