"""scripts/requantize.py, run as a process, against the reference in tests/small.py."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small

from dsv4.checkpoint import check_index, open_bundle
from dsv4.shard import read_array, read_shard

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "requantize.py"


def requantize(source: Path, bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--source", source, "--bundle", bundle, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


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
            if name.endswith(".scales"):
                assert names[i + 1] == name.replace(".scales", ".biases")
