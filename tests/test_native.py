"""The native converter: upstream's bytes where upstream is right, requantize's for the experts.

Catches: a tensor treated otherwise than upstream treats it, an unknown name that slips through, a
shard over its limit or a triple over two shards, a killed run that cannot go on or leaves other
bytes, torch or jang_tools creeping back in, memory that grows with the largest matrix.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small
from conftest import SCRIPTS, SEED, Commands, must, script
from here import here

from dsv4.model import names
from dsv4.model.labels import RECORD
from dsv4.model.load import open_bundle
from dsv4.model.source import open_source
from dsv4.storage import locks
from dsv4.storage.checkpoint import INDEX, check_index
from dsv4.storage.safetensors_file import PendingTensor, read_array, read_shard, write_shard

KILLS = int(os.environ.get("KILLS", "20"))
# Names of DeepSeek-V4-Flash, of its MTP layer, and of -0731's DSpark.
REAL_NAMES = """
embed.weight head.weight norm.weight hc_head_fn hc_head_base hc_head_scale
layers.42.attn.wq_a.weight layers.42.attn.wo_b.weight layers.2.attn.attn_sink
layers.2.attn.compressor.wgate.weight layers.2.attn.compressor.ape layers.2.ffn.gate.tid2eid
layers.2.attn.indexer.compressor.wkv.weight layers.2.attn.indexer.compressor.norm.weight
layers.2.attn.indexer.weights_proj.weight layers.10.ffn.gate.weight layers.10.ffn.gate.bias
layers.10.ffn.shared_experts.w2.weight layers.10.hc_ffn_scale layers.10.ffn_norm.weight
mtp.0.e_proj.weight mtp.0.h_proj.weight mtp.0.enorm.weight mtp.0.hnorm.weight mtp.0.norm.weight
mtp.0.hc_head_fn mtp.0.hc_attn_base mtp.2.attn.attn_sink mtp.2.ffn.gate.bias
mtp.0.main_proj.weight mtp.0.main_norm.weight mtp.2.markov_head.markov_w1.weight
mtp.2.markov_head.markov_w2.weight mtp.2.confidence_head.proj.weight
"""


def run(
    source: Path, bundle: Path, *options: object, name: str = "convert"
) -> tuple[int, str, str]:
    """Run a script in this process, which has MLX and the kernel loaded: status, stdout, stderr.

    The tests of kills, of a full disk, of memory and of imports start processes instead.
    """
    return here(name, "--source", source, "--bundle", bundle, *options)


def convert(source: Path, bundle: Path, *options: object) -> str:
    """Convert, which has to succeed; return what is said."""
    status, out, err = run(source, bundle, *options)
    assert (status, err) == (0, "")
    return out


def refused(source: Path, bundle: Path, *options: object) -> str:
    """Convert, which has to stop with one line; return it."""
    status, _, err = run(source, bundle, *options)
    assert status == 1
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert not bundle.exists()
    return err


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def content(folder: Path, name: str) -> tuple:
    tensor = open_bundle(folder).tensors[name]
    return tensor.dtype, tensor.shape, read_array(tensor).tobytes()


# ------------------------------------------------------------------------------- the same result


# Upstream's converter knows no other way to store MTP.
AS_EXPERTS = ("--mtp", "as-experts")


@pytest.fixture(scope="module")
def like_upstreams(source, tmp_path_factory) -> Path:
    bundle = tmp_path_factory.mktemp("like-upstreams") / "bundle"
    convert(source, bundle, *AS_EXPERTS)
    return bundle


@pytest.fixture(params=["MTP", pytest.param("DSpark", marks=pytest.mark.full)])
def all_made(request, tmp_path) -> tuple[Path, Path, Path, Path]:
    """A source; upstream's bundle, that one requantized, and the native one."""
    if request.param == "MTP":
        return tuple(map(request.getfixturevalue, ("source", "stock", "good", "like_upstreams")))
    source = request.getfixturevalue("dspark")
    must("convert", "--source", source, "--bundle", tmp_path / "stock", "--converter", "jang")
    good = shutil.copytree(tmp_path / "stock", tmp_path / "good")
    assert run(source, good, name="requantize")[0] == 0
    convert(source, tmp_path / "native", *AS_EXPERTS)
    return source, tmp_path / "stock", good, tmp_path / "native"


