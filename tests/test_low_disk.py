"""LOW_DISK=1 against a hub on this machine: what is on the disk, what is fetched, what is deleted.

Catches: a source shard deleted before all that needs it is durable and compared, or one that this
run did not fetch, or without the flag; bytes fetched again after a kill; another bundle than from a
source that lies there whole; a disk that fills with what was used.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import bundles
import numpy as np
import pytest
from conftest import SEED, Commands, must, script
from hub_server import Hub
from test_download import environment
from test_recipe import Recipe

from dsv4.hub.provenance import provenance, read_record
from dsv4.model.source import open_headers
from dsv4.quantization.fp8 import E4M3
from dsv4.storage.checkpoint import SIDECAR
from dsv4.storage.tensor_reader import round_to_dtype

REPO = "deepseek-ai/DeepSeek-V4-Flash"
KILLS = int(os.environ.get("KILLS", "20")) // 2
SHARD_BYTES = "6e5"


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A source of 6 MB in twelve shards, as it lies on the hub; with DSpark."""
    folder = tmp_path_factory.mktemp("origin") / "source"
    sizes = '{"num_hidden_layers": 2, "compress_ratios": [4, 128]}'
    must("lab/make_source", "--source", folder, "--seed", 11, "--shards", 12, "--dspark",
         "--sizes", sizes)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def wanted(origin, tmp_path_factory) -> dict[str, bytes]:
    """The bundle as it is made of a source that lies there whole."""
    folder = tmp_path_factory.mktemp("wanted") / "bundle"
    must("convert", "--source", origin, "--bundle", folder, "--shard-bytes", SHARD_BYTES)
    return shards(folder)


@pytest.fixture(scope="module")
def files(origin) -> dict[str, bytes]:
    return {str(p.relative_to(origin)): p.read_bytes() for p in origin.rglob("*") if p.is_file()}


@pytest.fixture
def hub(files):
    with Hub() as hub:
        hub.add(REPO, files)
        yield hub


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("model-*.safetensors"))}


class Place:
    """A folder with a source and a bundle, and the commands that LOW_DISK=1 runs there."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.source, self.bundle, self.hub = folder / "source", folder / "bundle", hub
        self.env = environment(hub, self.source)
        self.where = ["--source", str(self.source), "--repo", REPO, "--patience", "0"]

    def command(self, name: str, *options: str) -> list[str]:
        extra = ["--bundle", str(self.bundle), "--shard-bytes", SHARD_BYTES]
        where = [*self.where, *(extra if name == "convert" else [])]
        return [name, *where, "--low-disk", *options]

    def run(self, name: str, *options: str) -> subprocess.CompletedProcess:
        return script(*self.command(name, *options), env=self.env, timeout=120)

    def must(self, name: str, *options: str) -> str:
        done = self.run(name, *options)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    def fetched(self) -> int:
        """Bytes of shards that came, headers too."""
        return sum(request.sent for request in self.hub.requests if request.store)


@pytest.fixture
def place(tmp_path, hub) -> Place:
    return Place(tmp_path, hub)


@pytest.fixture
def prepared(place) -> Place:
    """After the download stage: small files and headers."""
    place.must("download")
    assert not shards(place.source)
    place.hub.requests.clear()
    return place


class Watch(threading.Thread):
    """The most source shards and bytes of them that lay there at one time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.number, self.over = folder, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            sizes = []
            for path in [*self.folder.glob("model-*"), *self.folder.glob(".model-*.partial")]:
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            self.most, self.number = max(self.most, sum(sizes)), max(self.number, len(sizes))
            time.sleep(0.001)


def test_the_bundle_is_the_same_and_the_disk_holds_a_few_shards(prepared, wanted, files):
    promised = prepared.must("convert", "--dry-run")
    watch = Watch(prepared.source)
    watch.start()
    prepared.must("convert")
    watch.over.set()
    watch.join()
    assert shards(prepared.bundle) == wanted
    assert not shards(prepared.source)
    sizes = {name: len(data) for name, data in files.items() if name.startswith("model-")}
    most = re.search(r"for good, ([0-9.]+) MB .* while it runs", promised)
    assert 0 < watch.most <= float(most[1]) * 1e6 + 50_000 < sum(sizes.values()) / 2
    assert watch.number <= 5
    assert prepared.fetched() == sum(sizes.values())  # each byte once
    assert provenance(prepared.source)["repo"] == REPO
    said = json.loads((prepared.bundle / "jang_config.json").read_text())["source_model"]
    assert said == f"{REPO}@{prepared.hub.repos[REPO].refs['main']}"


