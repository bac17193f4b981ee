"""scripts/requantize.py, run as a process, against the reference in tests/small.py."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import conftest
import numpy as np
import pytest
import small
from conftest import Commands
from here import here

from dsv4.conversion.job_array import parse_part
from dsv4.conversion.shard_metadata import made_by
from dsv4.model.load import open_bundle
from dsv4.model.names import parse_expert
from dsv4.model.source import open_source
from dsv4.quantization.formats import get_quantizer
from dsv4.storage import locks
from dsv4.storage.checkpoint import check_index
from dsv4.storage.safetensors_file import PendingTensor, read_array, read_shard, write_shard

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "requantize.py"


def command(source: Path, bundle: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--source", str(source), "--bundle", str(bundle), *options]


def requantize(
    source: Path, bundle: Path, *options: str, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    how = {"preexec_fn": before} if before else {}
    return conftest.script("requantize", *command(source, bundle, *options)[2:], **how)


def start(source: Path, bundle: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(source, bundle, *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def temporaries(bundle: Path) -> set[tuple[str, int]]:
    """Names of unfinished files, with the moment of their last change."""
    found = set()
    for path in bundle.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def wait_for_work(is_running: Callable[[], bool], bundle: Path, old: set[tuple[str, int]]) -> bool:
    """Wait until a run writes a file that is not one of the `old` ones; False when it ended."""
    while is_running():
        if temporaries(bundle) - old:
            return True
        time.sleep(0.0005)
    return False


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_holds(bundle: Path, expected: small.Arrays) -> None:
    """The bundle holds exactly the expected tensors, bit for bit, and its index is right."""
    opened = open_bundle(bundle)
    check_index(opened, "test")
    assert set(opened.tensors) == set(expected)
    for name, (dtype, array) in expected.items():
        tensor = opened.tensors[name]
        assert (tensor.dtype, tensor.shape) == (dtype, array.shape), name
        assert read_array(tensor).tobytes() == np.ascontiguousarray(array).tobytes(), name


@pytest.mark.parametrize(
    "sizes",
    [
        small.Sizes(),
        small.Sizes(layers=11, experts=1, mtp=2, source_shard=7, bundle_shard=1),
        small.Sizes(hidden=96, width=160, source_shard=1000, bundle_shard=1000),
        small.Sizes(layers=1, mtp=0, source_shard=1, bundle_shard=2),
    ],
    ids=["plain", "layers-over-9-and-a-tensor-a-shard", "odd-shapes-one-shard", "split-triples"],
)
def test_a_stock_bundle_becomes_the_reference(tmp_path: Path, sizes: small.Sizes) -> None:
    source, bundle, expected = small.make(tmp_path, sizes, seed=1)
    before = digests(source)
    done = requantize(source, bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert_holds(bundle, expected)
    assert digests(source) == before
    config = json.loads((bundle / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["eos_token_id"] == 1
    assert config["quantization"]["layers.0.ffn.experts.0.w1"]["bits"] == 4


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(), seed=2)
    assert requantize(source, bundle).returncode == 0
    before = digests(bundle)
    times = {path: path.stat().st_mtime_ns for path in bundle.iterdir()}
    again = requantize(source, bundle)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert digests(bundle) == before
    assert {path: path.stat().st_mtime_ns for path in bundle.iterdir()} == times


def test_new_biases_follow_their_scales(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(), seed=3)
    assert requantize(source, bundle).returncode == 0
    for path in bundle.glob("*.safetensors"):
        names = list(read_shard(path).tensors)
        for i, name in enumerate(names):
            if parse_expert(name) and name.endswith(".scales"):  # others are not new
                assert names[i + 1] == name.replace(".scales", ".biases")


MANY_SHARDS = small.Sizes(layers=3, experts=4, hidden=128, width=256, bundle_shard=5)


def whole_run(tmp: Path, sizes: small.Sizes, seed: int) -> tuple[Path, Path, dict[str, str]]:
    """(source, untouched stock bundle, digests of what an uninterrupted run makes of it)."""
    source, bundle, _ = small.make(tmp, sizes, seed)
    stock = tmp / "stock"
    shutil.copytree(bundle, stock)
    assert requantize(source, bundle).returncode == 0
    return source, stock, digests(bundle)


def time_of_work(forks: Commands, source: Path, stock: Path, bundle: Path) -> float:
    """Seconds from a run's first write to its end."""
    shutil.copytree(stock, bundle)
    forks.start("requantize", "--source", source, "--bundle", bundle)
    assert wait_for_work(forks.is_running, bundle, set())
    begin = time.perf_counter()
    assert forks.status() == 0
    return time.perf_counter() - begin


