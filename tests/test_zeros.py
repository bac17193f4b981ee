"""Runs of zeros, as a download manager leaves them: found where the model has none.

Catches: a hole that is missed because of where it begins or how it is read, a run that is named and
is none, numbers that make the search slow, a source with a hole, or with a tensor of nothing but
zeros, that is converted without a word.
"""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import NANO, SEED, must, refusal, script

from dsv4.errors import UserError
from dsv4.hub.provenance import Record
from dsv4.hub.repository import HubFile
from dsv4.model.load import open_bundle
from dsv4.model.source import open_source
from dsv4.quantization.formats import get_quantizer
from dsv4.quantization.imatrix import EVEN
from dsv4.quantization.source_reader import read_blocks
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.holes import HoleDetector, first_run
from dsv4.storage.safetensors_file import PendingTensor, Tensor, read_array, write_shard
from dsv4.storage.shard_writer import BLOCK_BYTES, WorkerBuffers
from dsv4.verification.numbers.aggregate import aggregate
from dsv4.verification.numbers.compare_all import TensorWorker, read_numbers
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan


def runs(data: np.ndarray, least: int) -> list[int]:
    """Where runs of at least `least` zeros begin, found byte by byte."""
    found, length = [], 0
    for i, byte in enumerate([*data.tolist(), 1]):
        if byte == 0:
            length += 1
        else:
            if length >= least:
                found.append(i - length)
            length = 0
    return found


def pieces_of_zeros() -> Iterator[tuple[np.ndarray, int]]:
    """Bytes with runs of zeros somewhere, and how many are a run; by the session's seed."""
    rng = np.random.default_rng(int(SEED))
    for _ in range(400):
        data = rng.integers(0, 3, int(rng.integers(1, 6000))).astype(np.uint8)
        at = int(rng.integers(0, len(data)))
        data[at : at + int(rng.integers(0, 3000))] = 0
        yield data, int(rng.choice([1, 2, 7, 8, 9, 100, 512, 1000]))


def test_the_first_run_is_found_wherever_it_begins():
    for data, least in pieces_of_zeros():
        begin, end = first_run(data, least, 0)
        wanted = runs(data, least)
        if wanted:
            assert (begin, end) == (wanted[0], wanted[0] + least), least
        else:
            assert end == len(data), least
            assert end - begin < least
            assert not data[begin:].any()
            assert not begin or data[begin - 1]