def test_every_tensor_is_upstreams_or_requantizes(all_made):
    source, stock, good, native = all_made
    origin, ours = open_source(source).tensors, open_bundle(native).tensors
    stock, good = open_bundle(stock).tensors, open_bundle(good).tensors
    assert set(ours) == set(good)
    compared = dict.fromkeys(("expert", "matrix", "passthrough", "control"), 0)
    for name, tensor in origin.items():
        kept = names.kind(name) == "head"  # as the source has it
        what = "control" if kept else names.kind(name)
        where = {"expert": good, "control": origin}.get(what, stock)
        parts = ("weight", "scales", "biases") if what in ("expert", "matrix") else ("weight",)
        base, dot, _ = name.rpartition("weight")
        keys = [base + part for part in parts] if dot else [name]
        for key in keys if what != "scale" else ():
            mine, theirs = ours[key], where[key]
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), key
            assert read_array(mine).tobytes() == read_array(theirs).tobytes(), key
            compared[what] += 1
        assert tensor.name == name
    assert min(compared.values()) > 30, compared


@pytest.mark.parametrize("quantizer", ["lossless", "mlx", "mxfp4", "turboquant2"])
def test_every_quantizer_gives_requantizes_bytes(source, stock_copy, tmp_path, quantizer):
    chosen = ("--quantizer", quantizer)
    convert(source, tmp_path / "bundle", *chosen, *AS_EXPERTS)
    assert run(source, stock_copy, *chosen, name="requantize")[0] == 0
    ours, theirs = open_bundle(tmp_path / "bundle"), open_bundle(stock_copy)
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        mine = ours.tensors[name]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
        assert read_array(mine).tobytes() == read_array(tensor).tobytes(), name
    assert ours.config["quantization"] == theirs.config["quantization"]
    before = digests(tmp_path / "bundle")
    _, said, _ = run(source, tmp_path / "bundle", *chosen, name="requantize")
    assert "nothing to do" in said
    assert digests(tmp_path / "bundle") == before


def test_the_configs_state_upstreams_facts(source, stock, good, like_upstreams):
    native = like_upstreams
    for file in ("config.json", "jang_config.json"):
        theirs, ours = (json.loads((at / file).read_text()) for at in (stock, native))
        theirs.pop("source_model", None)
        assert ours.pop("source_model", source.name) == source.name  # upstream: a local path
        labels, stock_labels = ours.pop("quantization", {}), theirs.pop("quantization", {})
        assert stock_labels.items() <= labels.items()
        ours.pop(RECORD, None)  # requantize's; compared below
        theirs.get("chat", {}).pop("sampling_defaults", None)  # answers of 300 tokens
        assert ours == theirs
        assert all(type(ours[key]) is type(theirs[key]) for key in ours)
    assert str(source.parent) not in (native / "jang_config.json").read_text()
    for key in ("quantization", RECORD):
        mine, mended = (json.loads((at / "config.json").read_text())[key] for at in (native, good))
        assert mine == mended
    mine, mended = (json.loads((at / INDEX).read_text())["metadata"] for at in (native, good))
    assert mine == mended


def test_the_table_is_upstreams_for_every_name(source, monkeypatch):
    for variable in [name for name in os.environ if name.startswith("DSV4_")]:
        monkeypatch.delenv(variable)
    upstream = pytest.importorskip("jang_tools.dsv4.convert_dsv4_jangtq")
    ours = {"expert": "affine", "matrix": "affine", "head": "affine",
            "passthrough": "passthrough", "control": "passthrough"}  # fmt: skip
    made = [name for name in open_source(source).tensors if not name.endswith(".scale")]
    for name in (*made, *REAL_NAMES.split()):
        what = names.treatment(name)
        assert what is not None, name
        bits, method, _ = upstream.classify(name, 4)
        assert ours[what] == method, name
        assert (
            bits == {"expert": 4, "matrix": 8, "head": 8}.get(what, 16) or upstream.FORMAT != "jang"
        )


