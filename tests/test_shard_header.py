"""The header reader against malformed files: a UserError or a right answer, never anything else."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from dsv4.errors import UserError
from dsv4.storage.safetensors_file import ITEMSIZE, read_shard

CASES = 12_000


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def assemble(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def of(header: object, data: int = 8) -> bytes:
    return assemble(json.dumps(header).encode(), bytes(data))


MALFORMED = {
    "empty": b"",
    "short": b"\x01\x02\x03",
    "header-beyond-the-file": assemble(b"{}", length=3),
    "header-of-exabytes": assemble(b"{}", length=2**63),
    "header-of-all-ones": b"\xff" * 64,
    "not-json": assemble(b"{'a': 1}"),
    "not-utf-8": assemble(b'{"\xff": 1}'),
    "a-list": of([]),
    "nested-without-end": assemble(b"[" * 100_000),
    "a-huge-number": assemble(b'{"a": ' + b"9" * 10_000 + b"}"),
    "duplicate-keys": assemble(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"12",
    ),
    "duplicate-dtype": assemble(
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"
    ),
    "unknown-dtype": of({"a": entry("F128")}),
    "dtype-is-a-list": of({"a": entry(["F32"])}),
    "shape-too-large": of({"a": entry(shape=[3])}),
    "shape-overflows": of({"a": entry(shape=[2**62, 2**62, 4])}),
    "negative-shape": of({"a": entry(shape=[-2])}),
    "shape-of-floats": of({"a": entry(shape=[2.0])}),
    "shape-of-booleans": of({"a": entry("U8", [True], [0, 1])}, 1),
    "offsets-out-of-range": of({"a": entry(offsets=[8, 16])}),
    "offsets-reversed": of({"a": entry(offsets=[8, 0])}),
    "three-offsets": of({"a": entry(offsets=[0, 4, 8])}),
    "negative-offsets": of({"a": entry(offsets=[-8, 0])}),
    "overlapping": of({"a": entry(), "b": entry(offsets=[4, 12])}, 12),
    "twice-the-same-bytes": of({"a": entry(), "b": entry()}),
    "a-gap": of({"a": entry(), "b": entry(offsets=[12, 20])}, 20),
    "bytes-left-over": of({"a": entry()}, 9),
    "bytes-missing": of({"a": entry()}, 7),
    "entry-is-null": of({"a": None}),
    "metadata-of-numbers": of({"__metadata__": {"a": 1}, "a": entry()}),
    "metadata-is-a-list": of({"__metadata__": [], "a": entry()}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_header_stops(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(MALFORMED[kind])
    with pytest.raises(UserError):
        read_shard(path)


def test_a_header_length_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(assemble(b"{}", length=99_000_000))
    tracemalloc.start()
    with pytest.raises(UserError):
        read_shard(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def valid(rng: random.Random) -> bytes:
    """A random well-formed file of up to six tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}} if rng.random() < 0.5 else {}
    position = 0
    for i in range(rng.randrange(7)):
        dtype = rng.choice(list(ITEMSIZE))
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        size = ITEMSIZE[dtype]
        for n in shape:
            size *= n
        header[f"t{i}"] = entry(dtype, shape, [position, position + size])
        position += size
    return of(header, position)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Damage a file in one to three of the ways in which files come damaged."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(6)
        if way == 0:
            data = data[:at]
        elif way == 1:
            data = data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
        elif way == 2 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif way == 3:
            token = rng.choice([b"-1", b"1e9", b"null", b'"', b"{", b"]", b"18446744073709551616"])
            data = data[:at] + token + data[at:]
        elif way == 4:
            data = rng.randrange(2 ** rng.choice([4, 16, 63])).to_bytes(8, "little") + data[8:]
        else:
            other = rng.randrange(len(data) + 1)
            data = data[: min(at, other)] + data[max(at, other) :]
    return data


def test_no_damage_crashes_the_reader(tmp_path: Path) -> None:
    """12,000 damaged files: a UserError, or tensors that lie side by side within the file."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed={seed}")
    rng = random.Random(seed)
    path = tmp_path / "x.safetensors"
    stops = 0
    file = path.open("w+b", buffering=0)  # open all the time: closing makes some systems write
    for _ in range(CASES):
        data = mutated(rng, valid(rng))
        file.seek(0)
        file.write(data)
        file.truncate()
        try:
            shard = read_shard(path)
        except UserError:
            stops += 1
            continue
        position = 8 + int.from_bytes(data[:8], "little")
        for tensor in shard.tensors.values():
            assert tensor.offset == position
            position += tensor.nbytes
        assert position == len(data) == shard.size
    file.close()
    print(f"{stops:,} of {CASES:,} stopped")
    assert stops > CASES // 2


def test_whole_files_are_read(tmp_path: Path) -> None:
    rng = random.Random(25)
    path = tmp_path / "x.safetensors"
    for _ in range(500):
        data = valid(rng)
        path.write_bytes(data)
        assert read_shard(path).size == len(data)