def test_a_second_run_needs_no_network(prepared):
    prepared.must("convert")
    prepared.hub.requests.clear()
    assert "already" in prepared.must("convert")
    prepared.must("download")
    assert prepared.hub.requests == []


@pytest.mark.parametrize("n", [3, 9])
def test_killed_before_a_rename_it_goes_on_and_fetches_nothing_twice(prepared, wanted, n):
    killed = ("os", "rename", n, signal.SIGKILL)
    done = script(*prepared.command("convert"), env=prepared.env, kill=killed)
    assert done.returncode == -signal.SIGKILL
    used, asked = freed(prepared), len(prepared.hub.requests)
    prepared.must("convert")
    again = {Path(request.path).name for request in prepared.hub.requests[asked:]} & used
    assert not again, f"fetched again: {again}"
    assert shards(prepared.bundle) == wanted
    assert not shards(prepared.source)


@pytest.mark.full
def test_killed_anywhere_it_goes_on_and_fetches_nothing_twice(prepared, wanted):
    rng = random.Random(SEED)
    kills = 0
    with Commands(prepared.env) as forks:
        while kills < KILLS:
            used, asked = freed(prepared), len(prepared.hub.requests)
            pid = forks.start(*prepared.command("convert"))
            kill_after(pid, prepared, rng.randrange(1, 1_200_000), rng.uniform(0, 0.05))
            status = forks.status()
            again = {Path(r.path).name for r in prepared.hub.requests[asked:]} & used
            assert not again, f"fetched again: {again}"
            if status == 0:
                assert shards(prepared.bundle) == wanted
                shutil.rmtree(prepared.bundle)
                restart(prepared)
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
    prepared.must("convert")
    assert shards(prepared.bundle) == wanted
    assert not shards(prepared.source)


@pytest.mark.full
def test_stacks_of_experts_are_the_same_after_kills(prepared, origin, tmp_path):
    turbo, whole = ("--quantizer", "turboquant2"), tmp_path / "whole"
    must("convert", "--source", origin, "--bundle", whole, "--shard-bytes", SHARD_BYTES, *turbo)
    with Commands(prepared.env) as forks:
        for more in (500_000, 2_000_000):
            pid = forks.start(*prepared.command("convert", *turbo))
            kill_after(pid, prepared, more, 0.01)
            assert forks.status() == -signal.SIGKILL
        forks.start(*prepared.command("convert", *turbo))
        assert forks.status() == 0
    assert shards(prepared.bundle) == shards(whole)
    assert (prepared.bundle / SIDECAR).read_bytes() == (whole / SIDECAR).read_bytes()
    assert not shards(prepared.source)


def freed(place: Place) -> set[str]:
    """The shards that were used and deleted."""
    state = read_record(place.source).low_disk
    return {name for name in state if state[name] == "freed"}


def kill_after(pid: int, place: Place, more: int, delay: float) -> None:
    """Kill the run `delay` seconds after `more` bytes have come, if it fetches so many."""
    wanted, end = place.fetched() + more, time.monotonic() + 60
    while place.fetched() < wanted and not place.bundle.exists():
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def restart(place: Place) -> None:
    """As if nothing had been done yet: the download stage again, and the counters at zero."""
    shutil.rmtree(place.source)
    place.must("download")
    place.hub.requests.clear()


def test_values_that_cannot_be_weights_stop_it_before_they_are_freed(origin, tmp_path):
    """Codes of FP8 without their scale, as BF16; in the source's last layer."""
    name, folder = "layers.1.attn.wq_b", shutil.copytree(origin, tmp_path / "origin")

    def drop_scale(arrays: bundles.Arrays) -> None:
        if f"{name}.scale" in arrays:
            del arrays[f"{name}.scale"]
            codes = arrays[f"{name}.weight"][1]
            values = round_to_dtype(E4M3[codes], "BF16").view(np.uint16).reshape(codes.shape)
            arrays[f"{name}.weight"] = "BF16", values

    bundles.edit(folder, drop_scale)
    with Hub() as hub:
        hub.add(REPO, {str(p.relative_to(folder)): p.read_bytes()
                       for p in folder.rglob("*") if p.is_file()})  # fmt: skip
        place = Place(tmp_path, hub)
        place.must("download")
        done = place.run("convert")
        assert done.returncode == 1
        assert f"{name}.weight: BF16 values that are all FP8 codes" in done.stderr
        assert not place.bundle.exists()
        at = open_headers(folder).weight_map[f"{name}.weight"]
        assert (place.source / at).is_file()