def test_it_needs_neither_torch_nor_jang(source, native, tmp_path):
    forbid = "import sys\nfor name in ('torch', 'jang_tools', 'mlx_lm', 'transformers'):\n"
    (tmp_path / "sitecustomize.py").write_text(forbid + "    sys.modules[name] = None\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = script("convert", "--source", source, "--bundle", tmp_path / "bundle", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert digests(tmp_path / "bundle") == digests(native)


def test_make_stock_gives_upstreams_bundle(source, stock, tmp_path):
    must("lab/make_stock", "--source", source, "--bundle", tmp_path / "stock")
    theirs, ours = open_bundle(stock), open_bundle(tmp_path / "stock")
    assert set(ours.tensors) == set(theirs.tensors)
    for name, tensor in theirs.tensors.items():
        mine = ours.tensors[name]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), name
        assert read_array(mine).tobytes() == read_array(tensor).tobytes(), name
    assert ours.config == theirs.config
    jang = [json.loads((at / "jang_config.json").read_text()) for at in (stock, ours.folder)]
    for config in jang:
        config.pop("source_model")  # upstream: a local path
    assert jang[0] == jang[1]
    files = [{p.name for p in at.rglob("*") if p.is_file()} for at in (stock, ours.folder)]
    assert {name for name in files[0] if not name.endswith(".safetensors")} <= files[1]


# ----------------------------------------------------------------------------------- its shards


@pytest.fixture(scope="module")
def split(source, tmp_path_factory) -> Path:
    """The source in many small shards."""
    folder = tmp_path_factory.mktemp("split") / "bundle"
    convert(source, folder, "--shard-bytes", "3e5", "--jobs", 2)
    return folder


def test_shards_keep_their_limit_and_triples_together(split, native):
    files = sorted(split.glob("*.safetensors"))
    assert len(files) > 20
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    bundle, whole = open_bundle(split), open_bundle(native).tensors
    check_index(bundle, "test")
    for shard in bundle.shards.values():
        assert shard.size <= 300_000
        bases = {name.rpartition(".")[0] for name in shard.tensors if name.endswith(".scales")}
        for base in bases:
            parts = {f"{base}.{part}" for part in ("weight", "scales", "biases")}
            assert parts & set(whole) <= set(shard.tensors)
    assert {n: read_array(t).tobytes() for n, t in bundle.tensors.items()} == {
        n: read_array(t).tobytes() for n, t in whole.items()
    }


def test_one_thread_and_three_write_the_same(source, split, tmp_path):
    for jobs in (1, 3):
        convert(source, tmp_path / f"{jobs}", "--shard-bytes", 300000, "--jobs", jobs)
        assert digests(tmp_path / f"{jobs}") == digests(split)


@pytest.mark.parametrize("n", [0, 2, 5])
def test_a_run_killed_before_a_rename_goes_on(source, split, tmp_path, n):
    words = ("convert", "--source", source, "--bundle", tmp_path / "b", "--shard-bytes", 300000)
    assert script(*words, kill=("os", "rename", n, signal.SIGKILL)).returncode == -signal.SIGKILL
    must(*words)
    assert digests(tmp_path / "b") == digests(split)


@pytest.mark.full
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(source, split, tmp_path):
    """kill -9 at random moments between the first shard and the last rename."""
    rng = random.Random(SEED)
    wanted, kills, number, seen = digests(split), 0, 0, set()
    with Commands() as forks:
        while kills < KILLS:
            bundle, number, status = tmp_path / f"{number}", number + 1, -1
            while status:
                pid = forks.start(
                    "convert", "--source", source, "--bundle", bundle, "--shard-bytes", "3e5"
                )
                seen.add(kill_after(pid, bundle, rng.randrange(7), rng.uniform(0, 0.005)))
                status = forks.status()
                assert status in (0, -signal.SIGKILL)
                kills += status != 0
            assert digests(bundle) == wanted
    assert len(seen) > 4, f"always killed at the same shard: {seen}"


