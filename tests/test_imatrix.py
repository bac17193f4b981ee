"""Importance matrices: read with distrust, matched to the experts, and used by the right ones."""

from __future__ import annotations

import json
import struct
import subprocess
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
from conftest import must, script

from dsv4.conversion import expert_pieces
from dsv4.errors import UserError
from dsv4.model.load import expert_bases, open_bundle
from dsv4.model.source import open_source
from dsv4.quantization import source_reader as reading
from dsv4.quantization.formats import get_quantizer
from dsv4.quantization.imatrix import FLOOR, entry_name, importances, normalized, open_imatrix
from dsv4.storage.safetensors_file import read_array
from dsv4.storage.shard_writer import WorkerBuffers
from dsv4.verification.numbers import affine, compare
from dsv4.verification.numbers.compare_all import read_numbers
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

SIZES = small.Sizes(layers=2, experts=3, mtp=1, hidden=64, width=32)

Entries = dict[str, np.ndarray]


def write(path: Path, entries: Entries, trailer: bytes | None = None) -> Path:
    """A legacy .dat as ds4 writes it: calls is 1, the trailer holds chunks and a data set."""
    out = struct.pack("<i", len(entries))
    for name, values in entries.items():
        out += struct.pack("<i", len(name)) + name.encode()
        out += struct.pack("<ii", 1, values.size) + values.astype("<f4").tobytes()
    out += struct.pack("<ii", 7, 8) + b"talk.txt" if trailer is None else trailer
    path.write_bytes(out)
    return path


def example(seed: int) -> Entries:
    """Entries for the main layers of SIZES, expert after expert, w1 and w3 alike as in ds4."""
    rng = np.random.default_rng(seed)
    out = {}
    for layer in range(SIZES.layers):
        inputs = rng.gamma(0.5, size=SIZES.experts * SIZES.hidden)
        out[f"blk.{layer}.ffn_gate_exps.weight"] = inputs
        out[f"blk.{layer}.ffn_up_exps.weight"] = inputs
        out[f"blk.{layer}.ffn_down_exps.weight"] = rng.gamma(0.5, size=SIZES.experts * SIZES.width)
    return out