@pytest.mark.parametrize("n", [0, 3, 6])
def test_a_run_killed_before_a_rename_loses_nothing(tmp_path: Path, n: int) -> None:
    source, bundle, expected = whole_run(tmp_path, MANY_SHARDS, seed=4)
    folders = ("--source", source, "--bundle", bundle)
    done = conftest.script("requantize", *folders, kill=("os", "rename", n, signal.SIGKILL))
    assert done.returncode == -signal.SIGKILL
    open_bundle(bundle)  # every shard is whole
    assert requantize(source, bundle).returncode == 0
    assert digests(bundle) == expected


@pytest.mark.full
def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    """kill -9 at random moments of real runs: shards stay whole, the end is byte for byte the same.

    Catches a shard renamed before it is whole, a temporary that stays, a resumed run that differs.
    """
    rng = random.Random(conftest.SEED)
    source, stock, expected = whole_run(tmp_path, MANY_SHARDS, seed=4)
    kills, rounds = 0, 0
    with Commands() as forks:
        span = time_of_work(forks, source, stock, tmp_path / "timed")
        while kills < 50:
            rounds += 1
            bundle = tmp_path / f"round-{rounds}"
            shutil.copytree(stock, bundle)
            while True:
                old = temporaries(bundle)
                pid = forks.start("requantize", "--source", source, "--bundle", bundle)
                if wait_for_work(forks.is_running, bundle, old):
                    time.sleep(rng.random() * span)
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.kill(pid, signal.SIGKILL)
                status = forks.status()
                open_bundle(bundle)  # every shard is whole, whatever happened
                if status == 0:
                    break
                assert status == -signal.SIGKILL
                kills += 1
                if kills >= 50:
                    assert requantize(source, bundle).returncode == 0
                    break
            assert digests(bundle) == expected, f"round {rounds}"
    print(f"{kills} kills in {rounds} rounds, up to {span:.2f} s after the first write")


def test_ctrl_c_leaves_no_temporary_and_the_next_run_goes_on(tmp_path: Path) -> None:
    source, bundle, expected = whole_run(tmp_path, MANY_SHARDS, seed=5)
    folders = ("--source", source, "--bundle", bundle)
    done = conftest.script("requantize", *folders, kill=("os", "rename", 2, signal.SIGINT))
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1
    assert "interrupted" in done.stderr
    assert not list(bundle.glob(".*"))
    assert requantize(source, bundle).returncode == 0
    assert digests(bundle) == expected