def kill_after(pid: int, bundle: Path, more: int, delay: float) -> int:
    """Kill the run `delay` seconds after it has written `more` shards, if there are so many.

    Returns how many there are then.
    """
    work = bundle.with_name(f".{bundle.name}.converting")
    wanted, end = count_shards(work) + more, time.monotonic() + 60
    while not work.is_dir() or count_shards(work) < wanted:
        assert time.monotonic() < end
        if bundle.exists():
            return -1
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return count_shards(work)


def count_shards(work: Path) -> int:
    """Count the shards in a staging folder, which may be renamed at any moment."""
    try:
        return sum(path.name.startswith("model-") for path in work.iterdir())
    except FileNotFoundError:
        return 0


@pytest.fixture
def half_done(source, split, tmp_path) -> Path:
    """A workplace in which a killed run left three whole shards and half of one."""
    work = tmp_path / ".bundle.converting"
    work.mkdir()
    for file in sorted(split.glob("*.safetensors"))[:3]:
        (work / file.name).write_bytes(file.read_bytes())
    (work / ".model-00004-of-00009.safetensors.partial").write_bytes(b"half")
    return work


def test_whole_shards_are_not_written_again(source, split, half_done, tmp_path):
    times = {p.name: p.stat().st_mtime_ns for p in half_done.glob("model-*")}
    said = convert(source, tmp_path / "bundle", "--shard-bytes", "3e5")
    assert digests(tmp_path / "bundle") == digests(split)
    assert times.items() <= {p.name: p.stat().st_mtime_ns
                             for p in (tmp_path / "bundle").iterdir()}.items()  # fmt: skip
    total = len(list(split.glob("model-*")))
    assert f"{total - 3} of {total} shards" in said


def test_other_settings_do_not_mix_with_what_is_there(source, half_done, tmp_path):
    before = digests(half_done)
    for options in (["--shard-bytes", "4e5"], ["--converter", "jang"]):
        line = refused(source, tmp_path / "bundle", *options)
        assert "native" in line or "other settings" in line
        assert digests(half_done) == before


def test_another_source_does_not_mix_with_what_is_there(source_copy, half_done, tmp_path):
    shard = sorted(source_copy.glob("model-*"))[0]
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    line = refused(source_copy, tmp_path / "bundle", "--shard-bytes", "3e5")
    assert "another source" in line


# ------------------------------------------------------------------------------------ one run


def test_a_second_run_changes_nothing(source, native):
    before = {path: path.stat().st_mtime_ns for path in native.rglob("*")}
    assert "already" in convert(source, native)
    assert before == {path: path.stat().st_mtime_ns for path in native.rglob("*")}


def test_two_runs_at_once_are_refused(source, tmp_path):
    work = tmp_path / ".bundle.converting"
    work.mkdir()
    with locks.locked(work):
        assert "another run" in refused(source, tmp_path / "bundle")


def test_a_dry_run_prints_the_plan_and_writes_nothing(source, tmp_path):
    said = convert(source, tmp_path / "bundle", "--dry-run")
    for words in ("96 routed experts to affine 4 bits", "47 matrices", "34 controls", "1 to write",
                  "53 of MTP as the source has them", "read: 6.7 MB", "time: "):  # fmt: skip
        assert words in said
    assert not list(tmp_path.iterdir())


def test_progress_is_silent_without_a_terminal(source, tmp_path):
    done = script("convert", "--source", source, "--bundle", tmp_path / "bundle")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"263 tensors, 1 of 1 shards, 6\.5 MB .* GB/s\); relative RMS", done.stdout)


def test_a_full_disk_ends_in_one_line_and_resumes(source, split, tmp_path):
    limit = max(path.stat().st_size for path in split.glob("model-*")) - 20_000

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = ("convert", "--source", source, "--bundle", tmp_path / "bundle",
                 "--shard-bytes", "3e5")  # fmt: skip
    done = script(*arguments, preexec_fn=small_files)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "then run the same command again" in done.stderr
    assert not list(tmp_path.glob(".bundle.converting/.*.partial"))
    must(*arguments)
    assert digests(tmp_path / "bundle") == digests(split)


# ------------------------------------------------------------------------- what it refuses