def test_what_lay_there_before_is_used_and_never_deleted(prepared, wanted, files):
    mine = "model-00003-of-00012.safetensors"
    (prepared.source / mine).write_bytes(files[mine])
    prepared.must("convert")
    assert shards(prepared.bundle) == wanted
    assert shards(prepared.source) == {mine: files[mine]}
    assert not prepared.hub.asked(mine)


def test_a_folder_that_this_recipe_did_not_fill_is_refused(place, origin):
    shutil.copytree(origin, place.source)
    before = shards(place.source)
    done = place.run("convert")
    assert done.returncode == 1
    assert "no download prepared" in done.stderr
    assert shards(place.source) == before


def test_without_the_flag_nothing_is_deleted(place, files, wanted):
    """After an ordinary download, and after an ordinary conversion of it."""
    plain = [part for part in place.command("download") if part != "--low-disk"]
    assert script(*plain, env=place.env).returncode == 0
    must("convert", "--source", place.source, "--bundle", place.bundle,
         "--shard-bytes", SHARD_BYTES)  # fmt: skip
    assert shards(place.source) == {n: d for n, d in files.items() if n.startswith("model-")}
    shutil.rmtree(place.bundle)
    place.must("download")  # now with it, but they were there before
    place.must("convert")
    assert shards(place.bundle) == wanted
    assert len(shards(place.source)) == 12


def test_a_shard_that_the_disk_garbled_stops_the_run_before_anything_is_freed(prepared, wanted):
    """A whole shard of a killed run whose bytes are not what was written, and its sources."""
    work = prepared.bundle.with_name(".bundle.converting")
    work.mkdir()
    name = min(wanted)
    data = bytearray(wanted[name])
    data[len(data) // 2] ^= 1
    (work / name).write_bytes(data)
    plan = prepared.must("convert", "--dry-run")
    assert f"{len(wanted) - 1} to write" in plan
    needed = sorted(prepared.hub.repos[REPO].commits[prepared.hub.repos[REPO].refs["main"]])
    needed = [file for file in needed if file.startswith("model-")][:3]
    record = read_record(prepared.source)
    for file in needed:
        content = prepared.hub.repos[REPO].commits[record.commit][file]
        (prepared.source / file).write_bytes(content)
        record.low_disk[file] = "fetched"
        record.set_verified(prepared.source, file)
    record.write(prepared.source)
    done = prepared.run("convert")
    assert done.returncode == 1
    assert "other bytes on the disk" in done.stderr
    assert name in done.stderr
    assert set(needed) <= set(shards(prepared.source))


def test_a_lost_connection_ends_in_one_line_and_resumes(prepared, wanted):
    from hub_server import Fault

    prepared.hub.faults.append(Fault("model-00007-of", break_after=1000))
    done = prepared.run("convert")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "no connection" in done.stderr
    prepared.hub.faults.clear()
    prepared.must("convert")
    assert shards(prepared.bundle) == wanted


@pytest.mark.full
def test_make_all_in_little_space(origin, hub, wanted, tmp_path):
    """The whole recipe, from an empty folder to a verified bundle."""
    recipe = Recipe(tmp_path, origin)
    shutil.rmtree(recipe.source)
    env = environment(hub, recipe.source)
    clean = {k: v for k, v in env.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "all", "LOW_DISK=1", f"REPO={REPO}", f"SOURCE={recipe.source}",
         f"BUNDLE={recipe.bundle}", f"SHARD_BYTES={SHARD_BYTES}",
         "TOOLCHAIN_PYTHON=.venv/bin/python"],
        cwd=recipe.folder, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished and verified" in done.stdout
    assert shards(recipe.bundle) == wanted
    assert not shards(recipe.source)


def test_a_mixture_is_planned_from_a_little_of_the_hub(prepared, wanted, files, tmp_path):
    plan = str(tmp_path / "plan.json")
    size = str(int(0.85 * sum(map(len, wanted.values()))))
    mtp = ("--mtp", "as-experts")
    assert "written" in prepared.must("plan", "--plan", plan, "--size", size, *mtp)
    assert not shards(prepared.source)
    assert prepared.fetched() < sum(map(len, files.values()))
    prepared.must("convert", "--quantizer", "mixture", "--plan", plan, *mtp)
    assert 0 < sum(map(len, shards(prepared.bundle).values())) <= int(size)