def test_a_full_disk_stops_the_run_and_the_next_one_finishes(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: some shards fit, the largest does not."""
    source, bundle, expected = whole_run(tmp_path, MANY_SHARDS, seed=6)
    before = digests(bundle)
    changed = [name for name, digest in expected.items() if before.get(name) != digest]
    limit = max((tmp_path / "bundle" / name).stat().st_size for name in changed) - 8192

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    stopped = requantize(source, bundle, before=lower)
    assert stopped.returncode == 1
    assert stopped.stderr.count("\n") == 1
    assert "ulimit -f" in stopped.stderr
    assert set(digests(bundle)) == set(before)
    assert requantize(source, bundle).returncode == 0
    assert digests(bundle) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs takes root")
def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    source, stock, expected = whole_run(tmp_path, MANY_SHARDS, seed=7)
    need = sum(path.stat().st_size for path in stock.iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={need + (128 << 10)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no mounting here")
    try:
        shutil.copytree(stock, disk / "bundle")
        before = digests(disk / "bundle")
        stopped = requantize(source, disk / "bundle")
        assert stopped.returncode == 1
        assert "free" in stopped.stderr
        assert digests(disk / "bundle") == before
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        assert requantize(source, disk / "bundle").returncode == 0
        assert digests(disk / "bundle") == expected
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_two_runs_at_once_make_one_bundle(tmp_path: Path) -> None:
    """The second says so and stops, unless the first was quicker than its start."""
    source, bundle, expected = whole_run(tmp_path, MANY_SHARDS, seed=8)
    runs = [start(source, bundle) for _ in range(3)]
    outcomes = [(*run.communicate(timeout=60), run.returncode) for run in runs]
    assert any(status == 0 for _, _, status in outcomes)
    for output, said, status in outcomes:
        assert status == 0 or "another run" in said, (output, said)
    assert digests(bundle) == expected


@pytest.mark.parametrize(
    ("held", "options", "word"),
    [
        (None, [], "another run"),
        ("2/3", [], "another run"),
        ("2/3", ["--part", "2/3"], "another run"),
        ("2/3", ["--part", "2/2"], "a part of 3 begun"),
        ("2/3", ["--part", "1/3", "--quantizer", "affine4g32"], "a part with other settings begun"),
        ("2/3", ["--part", "1/3"], ""),
    ],
    ids=["whole-whole", "part-whole", "same-part", "overlapping", "other-quantizer", "disjoint"],
)
def test_a_second_run_on_the_same_shards_stops(
    tmp_path: Path, held: str | None, options: list[str], word: str
) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(bundle_shard=8), seed=9)
    before = digests(bundle)
    work = f"{made_by(open_source(source), get_quantizer('mlx'))}"
    with locks.locked(bundle, parse_part(held).lock_key(work) if held else None):
        second = requantize(source, bundle, *options)
    for lock in bundle.glob(".*.lock"):
        lock.unlink()  # parts leave them to a whole run
    (bundle / ".lock").unlink(missing_ok=True)
    assert second.returncode == (1 if word else 0), second.stderr
    assert word in second.stderr
    assert (digests(bundle) == before) == bool(word)


def test_parts_make_the_same_bytes_as_the_whole(tmp_path: Path) -> None:
    source, bundle, expected = whole_run(tmp_path, MANY_SHARDS, seed=10)
    parts = [start(source, bundle, "--part", f"{k}/4", "--jobs", "1") for k in (1, 2, 3, 4)]
    for part in parts:
        output, errors = part.communicate(timeout=120)
        assert (part.returncode, errors) == (0, ""), errors
        assert "without --part" in output
    last = requantize(source, bundle)
    assert "index and config completed" in last.stdout
    assert digests(bundle) == expected


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(), seed=11)
    before, times = digests(tmp_path), bundle.stat().st_mtime_ns
    done = requantize(source, bundle, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (" to write, ", "routed experts", "controls", "extra disk", "time:"):
        assert word in done.stdout
    assert digests(tmp_path) == before
    assert bundle.stat().st_mtime_ns == times


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    source, bundle, expected = whole_run(tmp_path, small.Sizes(), seed=12)
    for name in (".gone.safetensors.partial", ".config.json.partial"):
        (bundle / name).write_bytes(b"half")
    assert requantize(source, bundle).returncode == 0
    assert digests(bundle) == expected


def test_a_shard_without_experts_or_controls_is_left_alone(tmp_path: Path) -> None:
    """No byte of the embedding is written again; not even its order is ours to change."""
    source, bundle, _ = small.make(tmp_path, small.Sizes(bundle_shard=2), seed=26)
    first = (
        bundle
        / json.loads((bundle / "model.safetensors.index.json").read_text())["weight_map"][
            "embed.weight"
        ]
    )
    assert set(read_shard(first).tensors) <= {"embed.weight", "embed.scales", "embed.biases"}
    before = first.stat()
    assert requantize(source, bundle).returncode == 0
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


# --- What must stop the run, before anything is written ---


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def drop_tensor(folder: Path, name: str) -> None:
    """Rewrite the shard that holds `name` without it, and take it out of the index."""
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name]
    kept = {n: (t.dtype, read_array(t)) for n, t in read_shard(folder / file).tensors.items()}
    del kept[name]
    save_shard(folder / file, kept)
    edit_json(index, lambda value: value["weight_map"].pop(name))


def save_shard(path: Path, arrays: small.Arrays, metadata: dict[str, str] | None = None) -> None:
    planned = [
        PendingTensor(name, dtype, array.shape, lambda a=array: [np.ascontiguousarray(a)])
        for name, (dtype, array) in arrays.items()
    ]
    write_shard(path, planned, metadata or {})


def set_bytes(folder: Path, name: str, index: int, data: bytes) -> None:
    """Overwrite bytes of one tensor in place."""
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensor = read_shard(folder / file).tensors[name]
    with (folder / file).open("r+b") as shard:
        shard.seek(tensor.offset + index)
        shard.write(data)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


EXPERT = "layers.1.ffn.experts.2.w2"
BREAKAGES = {
    "missing-source-scale": (lambda s, b: drop_tensor(s, f"{EXPERT}.scale"), f"{EXPERT}.scale"),
    "missing-source-shard": (
        lambda s, b: next(iter(sorted(s.glob("*.safetensors")))).unlink(), "shards missing",
    ),
    "truncated-source-shard": (
        lambda s, b: os.truncate(first_shard(s), 3000), "3,000",
    ),
    "missing-bundle-scales": (lambda s, b: drop_tensor(b, f"{EXPERT}.scales"), f"{EXPERT}.scales"),
    "missing-bundle-norm": (lambda s, b: drop_tensor(b, "norm.weight"), "norm.weight"),
    "missing-bundle-shard": (
        lambda s, b: first_shard(b).unlink(), "model-00001-of-",
    ),
    "stray-bundle-shard": (
        lambda s, b: shutil.copy(
            first_shard(b), b / "model-00005.safetensors"
        ), "model-00005",
    ),
    "index-without-a-key": (
        lambda s, b: edit_json(
            b / "model.safetensors.index.json", lambda v: v["weight_map"].pop(f"{EXPERT}.weight")
        ), f"{EXPERT}.weight",
    ),
    "index-out-of-the-folder": (
        lambda s, b: edit_json(
            b / "model.safetensors.index.json",
            lambda v: v["weight_map"].update({"norm.weight": "../../x.safetensors"}),
        ), "../../x",
    ),
    "absolute-path-in-the-index": (
        lambda s, b: edit_json(
            b / "model.safetensors.index.json",
            lambda v: v["weight_map"].update({"norm.weight": "/etc/passwd"}),
        ), "/etc/passwd",
    ),
    "too-few-experts-in-config": (
        lambda s, b: [
            edit_json(f / "config.json", lambda v: v.update(n_routed_experts=2)) for f in (s, b)
        ], "layers.0.ffn.gate.weight: shape",
    ),
    "other-counts-in-the-bundle": (
        lambda s, b: edit_json(b / "config.json", lambda v: v.update(num_hidden_layers=3)),
        "num_hidden_layers",
    ),
    "wrong-model-type": (
        lambda s, b: edit_json(b / "config.json", lambda v: v.update(model_type="llama")), "llama",
    ),
    "experts-of-another-source": (
        lambda s, b: set_bytes(b, "layers.0.ffn.experts.0.w1.scales", 0, b"\x01"), "other values",
    ),
    "controls-of-another-source": (
        lambda s, b: set_bytes(b, "layers.1.ffn.gate.bias", 0, b"\x01\x02"), "other values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_does_not_fit_stops_the_run_before_it_writes(tmp_path: Path, breakage: str) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(bundle_shard=25), seed=13)
    apply, word = BREAKAGES[breakage]
    apply(source, bundle)
    before = digests(tmp_path)
    status, _, errors = here("requantize", "--source", source, "--bundle", bundle)
    assert status == 1
    assert errors.count("\n") == 1, errors
    assert errors.startswith("error: ")
    assert word in errors
    assert digests(tmp_path) == before


def test_another_source_of_the_same_shape_is_recognised(tmp_path: Path) -> None:
    """A finished bundle says in its shards which source it is of; so does a half-finished one."""
    source, bundle, _ = small.make(tmp_path / "one", small.Sizes(bundle_shard=8), seed=14)
    other, _, _ = small.make(tmp_path / "two", small.Sizes(bundle_shard=8), seed=15)
    assert requantize(source, bundle, "--part", "2/3").returncode == 0
    before = digests(bundle)
    before = {name: value for name, value in before.items() if not name.endswith(".lock")}
    stopped = requantize(other, bundle)  # which removes the locks that parts leave
    assert stopped.returncode == 1
    assert "made from source" in stopped.stderr
    assert digests(bundle) == before


@pytest.mark.parametrize(
    ("byte", "word"), [(255, "scale byte 255 (NaN)"), (200, "too large for an F16")]
)
def test_a_scale_that_cannot_be_stops_the_run_and_names_the_tensor(
    tmp_path: Path, byte: int, word: str
) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(), seed=16)
    for folder, part in ((source, "scale"), (bundle, "scales")):
        set_bytes(folder, f"mtp.0.ffn.experts.1.w3.{part}", 5, bytes([byte]))
        set_bytes(source, "mtp.0.ffn.experts.1.w3.weight", 5 * 16, b"\x77")
        set_bytes(bundle, "mtp.0.ffn.experts.1.w3.weight", 5 * 16, b"\x77")
    stopped = requantize(source, bundle)
    assert stopped.returncode == 1
    assert f"mtp.0.ffn.experts.1.w3.weight: found {word}" in stopped.stderr.replace(
        f"scale byte {byte}: values ", ""
    )
    assert "row 2, group 1" in stopped.stderr
    assert not list(bundle.glob(".*"))


def test_a_somebody_elses_affine_bundle_is_redone_from_the_source(tmp_path: Path) -> None:
    """Experts that are affine already (other bytes, no metadata) come out as the reference,
    if a quantizer is named: they may be right as they are."""
    source, bundle, expected = small.make(tmp_path, small.Sizes(), seed=17)
    for path in sorted(bundle.glob("*.safetensors")):
        arrays = {}
        for name, tensor in read_shard(path).tensors.items():
            array = read_array(tensor)
            if parse_expert(name) and name.endswith(".scales"):
                arrays[name] = ("F16", np.ones(array.shape, np.float16))
            else:
                arrays[name] = (tensor.dtype, array)
        save_shard(path, arrays)
    refused = requantize(source, bundle)
    assert (refused.returncode, "found another maker's bundle" in refused.stderr) == (1, True)
    assert requantize(source, bundle, "--quantizer", "mlx").returncode == 0
    assert_holds(bundle, expected)


def test_other_keys_of_index_and_config_stay(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(), seed=18)
    edit_json(bundle / "config.json", lambda v: v.update(mine=[1, "ü"]))
    edit_json(bundle / "model.safetensors.index.json", lambda v: v["metadata"].update(format="mlx"))
    assert requantize(source, bundle).returncode == 0
    assert json.loads((bundle / "config.json").read_text())["mine"] == [1, "ü"]
    metadata = json.loads((bundle / "model.safetensors.index.json").read_text())["metadata"]
    opened = open_bundle(bundle)
    total = sum(tensor.nbytes for tensor in opened.tensors.values())
    assert metadata == {"total_size": total, "format": "mlx"}


@pytest.mark.skipif(
    importlib.util.find_spec("jang_tools") is None or importlib.util.find_spec("torch") is None,
    reason="the upstream converter is not installed",
)
def test_a_bundle_of_the_real_converter_becomes_the_reference(tmp_path: Path) -> None:
    """What upstream's own code writes, not our idea of it."""
    sizes = small.Sizes(layers=3, experts=4, hidden=256, width=128, head_dim=128)
    source, _, _ = small.make(tmp_path, sizes, seed=19)
    bundle = tmp_path / "converted"
    subprocess.run(
        [
            sys.executable, "-m", "jang_tools.dsv4.convert_dsv4_jangtq", "--src", source,
            "--dst", bundle, "--profile", "4", "--format", "jang",
        ],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    stock = {n: (t.dtype, read_array(t)) for n, t in open_bundle(bundle).tensors.items()}
    expected = small.reference(small.source_arrays(sizes, np.random.default_rng(19)), stock)
    done = requantize(source, bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert_holds(bundle, expected)
