"""Runs of zeros, as a download manager leaves them: found where the model has none.

Catches: a hole that is missed because of where it begins, a run that is named and is none, a source
with a hole, or with a tensor of nothing but zeros, that is converted without a word.
"""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import NANO, must, refusal, script

from dsv4.model.opening import open_bundle, open_source
from dsv4.proof.findings import Findings
from dsv4.proof.level2 import read_numbers
from dsv4.proof.survey import survey
from dsv4.proof.verdict import judge
from dsv4.storage.checkpoint import INDEX
from dsv4.storage.shard import Planned, Tensor, read_array, write_shard
from dsv4.storage.zeros import zero_run


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


def test_a_run_is_found_wherever_it_begins():
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(400):
        data = rng.integers(0, 3, int(rng.integers(1, 6000))).astype(np.uint8)
        at = int(rng.integers(0, len(data)))
        data[at : at + int(rng.integers(0, 3000))] = 0
        least = int(rng.choice([1, 2, 7, 8, 9, 100, 512, 1000]))
        found, wanted = zero_run(data, least), runs(data, least)
        assert found in wanted if wanted else found is None, (least, found, wanted)


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
                Planned(t.name, t.dtype, t.shape, lambda t=t: [read_array(t)])
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
    opened = survey(bundle, Findings())
    done = read_numbers(opened, open_source(source) if source else None, 2, lambda n: None)
    judge(done, findings)
    return findings


def fill_with_zeros(tensor: Tensor, first: int = 0, last: int | None = None) -> None:
    last = tensor.nbytes if last is None else last
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + first)
        file.write(bytes(last - first))
