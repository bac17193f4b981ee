"""Nothing removes what it has not made: foreign files, folders and links beside our own stay.

Each tool that removes something is given a place where somebody's lies, under the names that the
tool itself uses. Catches: a folder that the user named and that is emptied, a link that is
followed, an installation by halves that counts, 2 GB that are installed again for a new date.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fidelity
import install
import make_stock
import matrix
import model_error
import numpy as np
import pytest
from conftest import NANO, SCRIPTS
from here import must
from test_settings import Copy

from dsv4.errors import UserError
from dsv4.evaluation import activations, driver
from dsv4.repair import context, document_steps
from dsv4.storage import own_folders, safe_paths
from dsv4.storage.disk_space import staging_folder


def plant(folder: Path, *names: str) -> Path:
    """Somebody's folder: a file of theirs under each name, and a link to a folder of theirs."""
    elsewhere = folder.with_name(f"{folder.name}, where links lead")
    for path in (elsewhere / "theirs", *(folder / name for name in (*names, "theirs"))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("theirs")
    (folder / "link").symlink_to(elsewhere)
    return folder


def seen(folder: Path) -> dict[str, str | None]:
    """Everything in a folder and where its link leads, with what files say."""
    tops = (folder, folder.with_name(f"{folder.name}, where links lead"))
    paths = [path for top in tops for path in top.rglob("*")]
    return {str(path): path.read_text() if path.is_file() else None for path in paths}


# ------------------------------------------------------------------------------- our mark


def test_a_folder_without_our_mark_is_neither_taken_nor_removed(tmp_path):
    theirs = plant(tmp_path / "folder")
    link = tmp_path / "a link"
    link.symlink_to(own_folders.make_own(tmp_path / "ours"))
    before = seen(theirs)
    for path in (theirs, link, theirs / "theirs"):
        assert not own_folders.remove_own(path)
        with pytest.raises(UserError, match=r"found .*, expected "):
            own_folders.make_own(path)
    assert not own_folders.remove_own(tmp_path / "none")
    assert seen(theirs) == before
    assert own_folders.is_own(tmp_path / "ours")


def test_what_a_link_in_our_folder_leads_to_stays(tmp_path):
    theirs = plant(tmp_path / "theirs")
    ours = own_folders.make_own(own_folders.make_own(tmp_path / "ours"))
    (ours / "folder").mkdir()
    (ours / "folder" / "link").symlink_to(theirs)
    (ours / "link").symlink_to(theirs)
    assert own_folders.remove_own(ours)
    assert not ours.exists()
    assert (theirs / "theirs").exists()


def test_a_removal_that_was_killed_leaves_the_mark(tmp_path, monkeypatch):
    ours = own_folders.make_own(tmp_path / "ours")
    (ours / "file").touch()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safe_paths, "clear_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        own_folders.remove_own(ours)
    monkeypatch.undo()
    assert own_folders.remove_own(ours)


# --------------------------------------------------------------------------- children, passes


def replay(folder: Path, *options: str, **more) -> subprocess.Popen:
    module = "dsv4.verification.checks.runtime_answers"
    request = {"right": {}, "runtimes": [], "loaders": ["mlx_lm and vMLX 1.3.97"]}
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", module, "--folder", folder, *options]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)},
                            start_new_session=True, stderr=subprocess.PIPE, **more)  # fmt: skip


def test_the_replay_by_hand_removes_nothing_and_answers_when_stdin_is_at_its_end(tmp_path):
    """As from cron, nohup or CI; it looked like a parent's death, and the parent folder went."""
    folder = plant(tmp_path / "folder", "headers/theirs")
    process = replay(folder, stdin=subprocess.DEVNULL)
    said = process.communicate(timeout=100)[1]
    assert process.returncode == 0, said
    assert json.loads((folder / "results.json").read_text())["loaders"].keys() >= {"mlx_lm"}
    assert (folder / "headers" / "theirs").exists()


CHILD = """
import sys, time
from pathlib import Path
from dsv4.toolchain.child_process import end_with_parent
end_with_parent(Path(sys.argv[1]))
time.sleep(100)
"""


