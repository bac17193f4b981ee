"""What a file may ask for is bounded before it is read: seconds and megabytes, whatever it says.

Catches: a count in a loop, a product without a limit, numbers of 4,000 digits that are formatted, a
count from config.json that is enumerated, a document or a stranger that is read because it is
there, a folder that is listed to its end; and level 2 taking whole tensors into memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import bundles
import numpy as np
import pytest
import small
from conftest import SCRIPTS, refusal, script

from dsv4.errors import UserError
from dsv4.model.load import expert_bases
from dsv4.model.names import parse_expert, treatment
from dsv4.model.source import open_source
from dsv4.storage import limits
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_json
from dsv4.storage.safetensors_file import PendingTensor, Shard, Tensor, read_shard, write_shard
from dsv4.storage.tensor_reader import TensorReader
from dsv4.verification.numbers import unquantized
from dsv4.verification.numbers.tasks import Task, TensorResult
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

SECONDS, BYTES = 6, 600 << 20


def shard(path: Path, header: bytes, data: int = 0) -> Path:
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + data)
    return path


def entry(name: str, dtype: str = "U8", shape: str = "[0]", offsets: str = "[0,0]") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def duplicates() -> bytes:
    names = [*range(100_000), 99_999]
    return f"{{{','.join(entry(f'n{i}') for i in names)}}}".encode()


BIG = "1" + "0" * 4000
HEADERS = {
    "100,000 names, the last one twice": duplicates,
    "an axis of 4,000 digits": lambda: f"{{{entry('a', shape=f'[{BIG}]')}}}".encode(),
    "20,000 axes": lambda: f"{{{entry('a', shape=f'[{BIG}' + f',{BIG}' * 5000 + ']')}}}".encode(),
    "axes of 2^62": lambda: f"{{{entry('a', shape=str([2**62] * 20_000))}}}".encode(),
    "an axis of 5,000 digits": lambda: f"{{{entry('a', shape='[' + '9' * 5000 + ']')}}}".encode(),
    "offsets of 4,000 digits": lambda: f"{{{entry('a', offsets=f'[0,{BIG}]')}}}".encode(),
    "lists": lambda: b"[" + b"[]," * 10_000_000 + b"[]]",
    "objects": lambda: b'{"a":[' + b"{}," * 10_000_000 + b"{}]}",
    "numbers": lambda: b'{"a":[' + b"1.5," * 8_000_000 + b"1]}",
    "a name of 1 MB": lambda: f"{{{entry('n' * 1_000_000, dtype='?')}}}".encode(),
    "a dtype of 1 MB": lambda: f"{{{entry('n', dtype='?' * 1_000_000)}}}".encode(),
    "escapes": lambda: f"{{{entry(chr(27) + '[2K', dtype='?')}}}".encode(),
    "half a surrogate pair": lambda: f"{{{entry(chr(92) + 'ud800')}}}".encode(),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_stops_in_seconds_and_one_short_line(kind, tmp_path):
    path = shard(tmp_path / "x.safetensors", HEADERS[kind]())
    start = time.monotonic()
    with pytest.raises(UserError) as stop:
        read_shard(path)
    assert time.monotonic() - start < SECONDS
    assert len(f"{stop.value}") <= 2000
    assert f"{stop.value}".isprintable()


def test_a_header_of_100_mb_costs_little(tmp_path):
    path = tmp_path / "x.safetensors"
    shard(path, b" " * 100_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="a header of 100,000,000"):
            read_shard(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", [b"[]", b"{}", b'{"a":0}', b"[0]", b'""', b"1e5"])
def test_a_document_of_many_parts_costs_bounded_memory(text, tmp_path):
    """Each just below the limit of marks, or of bytes, whichever comes first; in a child."""
    marks = max(1, sum(text.count(mark) for mark in b",[{")) + 1
    number = min((limits.MARKS - 10) // marks, (limits.DOCUMENT - 10) // (len(text) + 1))
    path = tmp_path / "config.json"
    path.write_bytes(b'{"x":[' + (text + b",") * (number - 1) + text + b"]}")
    code = (
        "import resource, sys; from pathlib import Path; from dsv4.storage.checkpoint import "
        "read_json; read_json(Path(sys.argv[1])); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    # A process begins with the peak of the one that it was forked from: of a shell, not of pytest.
    command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code, path]
    said = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, check=True)  # fmt: skip
    assert int(said.stdout) * (1 if sys.platform == "darwin" else 1024) < BYTES + (400 << 20)


@pytest.mark.parametrize("size", [1 << 30, 1 << 40])
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "tokenizer_config.json"])
def test_a_sparse_document_is_not_read(name, size, good, tmp_path):
    bundle = shutil.copytree(good, tmp_path / "bundle")
    with (bundle / name).open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        findings = Findings()
        scan(bundle, findings)
        with pytest.raises(UserError, match="at most"):
            read_json(bundle / name)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert findings.errors


def test_a_sparse_file_is_not_copied_hashed_or_sent(good, source, tmp_path):
    bundle = shutil.copytree(good, tmp_path / "bundle")
    with (bundle / "notes.bin").open("wb") as file:
        file.truncate(2 << 40)
    findings = bundles.judge(bundle, None)
    assert "file-unhashed" in findings
    assert not findings.errors
    origin = tmp_path / "origin"
    shutil.copytree(good, origin)
    with (origin / "encoding" / "encoding_dsv4.py").open("r+b") as file:
        file.truncate(1 << 40)
    said = refusal("finalize", "--source", source, "--bundle", bundle, "--reference", origin)
    assert "at most" in said


def test_a_fifo_in_the_place_of_a_document_is_no_wait(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="no plain file"):
        limits.read_bounded(tmp_path / "config.json")


def test_a_root_folder_is_not_listed(good, monkeypatch):
    start = time.monotonic()
    done = script("verify", "--bundle", "/", "--level", 1, "--without-loader")
    assert time.monotonic() - start < 15
    assert done.returncode == 1
    assert "config-broken" in done.stderr
    monkeypatch.setattr(limits, "FILES", 3)
    with pytest.raises(UserError, match="more than 3 files"):
        scan(good, Findings())


# --- Counts


COUNTS = [
    ("n_routed_experts", 3_000_000),
    ("num_hidden_layers", 10**9),
    ("num_nextn_predict_layers", 10**9),
    ("num_hidden_layers", 10**4000),
    ("n_routed_experts", 10**18),
    ("num_nextn_predict_layers", 1_001),
]


@pytest.mark.parametrize(("key", "number"), COUNTS, ids=lambda value: str(value)[:12])
def test_a_count_beyond_every_index_is_not_enumerated(key, number, good, source, tmp_path):
    bundle = shutil.copytree(good, tmp_path / "bundle")
    hostile = shutil.copytree(source, tmp_path / "source")
    start = time.monotonic()
    for folder in (bundle, hostile):
        bundles.edit_json(folder / "config.json", lambda config: config.update({key: number}))
    findings = bundles.judge(bundle, None, level=1)
    assert "config-broken" in findings
    with pytest.raises(UserError):
        open_source(hostile)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("number", ["999999", "999999999", "9" * 5000, "٣"])
@pytest.mark.parametrize("block", ["mtp", "layers"])
def test_a_number_in_a_name_is_not_counted_up_to(number, block, good, tmp_path):
    name = f"{block}.{number}.ffn.experts.0.w1.weight"
    assert (parse_expert(name) is None) == (number != "999999")
    assert treatment(f"layers.{'9' * 7}.attn.wq_a.weight") is None
    bundle = shutil.copytree(good, tmp_path / "bundle")
    path = bundle / "extra.safetensors"
    write_shard(path, [PendingTensor(name, "U8", (1,), lambda: [b"x"])], {})
    bundles.edit_json(bundle / INDEX, lambda index: index["weight_map"].update({name: path.name}))
    start = time.monotonic()
    findings = bundles.judge(bundle, None, level=1)
    assert number != "999999" or findings.errors  # the others are names that nobody knows
    assert time.monotonic() - start < SECONDS


def test_the_largest_model_of_the_family_is_within_the_bounds():
    """Pro-0813, with DSpark."""
    config = {"num_hidden_layers": 61, "n_routed_experts": 384, "num_nextn_predict_layers": 1}
    last = Tensor("mtp.2.norm.weight", "BF16", (7168,), Path("pro"), 0, 2 * 7168)
    pro = Checkpoint(Path("pro"), config, {}, {"": Shard(Path("pro"), {last.name: last}, {}, 0)})
    bases = expert_bases(pro)
    assert len(bases) == 64 * 384 * 3 < limits.MATRICES / 3
    index = {f"{base}.{part}": "model-00001-of-00200.safetensors"
             for base in bases for part in ("weight", "scales", "biases")}  # fmt: skip
    text = json.dumps({"weight_map": index}, indent=2).encode()
    assert len(text) < limits.DOCUMENT / 2
    limits.check_json_size(text, "index")
    header = {name: {"dtype": "U32", "shape": [2048, 512], "data_offsets": [10**12, 10**12]}
              for name in index}  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) < limits.HEADER
    limits.check_json_size(text, "header")


# --- Level 2


def test_memory_does_not_grow_with_the_largest_plain_tensor(tmp_path):
    """A head of 128 MB in BF16 would be 256 MB decoded, and as much again for its comparison.

    Slices of it take 20 MB; which thread meets which slice adds up to 16 more.
    """
    peaks = []
    for rows in (64, 1024 * 1024):
        folder = tmp_path / f"{rows}"
        source, _, _ = small.make(folder, small.Sizes(1, 1, 0), 1)
        bundles.edit_json(source / "config.json", lambda config: config.pop("vocab_size"))
        arrays = bundles.load(source)
        arrays["head.weight"] = ("BF16", np.resize(arrays["embed.weight"][1], (rows, 64)))
        bundles.save(source, arrays, 1, {})
        bundle = folder / "made"
        subprocess.run([sys.executable, SCRIPTS / "convert.py", "--source", source, "--bundle",
                        bundle], check=True, capture_output=True)  # fmt: skip
        peaks.append(peak_of(source, bundle))
    assert peaks[1] - peaks[0] < 64 << 20, peaks


def peak_of(source: Path, bundle: Path) -> int:
    """Peak memory of level 2, in bytes; whatever it finds."""
    code = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")  # fmt: skip
    command = [sys.executable, "-c", code, sys.executable, SCRIPTS / "verify.py",
               "--source", source, "--bundle", bundle, "--without-loader"]  # fmt: skip
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(said.splitlines()[-1]) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_slices_find_the_same_place_as_the_whole(dtype, tmp_path, monkeypatch):
    """One number that differs, at the ends of slices and inside them."""
    monkeypatch.setattr(unquantized, "CHUNK_NUMBERS", 64)
    size = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    rng = np.random.default_rng(5)
    right = rng.integers(0, 60, 50 * 7 * size, dtype=np.uint8)
    for at in (0, 63, 64, 200, 349):
        wrong = right.copy()
        wrong[at * size] ^= 1
        for name, data in (("source", right), ("bundle", wrong)):
            path = tmp_path / f"{name}.safetensors"
            write_shard(
                path, [PendingTensor("norm.weight", dtype, (50, 7), lambda d=data: [d])], {}
            )
        one, other = (
            read_shard(tmp_path / f"{name}.safetensors").tensors["norm.weight"]
            for name in ("source", "bundle")
        )
        task = Task(one, None, {"weight": other}, "passthrough", None)
        outcome = TensorResult("norm.weight", "passthrough", dtype)
        unquantized.compare_unquantized(task, TensorReader(), outcome)
        assert [fault[0] for fault in outcome.faults] == ["passthrough-differs"]
        assert f"element {list(divmod(at, 7))}" in outcome.faults[0][1]


def test_usage_of_many_threads_is_refused(good):
    assert script("verify", "--bundle", good, "--jobs", 100_000).returncode == 2