def requantize(source: Path, bundle: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return script("requantize", "--source", source, "--bundle", bundle, *options)


def test_each_expert_gets_its_own_slice(tmp_path: Path) -> None:
    source, _, _ = small.make(tmp_path, SIZES, seed=51)
    entries = example(1)
    path = write(tmp_path / "i.dat", entries)
    found = importances(open_imatrix(path), open_source(source)).columns
    assert len(found) == SIZES.layers * SIZES.experts * 3
    for base, values in found.items():
        expert, columns = int(base.split(".")[4]), len(values)
        expected = entries[entry_name(base, SIZES.layers)][expert * columns :][:columns]
        assert np.array_equal(values, expected.astype(np.float32)), base
        assert columns == (SIZES.width if base.endswith("w2") else SIZES.hidden)


def test_a_bundle_holds_what_its_imatrix_makes_best(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, SIZES, seed=52)
    path = write(tmp_path / "i.dat", example(2))
    options = ("--quantizer", "affine4g32", "--imatrix", path)
    dry = requantize(source, bundle, *options, "--dry-run")
    assert "18 of 27 expert matrices have importances (9 of MTP layers have none" in dry.stdout
    assert "data set talk.txt" in dry.stdout
    done = requantize(source, bundle, *options)
    assert (done.returncode, done.stderr) == (0, "")
    opened, origin = open_bundle(bundle), open_source(source)
    found = importances(open_imatrix(path), origin).columns
    quantizer, changed = get_quantizer("affine4g32"), 0
    for base in expert_bases(origin):
        packed = read_array(origin.tensors[f"{base}.weight"]).view(np.uint8).reshape(-1)
        exponents = read_array(origin.tensors[f"{base}.scale"]).reshape(-1)
        sizes = {"weight": len(packed), "scales": 2 * len(exponents), "biases": 2 * len(exponents)}
        importance = normalized(found[base], base) if base in found else None
        parts = {part: np.empty(n, np.uint8) for part, n in sizes.items()}
        plain = {part: np.empty(n, np.uint8) for part, n in sizes.items()}
        quantizer.encode(packed, exponents, parts, importance)
        quantizer.encode(packed, exponents, plain)
        for part, array in parts.items():
            assert read_array(opened.tensors[f"{base}.{part}"]).tobytes() == array.tobytes()
            changed += base in found and not np.array_equal(array, plain[part])
    assert changed > 10
    other = write(tmp_path / "other.dat", example(3))
    again = requantize(source, bundle, "--quantizer", "affine4g32", "--imatrix", other)
    assert "nothing to do" not in again.stdout
    assert "nothing to do" in requantize(source, bundle, *options[:3], other).stdout


def test_the_native_converter_weighs_errors_alike(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, replace(SIZES), seed=53)
    options = ("--quantizer", "affine4g32", "--imatrix", write(tmp_path / "i.dat", example(4)))
    assert requantize(source, bundle, *options).returncode == 0
    native = tmp_path / "native"
    must("convert", "--source", source, "--bundle", native, *options, "--mtp", "as-experts")
    theirs, ours = open_bundle(bundle).tensors, open_bundle(tmp_path / "native").tensors
    for base in expert_bases(open_source(source)):
        for part in ("weight", "scales", "biases"):
            mine, wanted = (read_array(at[f"{base}.{part}"]) for at in (ours, theirs))
            assert mine.tobytes() == wanted.tobytes(), (base, part)


def test_verify_recomputes_what_an_imatrix_made(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, SIZES, seed=54)
    path = write(tmp_path / "i.dat", example(5))
    assert (
        requantize(source, bundle, "--quantizer", "affine4g32", "--imatrix", path).returncode == 0
    )
    folders = ("--source", source, "--bundle", bundle)
    results = {}
    for what, options in {"without": [], "with": ["--imatrix", path]}.items():
        out = tmp_path / f"{what}.json"
        script("verify", *folders, "--without-loader", "--json", out, *options)
        found = json.loads(out.read_text())
        results[what] = json.dumps(found["findings"])
        cells = found["errors"]["experts"]
        assert (what == "with") == all(c["groups"] == c["groups_as_expected"] for c in cells)
    unknown = "another table than this version's"
    assert unknown in results["without"]
    assert unknown not in results["with"]


def test_an_importance_is_prepared_once_for_a_matrix(tmp_path: Path, monkeypatch) -> None:
    """By convert and by verify, however many blocks the matrix has."""
    folder, bundle, _ = small.make(tmp_path, SIZES, seed=54)
    path, source = write(tmp_path / "i.dat", example(4)), open_source(folder)
    assert (
        requantize(folder, bundle, "--quantizer", "affine4g32", "--imatrix", path).returncode == 0
    )
    importance = importances(open_imatrix(path), source)
    prepared: Counter[str] = Counter()

    def counted(values: np.ndarray, name: str) -> np.ndarray:
        prepared[name.removesuffix(".weight")] += 1
        return normalized(values, name)

    for module in (expert_pieces, affine):
        monkeypatch.setattr(module, "normalized", counted)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1)  # of one row each
    monkeypatch.setattr(compare, "BLOCK_WEIGHTS", 1)
    quantizer, tensors = get_quantizer("affine4g32", importance), source.tensors
    with closing(WorkerBuffers()) as desk:
        for base, columns in importance.columns.items():
            both = tensors[f"{base}.weight"], tensors[f"{base}.scale"]
            places = dict.fromkeys(("weight", "scales", "biases"), 0)
            ledger = expert_pieces.ErrorLog()
            for piece in expert_pieces.expert_pieces(*both, places, quantizer, ledger, columns):
                for _ in piece.blocks(desk):
                    pass
    once = dict.fromkeys(importance.columns, 1)
    assert prepared == once
    prepared.clear()
    done = read_numbers(scan(bundle, Findings()), source, 1, lambda n: None, importance)
    assert any(outcome.recomputed for outcome in done.results)
    assert prepared == once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("blk.1.ffn_down_exps.weight"), "blk.1.ffn_down_exps.weight.*no such"),
        (
            lambda e: e.update({"blk.0.ffn_gate_exps.weight": np.ones(64)}),
            "blk.0.ffn_gate_exps.weight.*64 values.*3 experts × 64 columns",
        ),
        (
            lambda e: e.update({"blk.2.ffn_up_exps.weight": np.ones(5)}),
            "blk.2.ffn_up_exps.weight.*5 values",
        ),
    ],
    ids=["missing", "one-expert-only", "mtp-of-another-size"],
)
def test_a_missing_or_missized_entry_stops_the_run(tmp_path: Path, change, message: str) -> None:
    source, _, _ = small.make(tmp_path, SIZES, seed=53)
    entries = example(4)
    change(entries)
    imatrix = open_imatrix(write(tmp_path / "i.dat", entries))
    with pytest.raises(UserError, match=message):
        importances(imatrix, open_source(source))