@pytest.mark.parametrize("marked", [True, False])
def test_a_child_whose_parent_ended_removes_only_a_folder_with_our_mark(tmp_path, marked):
    folder = own_folders.make_own(tmp_path / "folder") if marked else plant(tmp_path / "folder")
    (folder / "file").touch()
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, folder], env=env, stdin=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    assert process.wait(60) == -signal.SIGKILL
    assert (folder / "file").exists() == (not marked)


def test_a_child_without_a_session_of_its_own_ends_alone(tmp_path):
    """A shell's job shares its process group with who began it."""
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    code = ("import subprocess, sys; "
            "sys.exit(subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL).returncode == -9)"
            )  # fmt: skip
    command = [sys.executable, "-c", code, sys.executable, "-c", CHILD, tmp_path]
    assert subprocess.run(command, env=env, start_new_session=True).returncode == 1


def test_a_pass_removes_only_folders_of_passes_that_carry_our_mark(tmp_path, monkeypatch):
    work = plant(tmp_path / "work", "engine-cpu.log", f"pass-{'0' * 16}/theirs", "cpu.log")
    before = seen(work)
    ours = own_folders.make_own(work / f"pass-{'1' * 16}")
    (ours / "after-001.npy").touch()
    own_folders.make_own(work / driver.LOGS)
    driver.prepare(work)
    driver.remove_other_passes(work, [ours])
    assert ours.exists()
    driver.remove_intermediates(work)
    assert seen(work) == before
    monkeypatch.setattr(driver, "key_of", lambda *_: "0" * 16)
    with pytest.raises(UserError, match="not made here"):
        driver.folder_of(None, SimpleNamespace(work=work), "cpu", {})


def test_a_work_folder_goes_only_if_it_was_made_and_is_empty(tmp_path):
    made, theirs = tmp_path / "a" / "made", tmp_path / "theirs"
    theirs.mkdir()
    for work in (made, theirs):
        driver.prepare(work)
        own_folders.make_own(work / f"pass-{'1' * 16}")
        driver.remove_intermediates(work)
    assert (made.exists(), theirs.exists()) == (False, True)
    driver.prepare(made)
    (made / "theirs").touch()
    driver.remove_intermediates(made)
    assert (made / "theirs").exists()


# ---------------------------------------------------------------------------------- laboratory


class Nothing:
    """In place of a model: leaves no numbers, and writes where it may."""

    def __init__(self, python: Path, work: Path) -> None:
        work.mkdir()

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def logits(self, *_: object) -> np.ndarray:
        raise UserError("a model", "none here", "one", "none")


def test_fidelity_leaves_what_lies_in_out(tmp_path, monkeypatch):
    out = plant(tmp_path / "out", "small/theirs", "streamed/pass/theirs")
    before = seen(out)
    monkeypatch.setattr(fidelity, "Streamed", Nothing)
    monkeypatch.setattr(sys, "argv", ["fidelity.py", "--out", str(out)])
    with pytest.raises(UserError, match="none here"):
        fidelity.main()
    assert seen(out) == before


def stopped(*_: object) -> None:
    raise UserError("a turn", "none", "one", "none")


def test_make_stock_leaves_the_workplace_of_a_conversion(tmp_path):
    """BUNDLE's hidden sibling holds hours of convert's work when that was interrupted."""
    bundle = tmp_path / "bundle"
    theirs = plant(staging_folder(bundle), "model-00001-of-00002.safetensors")
    before = seen(theirs)
    must("make_stock", "--source", NANO, "--bundle", bundle)
    assert seen(theirs) == before
    assert (bundle / make_stock.INDEX).is_file()
    assert not list(tmp_path.glob(".making-*"))


def test_the_matrix_leaves_what_lies_in_work(tmp_path, monkeypatch):
    work = plant(tmp_path / "work", "bundles/.mlx.making/theirs", "bundles/.random.source/theirs",
                 "stacks/new/theirs")  # fmt: skip
    before = seen(work)
    monkeypatch.setattr(matrix, "run_script", stopped)
    monkeypatch.setattr(matrix, "make_bundle", stopped)
    for name in ("mlx", matrix.RANDOM):
        with pytest.raises(UserError):
            matrix.bundles(work, [name])
    with pytest.raises(UserError, match="no environment"):
        matrix.python_of("new", work)
    assert seen(work) == before