def change(folder: Path, name: str, **new: object) -> None:
    """Write a tensor's shard again with another name (`key`), dtype or array for it."""
    index = json.loads((folder / INDEX).read_text())
    path = folder / index["weight_map"].pop(name)
    planned = []
    for tensor in read_shard(path).tensors.values():
        array = read_array(tensor).copy()
        key, dtype = tensor.name, tensor.dtype
        if key == name:
            key, dtype = new.get("key", key), new.get("dtype", dtype)
            array = new["edit"](array) if "edit" in new else array
        index["weight_map"][key] = path.name
        planned.append(
            PendingTensor(key, dtype, array.shape, lambda a=array: [np.ascontiguousarray(a)])
        )
    write_shard(path, planned, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


def spoil(place: tuple, value: int):
    def edit(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return edit


@pytest.mark.parametrize(
    ("name", "new", "words"),
    [
        ("layers.1.attn.wq_a.weight", {"edit": spoil((3, 7), 0x7F)}, "a NaN or an infinity"),
        ("layers.1.attn.wq_a.scale", {"edit": spoil((0, 0), 255)}, "scale byte 255"),
        ("embed.weight", {"edit": spoil((3, 7), 0x7F00)}, "too large for an F16"),
        ("layers.1.attn.wq_a.scale", {"edit": lambda a: a[:, :-1]}, "F8_E8M0 [1, 2]"),
        ("embed.weight", {"edit": lambda a: a[:, :-1]}, "shape [512, 255]"),
        ("norm.weight", {"edit": spoil((5,), 0x7F00)}, "F16 cannot hold"),
        ("norm.weight", {"dtype": "F64", "edit": lambda a: a.astype("<f8")}, "F64"),
        ("norm.weight", {"key": "normal.weight"}, "a name that this recipe does not know"),
        ("hc_head_fn", {"key": "layers.1.hd_fn"}, "a name that this recipe does not know"),
    ],
)
def test_a_bad_tensor_stops_the_run_by_name(source_copy, tmp_path, name, new, words):
    change(source_copy, name, **new)
    line = refused(source_copy, tmp_path / "bundle")
    assert words in line
    assert new.get("key", name).removesuffix(".scale") in line


def test_odd_shapes_and_layers_over_9(tmp_path):
    """FP8 blocks that are begun and not full; experts that are no multiple of anything but 32."""
    for seed, sizes in enumerate([
        small.Sizes(layers=11, experts=1, mtp=2, source_shard=7),
        small.Sizes(layers=1, experts=2, mtp=3, dspark=True, source_shard=9),
        small.Sizes(hidden=160, width=96, source_shard=1),
    ]):  # fmt: skip
        source, _, expected = small.make(tmp_path / f"{seed}", sizes, seed)
        bundle = tmp_path / f"{seed}" / "native"
        convert(source, bundle, "--shard-bytes", 20000, *AS_EXPERTS)
        ours = open_bundle(bundle).tensors
        assert set(ours) == set(expected)
        for name, (dtype, array) in expected.items():
            if ".ffn.experts." in name or names.is_control(name):
                assert ours[name].dtype == dtype
                assert read_array(ours[name]).tobytes() == array.tobytes(), name


def test_memory_does_not_grow_with_the_largest_matrix(tmp_path):
    """An embedding of 96 MB in BF16 would be 192 MB decoded, and as much again in MLX."""
    source, _, _ = small.make(tmp_path, small.Sizes(layers=1, experts=1, mtp=0, hidden=64), 1)
    config = json.loads((source / "config.json").read_text())
    del config["vocab_size"]
    (source / "config.json").write_text(json.dumps(config))
    peaks = []
    for rows in (64, 768 * 1024):
        change(source, "embed.weight", edit=lambda a, n=rows: np.resize(a, (n, 64)))
        peaks.append(peak_of(source, tmp_path / f"{rows}"))
    assert peaks[1] - peaks[0] < 64 << 20, peaks


def peak_of(source: Path, bundle: Path) -> int:
    """Peak memory of a run, in bytes."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")  # fmt: skip
    command = [sys.executable, "-c", code, sys.executable, SCRIPTS / "convert.py",
               "--source", source, "--bundle", bundle, "--jobs", "2"]  # fmt: skip
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(said.splitlines()[-1]) * (1 if sys.platform == "darwin" else 1024)