def test_a_run_that_is_stopped_by_its_imatrix_writes_nothing(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, SIZES, seed=54)
    entries = example(5)
    entries["blk.1.ffn_up_exps.weight"][7] = np.nan
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    path = write(tmp_path / "i.dat", entries)
    done = requantize(source, bundle, "--quantizer", "affine4g32", "--imatrix", path)
    assert done.returncode == 1
    assert "negative, infinite or NaN" in done.stderr
    changed = [p.name for p in bundle.iterdir() if before.get(p.name) != p.read_bytes()]
    assert len(changed) < len(before)  # shards before the bad expert are done, and stay valid
    wrong = requantize(source, bundle, "--imatrix", path, "--quantizer", "mlx")
    assert (wrong.returncode, "QUANTIZER=mlx, expected affineBgG" in wrong.stderr) == (1, True)


def test_experts_that_were_never_reached_count_all_columns_alike() -> None:
    assert np.array_equal(normalized(np.zeros(32, np.float32), "x"), np.ones(32))
    assert normalized(np.array([0, 3], np.float32), "x").tolist() == [FLOOR, 2.0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"GGUF" + bytes(40), "GGUF imatrix"),
        (struct.pack("<i", 0), "found 0, expected 1 or more"),
        (struct.pack("<i", -1), "found -1"),
        (struct.pack("<ii", 1, 5000) + bytes(6000), "5,000 bytes, expected at most"),
        (struct.pack("<ii", 1, 2**31 - 1), "2,147,483,647"),
        (struct.pack("<ii", 2**31 - 1, 1) + b"a" + struct.pack("<iif", 1, 1, 1), "0 bytes left"),
        (struct.pack("<ii", 1, 1) + b"\xff" + struct.pack("<iif", 1, 1, 1), "no UTF-8"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 9), "0 bytes left, expected 36"),
        ((struct.pack("<i", 2) + 2 * (struct.pack("<i", 1) + b"a" + struct.pack("<iif", 1, 1, 1))),
         "this entry twice"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iif", 1, 1, 1) + bytes(9), "expected 29"),
    ],
)  # fmt: skip
def test_a_broken_file_ends_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_imatrix(path)


def test_files_of_older_versions_have_no_trailer_or_half_of_one(tmp_path: Path) -> None:
    for trailer in (b"", struct.pack("<i", 3), struct.pack("<ii", 3, 0)):
        opened = open_imatrix(write(tmp_path / "i.dat", example(6), trailer))
        assert (len(opened.entries), opened.dataset) == (6, "")


def test_no_damage_gets_past_the_reader_but_as_a_stop(tmp_path: Path) -> None:
    """4,000 files with cut ends and changed bytes: opened whole, or refused with a UserError."""
    print("seed 55")
    rng = np.random.default_rng(55)
    path = write(tmp_path / "i.dat", {"blk.0.x": np.ones(3), "blk.1.yy": np.ones(2)})
    whole = path.read_bytes()
    refused = 0
    for _ in range(4000):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for _ in range(rng.integers(0, 4)):
            data[rng.integers(len(data))] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(bytes(data))
        try:
            opened = open_imatrix(path)
        except UserError:
            refused += 1
        else:
            ends = [entry.offset + 4 * entry.count for entry in opened.entries.values()]
            assert max(ends) <= len(data)
    assert 2000 < refused < 4000