def test_verify_finds_a_run_however_it_is_cut_into_reads(tmp_path):
    rng = np.random.default_rng(0)
    for data, least in pieces_of_zeros():
        tensor = Tensor("one", "U8", data.shape, tmp_path / "one", 100, len(data))
        watch = HoleDetector(lambda *_, least=least: least)
        cuts = sorted(rng.integers(0, len(data) + 1, int(rng.integers(0, 6))).tolist())
        for first, last in pairwise([0, *cuts, len(data)]):
            watch.scan(tensor, first, data[first:last])
        wanted = runs(data, least)
        assert watch.holes == ({tensor: 100 + wanted[0]} if wanted else {}), (least, cuts)


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [("layers.0.ffn.experts.0.w1.weight", "I8", 4096), ("embed.weight", "BF16", 1 << 20)],
)
def test_convert_finds_a_run_across_blocks(tmp_path, name, dtype, least):
    size, path = (2 << 20) + 4321, tmp_path / "shard"
    tensor = Tensor(name, dtype, (size,), path, 0, size)
    for begin in (max(0, BLOCK_BYTES - least // 2), BLOCK_BYTES - 1, BLOCK_BYTES, size - least):
        data = np.ones(size, np.uint8)
        data[begin : begin + least] = 0
        data.tofile(path)
        with closing(WorkerBuffers()) as desk, pytest.raises(UserError) as stopped:
            list(read_blocks(desk, tensor, 0, size))
        assert f"from byte {begin:,} on" in str(stopped.value)
        data[begin + least // 2] = 1
        data.tofile(path)
        with closing(WorkerBuffers()) as desk:
            assert sum(len(block) for _, block in read_blocks(desk, tensor, 0, size)) == size


def test_what_is_read_twice_or_by_leaps_is_no_run(tmp_path):
    tensor, least = Tensor("one", "U8", (99,), tmp_path / "one", 0, 99), 8
    watch = HoleDetector(lambda *_: least)
    for first in (0, 0, 50, 20, 20):
        watch.scan(tensor, first, np.zeros(5, np.uint8))
    assert not watch.holes
    watch.scan(tensor, 25, np.zeros(5, np.uint8))
    assert watch.holes == {tensor: 20}


class Counted:
    """Bytes of which none may be looked at twice."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.seen = data, set()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, at: int) -> int:
        assert at not in self.seen, at
        self.seen.add(at)
        return self.data[at]


def halves() -> np.ndarray:
    """Scales of mx.quantize of FP4 in F16: nearly each second byte is zero."""
    rng, groups = np.random.default_rng(0), 1 << 13
    parts = {"weight": np.empty(16 * groups, np.uint8)}
    parts |= {part: np.empty(2 * groups, np.uint8) for part in ("scales", "biases")}
    codes = rng.integers(0, 256, 16 * groups, dtype=np.uint8)
    get_quantizer("mlx").encode(codes, rng.integers(116, 120, groups).astype(np.uint8), parts)
    return parts["scales"]


def ones_every(distance: int, width: int = 1) -> np.ndarray:
    return (np.arange(1 << 14) % distance < width).astype(np.uint8)


SLOW = {
    "F16 scales of FP4": halves,
    "every second byte": lambda: ones_every(2),
    "all but one": lambda: ones_every(1 << 14),
    "a one just before each run is long enough": lambda: ones_every(512),
    "a one a byte earlier": lambda: ones_every(511),
    "two ones, and zeros for one byte less than a run": lambda: ones_every(513, 2),
    "half a run, a one": lambda: ones_every(256),
    "ones": lambda: ones_every(1),
    "zeros": lambda: np.zeros(1 << 14, np.uint8),
}


@pytest.mark.parametrize("name", SLOW)
def test_no_byte_is_looked_at_twice(name):
    """So a search is linear, whatever the numbers are."""
    for data in (SLOW[name](), SLOW[name]()[::-1]):
        for least in (512, 4096):
            again = first_run.py_func(Counted(data), least, 0)
            assert again == first_run(data.copy(), least, 0)


def test_of_scales_few_bytes_are_looked_at():
    counted = Counted(halves())
    first_run.py_func(counted, 4096, 0)
    assert len(counted.seen) <= 2 * len(counted) // 4096 + 1


def test_each_thread_has_a_watch_of_its_own(nano_bundle):
    """Threads that begin at the same time too."""
    worker, both = (
        TensorWorker(scan(nano_bundle, Findings()), EVEN, lambda n: None),
        threading.Barrier(2),
    )

    class Waits(list):
        def append(self, one) -> None:
            super().append(one)
            both.wait(60)

    worker._readers = Waits()
    with ThreadPoolExecutor(2) as pool:
        readers = [one.result() for one in [pool.submit(worker._reader) for _ in range(2)]]
    assert readers[0]._watch is not readers[1]._watch
    assert {id(reader._watch) for reader in readers} == {
        id(detector) for _, detector in worker._readers
    }


@pytest.fixture
def edited(tmp_path):
    """A copy of the nano source, and a function that zeroes a part of one tensor's bytes."""
    source = shutil.copytree(NANO, tmp_path / "source")

    def zero(name: str, first: int = 0, last: int | None = None) -> Path:
        fill_with_zeros(open_source(source).tensors[name], first, last)
        return source

    return zero


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("head.weight", ()),
        ("embed.weight", ()),
        ("layers.1.attn.wq_b.weight", ()),
        ("layers.1.attn.wq_b.weight", (1000, 6000)),
        ("layers.0.attn.compressor.wkv.weight", ()),
        ("layers.2.ffn.experts.5.w2.weight", (2000, 6200)),
        ("layers.2.ffn.experts.5.w2.scale", ()),
        ("mtp.0.ffn.shared_experts.w1.weight", ()),
        ("layers.1.ffn.gate.weight", ()),
        ("layers.1.attn_norm.weight", ()),
    ],
)
def test_a_hole_in_the_source_stops_the_conversion(edited, tmp_path, name, part):
    if name not in open_source(NANO).tensors:
        name = name.replace("layers.0", "layers.1")
    line = refusal("convert", "--source", edited(name, *part), "--bundle", tmp_path / "bundle")
    assert name in line
    assert "zero bytes" in line
    assert not (tmp_path / "bundle").exists()


def test_controls_and_tables_may_be_zeros(edited, tmp_path):
    for name in ("layers.1.attn.attn_sink", "layers.1.ffn.gate.bias", "layers.0.ffn.gate.tid2eid"):
        source = edited(name)
    must("convert", "--source", source, "--bundle", tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "part"),
    [("layers.2.ffn.experts.5.w2.weight", (2000, 6200)), ("head.weight", ()), ("norm.weight", ())],
)
def test_zeros_of_a_file_with_the_hubs_hash_are_no_hole(edited, tmp_path, name, part):
    """Until the file is touched."""
    source, bundle = edited(name, *part), tmp_path / "bundle"
    files = {p.name: HubFile(p.name, p.stat().st_size, "0" * 64, None)
             for p in source.glob("*.safetensors")}  # fmt: skip
    record = Record("a/b", "main", "0" * 40, files)
    for file in files:
        record.set_verified(source, file)
    record.write(source)
    must("convert", "--source", source, "--bundle", bundle)
    assert not level_two(bundle, source).errors
    open_source(source).tensors[name].path.touch()
    assert name in refusal("convert", "--source", source, "--bundle", tmp_path / "again")
    assert "zeros-run" in level_two(bundle, source).names