def test_a_streamed_pass_leaves_what_lies_in_its_folder(tmp_path, monkeypatch):
    work = plant(tmp_path / "work", "pass/theirs")
    before = seen(work)

    class Engine:
        def __init__(self, *_: object) -> None: ...

        def run(self, asked: dict, name: str) -> None:
            np.save(Path(asked["work"]) / activations.LOGITS, np.full((len(asked["ids"]), 2), 7.0))

    monkeypatch.setattr(driver, "WorkerProcess", Engine)
    monkeypatch.setattr(driver, "settings_for", lambda *_: None)
    found = model_error.Streamed(Path(), work).logits(NANO, "source", [[1, 2], [3]])
    assert found.tolist() == [[7.0, 7.0]] * 3
    assert seen(work) == before


def test_training_anew_leaves_the_work_folder_and_replaces_no_foreign_checkpoint(tmp_path):
    pytest.importorskip("torch")
    from nano import export, training
    from nano.architecture import NANO as ARCHITECTURE

    folder = plant(tmp_path / "folder", "model-00001-of-00046.safetensors", "config.json")
    before = seen(folder)
    with pytest.raises(ValueError, match=r"expected an empty folder or a nano checkpoint"):
        export.check_folder(folder, ARCHITECTURE)
    state = folder / "theirs"
    with pytest.raises(ValueError, match="another file"):
        training.forget(state)
    assert seen(folder) == before
    (tmp_path / "empty").mkdir()
    for right in (NANO, tmp_path / "none", tmp_path / "empty"):
        export.check_folder(right, ARCHITECTURE)
    recipe = training.Recipe(1, 1, 1, 1, 16, 1, 1e-3, 0.05, 2)
    training.save_state(folder / "state.pt", training.fresh_state(ARCHITECTURE, recipe), recipe)
    training.forget(folder / "state.pt")
    training.forget(folder / "state.pt")
    assert seen(folder) == before


# ------------------------------------------------------------------------------------ repair


@pytest.mark.parametrize("step", ["remove_broken", "plan_files"])
def test_what_repair_removes_is_flushed_from_its_folder(tmp_path, monkeypatch, step):
    """Else a power cut brings the file back, beside a record that says it is gone."""
    name, flushed = document_steps.conversation.SPECIAL, []
    (tmp_path / name).write_text("no JSON")
    monkeypatch.setattr(
        safe_paths.filesystem, "flush_folder", lambda fd, path: flushed.append(path)
    )
    options = context.RepairOptions(tmp_path, reference=NANO)
    repair = context.RepairContext(options, None, SimpleNamespace(keep=lambda names: None))
    if step == "remove_broken":
        context.remove_broken(repair, [name])
    else:
        repair.findings = SimpleNamespace(names={"special-tokens-differ"})
        monkeypatch.setattr(document_steps, "copy_files", lambda *_: None)
        monkeypatch.setattr(document_steps, "required_files", lambda origin: [])
        document_steps.plan_files(repair)
        (action,) = repair.actions
        action.apply()
    assert not (tmp_path / name).exists()
    assert flushed == [tmp_path]


# ------------------------------------------------------------------------------ environments


