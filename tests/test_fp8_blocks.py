"""FP8 in blocks of other sizes than the releases', as config.json gives them.

Catches: a block that is a constant somewhere between check and verify, scales of another block than
config.json's, a block that no format here can hold.
"""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from bundles import Arrays, edit, edit_json, judge, load
from conftest import script
from here import here, must, refusal
from hub_server import Hub
from test_download import environment

from dsv4.evaluation.layer_tensors import group_scales
from dsv4.model.fp8_blocks import block_of, scale_shape
from dsv4.model.source import open_source
from dsv4.quantization.fp8 import decode, expand_scales
from dsv4.storage.safetensors_file import read_array

SIZES = list(itertools.product((32, 64, 128, 512), repeat=2))
SIZE = "quantization_config.weight_block_size"


def set_size(source: Path, size: object) -> None:
    def change(config: dict) -> None:
        config["quantization_config"]["weight_block_size"] = size

    edit_json(source / "config.json", change)


def reblock(source: Path, block: tuple[int, int]) -> None:
    """Give every FP8 matrix a random scale for each block of another size."""
    rng = np.random.default_rng(5)

    def change(arrays: Arrays) -> None:
        for name, (dtype, codes) in arrays.items():
            if dtype == "F8_E4M3":
                shape = scale_shape(codes.shape, block)
                scale = rng.integers(112, 120, shape, dtype=np.uint8)
                arrays[name.removesuffix("weight") + "scale"] = "F8_E8M0", scale

    edit(source, change)
    set_size(source, list(block))


@pytest.fixture(scope="module", params=[(64, 64), (256, 32)], ids=str)
def other(request, source, tmp_path_factory) -> Path:
    """The random source in blocks of 64 × 64, and of 256 × 32."""
    folder = tmp_path_factory.mktemp("blocks") / "source"
    shutil.copytree(source, folder)
    reblock(folder, request.param)
    return folder


@pytest.mark.parametrize("quantizer", ["mlx", "lossless"])
def test_a_source_in_other_blocks_becomes_a_right_bundle(other, tmp_path, quantizer):
    bundle = tmp_path / "bundle"
    assert "complete, " in must("check", "--source", other, "--bundle", bundle)
    must("convert", "--source", other, "--bundle", bundle, "--quantizer", quantizer)
    for stage in ("finalize", "patch"):
        must(stage, "--source", other, "--bundle", bundle)
    findings = judge(bundle, other)
    assert [finding.name for finding in findings.errors] == []
    if quantizer == "lossless":
        assert_same_numbers(other, bundle)


def assert_same_numbers(source: Path, bundle: Path) -> None:
    """Every block is expanded here by np.kron, without the shapes' help."""
    made, block = load(bundle), open_source(source).config["quantization_config"]
    for name, tensor in open_source(source).tensors.items():
        if tensor.dtype == "F8_E4M3":
            base = name.removesuffix(".weight")
            scale = read_array(open_source(source).tensors[f"{base}.scale"])
            whole = np.kron(scale, np.ones(block["weight_block_size"], np.uint8))
            rows, columns = tensor.shape
            assert np.array_equal(made[f"{base}.scales"][1], whole[:rows, :columns:32]), name


@pytest.mark.parametrize("block", SIZES)
def test_the_shapes_tell_the_block(block):
    rng = np.random.default_rng(1)
    for shape in ((1, 32), (96, 160), (512, 1024), (700, 992)):
        scale = rng.integers(100, 130, scale_shape(shape, block), dtype=np.uint8)
        codes = rng.integers(0, 120, shape, dtype=np.uint8)
        found = block_of(shape, scale.shape)
        assert scale_shape(shape, found) == scale.shape
        rows, columns = (np.arange(n) // size for n, size in zip(shape, block, strict=True))
        ones = decode(codes, np.full_like(scale, 127), "ones")
        expected = ones * np.exp2(scale[rows[:, None], columns].astype(np.float32) - 127)
        assert np.array_equal(decode(codes, scale, "blocks"), expected)


@pytest.mark.parametrize("block", SIZES)
def test_evaluate_expands_the_scales_as_lossless_does(block):
    shape = (700, 992)
    scale = np.random.default_rng(2).integers(0, 255, scale_shape(shape, block), dtype=np.uint8)
    unit = SimpleNamespace(
        treatment="fp8",
        weight=SimpleNamespace(shape=shape),
        scale=SimpleNamespace(shape=scale.shape),
    )
    expanded = expand_scales(scale, *shape)
    assert np.array_equal(np.array(group_scales(unit, mx.array(scale))), expanded)


def test_a_scale_that_no_block_gives_has_none():
    assert block_of((512, 512), (3, 4)) is None
    assert block_of((512, 512), (4,)) is None
    assert block_of((512,), (4,)) is None


@pytest.mark.parametrize(
    "size",
    [0, 96, "x", [], [128], [128, 128, 128], [96, 96], [16, 128], [128, 0], [True, 128],
     [128.0, 128], [1 << 40, 128], {}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("quantizer", ["mlx", "lossless"])
def test_a_block_of_nonsense_is_refused_in_one_line(source_copy, tmp_path, size, quantizer):
    set_size(source_copy, size)
    bundle = tmp_path / "bundle"
    line = refusal("convert", "--source", source_copy, "--bundle", bundle, "--quantizer", quantizer)
    assert f"{SIZE}: found " in line
    assert "powers of two from 32 on" in line
    assert not bundle.exists()


def test_check_names_a_block_of_nonsense(source_copy, tmp_path):
    set_size(source_copy, [96, 96])
    status, out, _ = here("check", "--source", source_copy, "--bundle", tmp_path / "bundle")
    assert status == 1
    assert f"{SIZE}: found [96, 96]" in out


def test_scales_of_another_block_than_config_json_gives_are_refused(source_copy, tmp_path):
    set_size(source_copy, [64, 64])
    line = refusal("convert", "--source", source_copy, "--bundle", tmp_path / "bundle")
    assert ".scale: F8_E8M0 [" in line


def test_a_source_on_the_hub_is_judged_by_its_own_blocks(other, tmp_path, monkeypatch):
    files = {str(p.relative_to(other)): p.read_bytes() for p in other.rglob("*") if p.is_file()}
    config = json.loads(files["config.json"])
    config["quantization_config"]["weight_block_size"] = [128, 128]
    wrong = files | {"config.json": json.dumps(config).encode()}
    with Hub() as hub:
        hub.add("a/right", files)
        hub.add("a/wrong", wrong)
        for name, value in environment(hub, tmp_path / "s").items():
            monkeypatch.setenv(name, value)
        where = ("--source", tmp_path / "s", "--bundle", tmp_path / "b")
        assert "ok  source: " in script("check", *where, "--repo", "a/right").stdout
        out = script("check", *where, "--repo", "a/wrong").stdout
        assert "NO  source: " in out
        assert ".scale: F8_E8M0 [" in out


def test_upstreams_converter_is_not_given_other_blocks(other, tmp_path):
    line = refusal(
        "convert", "--source", other, "--bundle", tmp_path / "bundle", "--converter", "jang"
    )
    assert "FP8 in blocks of" in line
