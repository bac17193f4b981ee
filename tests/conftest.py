"""Sources and bundles that several tests share, made by the real scripts and the real converter.

They are made once a session and never written to; a test that changes one takes a copy. What only
other people's programs make is kept between sessions, under build/tests.

`make test` runs what has no marker, `make test-full` what is marked `full`; a file that is named to
pytest runs whole. SEED=N or SEED=random is the seed of what is random, FUZZ=N makes N times as much
of it.

Run a command in one of these ways, the first that will do:

- `here.here`, `here.must`, `here.refusal` call its `main` in this process, a few milliseconds. Not
  for a command that imports MLX, changes limits or the environment, or is to be killed.
- `script`, `must`, `refusal` of this module fork a process that has its imports done, 0.1 s, in any
  environment and folder. Only options that fork cannot give start a Python of its own, 1 s.
- `Commands` is that process; `start`, `status`, `output` are for commands that are killed.

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


# The files that take longest, so that no worker ends with one of them alone.
LONGEST = (
    "test_repair", "test_recipe", "test_layouts", "test_default_stack", "test_verify_mutations",
    "test_download", "test_template", "test_verify", "test_requantize", "test_source_faults",
    "test_typed", "test_evaluate", "test_dspark", "test_code", "test_bounds", "test_low_disk",
    "test_nano_faults", "test_words", "test_turboquant",
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
    """Runs of the scripts that share their imports, most of their time.

    One process imports these (MLX it must not: it has threads), lets Numba load a first kernel, and
    forks for each run, which then runs the script as `python scripts/NAME.py` would, without the
    tidying at a Python's end. `env` and `before` are for that process, as subprocess takes them.
    """

    CODE = """
import gc, importlib, json, os, runpy, sys, traceback
import httpx2, numpy as np, tqdm.auto, yaml  # huggingface_hub itself reads variables at import
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
    argv, cwd, environment, kill, *files = json.loads(line)
    pid = os.fork()
    if not pid:
        break
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(cwd)
for number, path in enumerate(files):
    os.dup2(os.open(path, os.O_RDWR), number)
if environment is not None:
    os.environ.clear()
    os.environ.update(environment)
if kill:
    module, name, calls, number = kill
    place = importlib.import_module(module)
    *owners, name = name.split(".")
    for owner in owners:
        place = getattr(place, owner)
    real = getattr(place, name)
    def interrupted(*arguments, **options):
        global calls
        calls -= 1
        if calls == -1:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)
    setattr(place, name, interrupted)
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

    def __init__(
        self, env: dict[str, str] | None = None, before: Callable[[], object] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(SCRIPTS)], env=env or ENVIRON, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=before,
        )  # fmt: skip
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("in", "out", "err")]
        self._pid = 0
        atexit.register(self.close)

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        atexit.unregister(self.close)
        self._process.communicate()
        self._folder.cleanup()

    def start(
        self,
        name: str,
        *arguments: object,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        input: str = "",
        kill: tuple[str, str, int, int] | None = None,
    ) -> int:
        """Begin a run of scripts/NAME.py; return its process id. Then ask for `status`.

        `kill` is (module, name of a function or method in it, n, signal): the run sends itself the
        signal where, after n calls, it would call that once more.
        """
        for file, text in zip(self._files, (input, "", ""), strict=True):
            file.write_text(text)
        argv = [str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
        order = [argv, str(cwd or Path.cwd()), env, kill, *map(str, self._files)]
        self._process.stdin.write(f"{json.dumps(order)}\n".encode())
        self._pid = int(self._process.stdout.readline())
        return self._pid

    def is_running(self) -> bool:
        """False when the run has ended; its status is still to be asked for."""
        return not select.select([self._process.stdout], [], [], 0)[0]

    def status(self, timeout: float | None = None) -> int:
        """Wait for the run's end; return its exit status, negative for a signal."""
        ended = select.select([self._process.stdout], [], [], timeout)[0]
        if not ended:
            os.kill(self._pid, signal.SIGKILL)
        status = int(self._process.stdout.readline())
        assert ended, f"not at its end after {timeout} s: {self.output()}"
        return status

    def output(self) -> tuple[str, str]:
        """Return what the run has written to stdout and stderr."""
        out, err = (file.read_text() for file in self._files[1:])
        return out, err

    def run(
        self, name: str, *arguments: object, timeout: float | None = None, **options: object
    ) -> subprocess.CompletedProcess:
        """Run scripts/NAME.py to its end; `options` as `start` takes them."""
        self.start(name, *arguments, **options)
        status = self.status(timeout)
        return subprocess.CompletedProcess([name, *map(str, arguments)], status, *self.output())


def environ() -> dict[str, str]:
    """The environment, without what pytest puts there for each test."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


ENVIRON = environ()
# Variables that Python and its libraries read when they start.
EARLY = ("PYTHON", "LD_", "DYLD_", "LC_", "LANG", "OMP_", "NUMBA_")


@functools.cache
def commands() -> Commands:
    return Commands()


def script(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run scripts/NAME.py, or `lab/NAME`, as a user does; stdout and stderr are captured.

    `env`, `cwd`, `input` and `timeout` are those of subprocess.run, the environment that of this
    test unless given; `kill` is that of `Commands.start`. With other options, or with variables
    that Python reads as it starts, the script has a Python of its own.
    """
    env = {k: v for k, v in (options.get("env") or environ()).items() if k[:7] != "PYTEST_"}
    changed = {k for k in {*env, *ENVIRON} if env.get(k) != ENVIRON.get(k)}
    if {*options} <= {"env", "cwd", "input", "timeout", "kill"} and not any(
        name.startswith(EARLY) for name in changed
    ):
        return commands().run(name, *arguments, **options | {"env": env})
    argv = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, **options)


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