class Place:
    """install.py with a stand-in for venv and pip, which take ten seconds: what runs of it do to
    the files. test_install.py has the real ones."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.pins, self.ran = folder, folder / "pins.txt", []
        self.pins.write_text("tiny==1.0\n")
        self.patch = monkeypatch
        monkeypatch.setattr(install, "run", self.run)

    def run(self, python: Path, *arguments: object, **_: object) -> SimpleNamespace:
        what = arguments[1] if arguments[0] == "-m" else "import"
        if what == "venv":
            (Path(arguments[2]) / "bin").mkdir()
            (Path(arguments[2]) / "bin" / "python").touch()
        self.ran += [what] if what != "import" else []
        absent = what == "pip" and "absent" in self.pins.read_text()
        return SimpleNamespace(returncode=int(absent or not Path(python).is_file()), stderr="")

    def install(self, stamp: Path, *options: str) -> list[str]:
        """What was run: venv, pip. Raises SystemExit as install.py does."""
        self.ran.clear()
        command = ["install.py", *options, str(stamp), str(self.pins), "tiny"]
        self.patch.setattr(sys, "argv", command)
        assert install.main() == 0
        return self.ran


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_an_environment_that_install_did_not_make_is_left_alone(place):
    """Also one by `python -m venv`, a file, and a link that leads nowhere."""
    theirs = plant(place.folder / "venv", "bin/python", "pyvenv.cfg")
    file, link, through = (place.folder / name for name in ("file", "link", "through"))
    file.touch()
    link.symlink_to(place.folder / "nowhere")
    through.symlink_to(theirs)
    before = seen(theirs)
    for folder in (theirs, file, link, through):
        for options in ((), ("--anew",)):
            with pytest.raises(SystemExit, match=f"{folder}: found something that install.py did"):
                place.install(folder / "installed", *options)
    assert seen(theirs) == before
    assert not (place.folder / "nowhere").exists()


def test_no_environment_is_emptied_through_a_link(place):
    """The folder is a link, or the one in which it lies, as .toolchain may be."""
    real = plant(place.folder / "real" / "new")
    (real / install.MARK).write_text("")
    (place.folder / "link").symlink_to(real)
    (place.folder / ".toolchain").symlink_to(real.parent)
    before = seen(real) | {str(real / install.MARK): install.UNFINISHED}
    for folder in (place.folder / "link", place.folder / ".toolchain" / "new"):
        with pytest.raises(SystemExit, match="found a link on the way"):
            place.install(folder / "installed", "--anew")
        assert seen(real) == before


def test_pins_count_by_their_contents_and_an_interrupted_installation_is_redone(place):
    stamp = place.folder / "venv" / "installed"
    mark, left = stamp.parent / install.MARK, stamp.parent / "left"
    assert place.install(stamp, "--anew") == ["venv", "pip"]
    assert (stamp.read_bytes(), mark.read_text()) == (place.pins.read_bytes(), "")
    left.touch()
    os.utime(place.pins, (time.time() + 100,) * 2)
    assert place.install(stamp, "--anew") == []
    assert left.exists()
    place.pins.write_text("other==1.0\n")
    assert place.install(stamp, "--anew") == ["venv", "pip"]
    assert not left.exists()
    left.touch()
    above = stamp.with_name("tests-installed")
    above.write_text("stands on installed")
    mark.write_text(install.UNFINISHED)  # as when pip was killed
    assert place.install(stamp) == ["venv", "pip"]
    assert (left.exists(), above.exists(), mark.read_text()) == (False, False, "")
    left.touch()
    above.write_text("stands on installed")
    place.pins.write_text("tiny==1.0\n")
    assert place.install(stamp) == ["pip"]  # on top of what is there
    assert (left.exists(), above.exists()) == (True, False)
    place.pins.write_text("absent==1.0\n")
    with pytest.raises(SystemExit, match="pip could not install"):
        place.install(stamp)
    assert (stamp.exists(), left.exists(), mark.read_text()) == (False, True, "")


def test_a_pip_that_ends_half_way_leaves_the_environment_unfinished(tmp_path, monkeypatch):
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    for touched, status, unfinished in (
        (True, -signal.SIGKILL, True), (True, 1, True), (False, 1, False), (True, 0, False)
    ):  # fmt: skip
        (tmp_path / install.MARK).write_text(install.UNFINISHED)

        def pip(*_, touched=touched, status=status, **__):
            (packages / f"{time.monotonic_ns()}").touch() if touched else None
            return SimpleNamespace(returncode=status)

        monkeypatch.setattr(install, "run", pip)
        if status:
            with pytest.raises(SystemExit):
                install.fill(tmp_path, tmp_path / "pins")
        else:
            install.fill(tmp_path, tmp_path / "pins")
        assert install.is_unfinished(tmp_path) == unfinished


def test_the_empty_stamp_of_before_is_taken_when_it_is_newer_than_the_pins(place):
    stamp = place.folder / "venv" / "installed"
    place.install(stamp, "--anew")
    for newer in (True, False):
        (stamp.parent / install.MARK).unlink()
        stamp.write_text("")
        os.utime(place.pins, (time.time() + (-100 if newer else 100),) * 2)
        assert place.install(stamp, "--anew") == ([] if newer else ["venv", "pip"])
        assert stamp.read_bytes() == place.pins.read_bytes()
        assert place.install(stamp, "--anew") == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    return Copy(tmp_path_factory.mktemp("copy"))


def planned(copy: Copy, *targets: str) -> list[str]:
    """The stamps for which make would run install.py."""
    said = copy.make("--dry-run", *targets).stdout.splitlines()
    words = [line.split("install.py ")[1].split() for line in said if "install.py " in line]
    return [word for line in words for word in line[:2] if word.endswith("installed")]


def test_make_installs_again_for_other_contents_only(copy):
    venv, new = copy.folder / ".venv", copy.folder / ".toolchain" / "new"
    pins = copy.folder / "scripts" / "stacks" / "new.txt"
    for path in (pins, copy.folder / "requirements.txt"):
        os.utime(path, (time.time() + 100,) * 2)
    assert planned(copy, "venv") == []
    before = pins.read_text()
    pins.write_text(before + "six\n")
    assert planned(copy, "venv") == [".toolchain/new/installed"]
    pins.write_text(before)
    tests = copy.folder / "tests" / "requirements.txt"
    tests.parent.mkdir()
    tests.write_text("pytest\n")
    shutil.copy(tests, venv / "tests-installed")
    assert planned(copy, ".venv/tests-installed") == []
    for folder, found in ((new, [".toolchain/new/installed"]), (venv, [".venv/installed"])):
        (folder / install.MARK).write_text(install.UNFINISHED)
        assert planned(copy, "venv") == found
        (folder / install.MARK).write_text("")
    (venv / install.MARK).write_text(install.UNFINISHED)
    assert planned(copy, ".venv/tests-installed") == [".venv/installed", ".venv/tests-installed"]
    (venv / install.MARK).write_text("")
    assert planned(copy, "venv", ".venv/tests-installed") == []


def test_make_removes_no_toolchain_itself(copy):
    """Only install.py does, which looks whose it is."""
    pins = copy.folder / "scripts" / "stacks" / "new.txt"
    before = pins.read_text()
    pins.write_text("six\n")
    try:
        assert "rm -r" not in copy.make("--dry-run", "venv").stdout
    finally:
        pins.write_text(before)


# ------------------------------------------------------------------------- selftest and clean


@pytest.mark.parametrize("kind", ["folder", "link", "nowhere", "file"])
def test_selftest_removes_only_its_own_folder(copy, kind):
    folder = copy.folder / "build" / "selftest"
    theirs = plant(copy.folder / f"of {kind}", "made-by-selftest")
    folder.parent.mkdir(exist_ok=True)
    if kind == "folder":
        plant(folder)
    elif kind == "file":
        folder.touch()
    else:
        folder.symlink_to(theirs if kind == "link" else "nowhere")
    before = seen(theirs)
    try:
        said = copy.refusal("selftest", "MAKE=true")
        assert "build/selftest: found what this target did not make, expected nothing" in said
        assert os.path.lexists(folder)
        assert (folder / "theirs").exists() == (kind in ("folder", "link"))
        assert seen(theirs) == before
    finally:
        shutil.rmtree(folder) if kind == "folder" else folder.unlink()


def test_selftest_removes_what_it_made(copy):
    folder = copy.folder / "build" / "selftest"
    folder.mkdir(parents=True)
    (folder / "made-by-selftest").touch()
    (folder / "bundle").mkdir()
    copy.make("selftest", "MAKE=true")
    assert [path.name for path in folder.iterdir()] == ["made-by-selftest"]


def test_clean_removes_stamps_and_reports_of_the_recipe_alone(copy):
    build = copy.folder / "build"
    theirs = plant(build / "mine", "a.stamp", "settings", "verify.json", "evaluate.md")
    plant(build / "2026-notes", "verify.json")
    own_names = ("check.stamp", "settings", "verify.json", "verify.html", "accept.json")
    plant(build / "123", *own_names)
    (build / "124").symlink_to(theirs)
    plant(build / "fidelity", "fidelity.json", "fidelity.md.kept")
    before = seen(theirs)
    assert copy.make("clean").returncode == 0
    assert seen(theirs) == before
    assert (build / "2026-notes" / "verify.json").exists()
    assert sorted(path.name for path in (build / "123").iterdir()) == ["link", "theirs"]
    kept = sorted(path.name for path in (build / "fidelity").iterdir())
    assert kept == ["fidelity.md.kept", "link", "theirs"]