def test_a_source_without_a_tensor_that_its_config_calls_for_is_refused(tmp_path):
    """Missing from index and shard alike: whole by its headers."""
    for name in ("layers.1.attn.wq_a.weight", "norm.weight", "head.weight"):
        source = shutil.copytree(NANO, tmp_path / name)
        drop(source, name)
        for command in (("convert", "--bundle", tmp_path / "b"), ("download", "--repo", "")):
            line = refusal(command[0], "--source", source, *command[1:])
            assert f"no {name}" in line
        assert (
            f"no {name}" in script("check", "--source", source, "--bundle", tmp_path / "b").stdout
        )


def drop(source: Path, name: str) -> None:
    """Take a tensor, and its scale, out of index and shard."""
    gone = {name, name.removesuffix("weight") + "scale"}
    opened = open_source(source)
    for file, shard in opened.shards.items():
        if gone & set(shard.tensors):
            kept = [
                PendingTensor(t.name, t.dtype, t.shape, lambda t=t: [read_array(t)])
                for t in shard.tensors.values() if t.name not in gone
            ]  # fmt: skip
            write_shard(source / file, kept, shard.metadata)
    index = {"weight_map": {n: f for n, f in opened.weight_map.items() if n not in gone}}
    (source / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("layers.1.attn.wq_b.weight", (4000, 9000)),
        ("layers.2.ffn.experts.5.w2.weight", (100, 4300)),
        ("layers.2.ffn.experts.5.w2.scales", ()),
        ("head.weight", ()),
        ("embed.weight", ()),
    ],
)
def test_verify_finds_a_hole_in_a_bundle(nano_bundle, tmp_path, name, part, with_source):
    bundle = shutil.copytree(nano_bundle, tmp_path / "bundle")
    fill_with_zeros(open_bundle(bundle).tensors[name], *part)
    assert "zeros-run" in level_two(bundle, NANO if with_source else None).names


@pytest.mark.parametrize("name", ["layers.1.attn.wq_b.weight", "layers.2.ffn.experts.5.w2.weight"])
def test_verify_finds_a_hole_that_source_and_bundle_share(nano_bundle, edited, name):
    assert "zeros-run" in level_two(nano_bundle, edited(name, 0, 5000)).names


def test_a_right_bundle_has_no_hole(nano_bundle):
    assert not level_two(nano_bundle, NANO).errors
    assert not level_two(nano_bundle, None).errors


@pytest.fixture(scope="module")
def nano_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("holes") / "bundle"
    must("convert", "--source", NANO, "--bundle", folder)
    return folder


def level_two(bundle: Path, source: Path | None) -> Findings:
    """What level 2 alone finds."""
    findings = Findings()
    opened = scan(bundle, Findings())
    done = read_numbers(opened, open_source(source) if source else None, 2, lambda n: None)
    aggregate(done, findings)
    return findings


def fill_with_zeros(tensor: Tensor, first: int = 0, last: int | None = None) -> None:
    last = tensor.nbytes if last is None else last
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + first)
        file.write(bytes(last - first))
