"""Vision-Exp: a DeepSeek-V4 release with a vision tower, whose tensors stay as in the source.

Catches: a tensor of the tower that lacks unseen, or is rounded or renamed; a lost key of
config.json; a spelling of the tower's names that is refused; a bundle that mlx-vlm cannot load.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
from conftest import made_once
from here import here, must, refusal
from make_source import config_of, write_source
from source_tensors import FLASH, headers, with_dspark, with_vision
from test_dspark import TINY, by_headers

from dsv4.errors import UserError
from dsv4.model.configs import known_fields
from dsv4.model.expected_tensors import check_headers, expected_weights
from dsv4.model.load import open_bundle
from dsv4.model.names import treatment
from dsv4.model.source import open_source
from dsv4.storage.atomic import write_json
from dsv4.storage.checkpoint import read_json
from dsv4.storage.safetensors_file import read_array

SMALL = with_vision(TINY)
VISION_EXP = replace(
    with_vision(with_dspark(FLASH, rank=256), layers=32),
    vision_dim=1024, vision_n_heads=16, vision_inter_dim=2816,
)  # fmt: skip
IMAGE = [name for name in headers(SMALL) if treatment(name) == "image"]
BIASES = [name for name in headers(SMALL) if name.endswith((".gate.bias", ".gate.bias_vl"))]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        write_source(folder, SMALL, 5, shards=3)

    return made_once(tmp_path_factory, "vision-source", make)


def spelled_mlp(source: Path, folder: Path) -> Path:
    """A copy of a source whose tower has `mlp.` in place of `ffn.`."""
    shutil.copytree(source, folder)

    def rename(arrays: bundles.Arrays) -> None:
        for name in [n for n in arrays if n.startswith("vision.") and ".ffn." in n]:
            arrays[name.replace(".ffn.", ".mlp.")] = arrays.pop(name)

    bundles.edit(folder, rename)
    return folder


def make_bundle(source: Path, bundle: Path, quantizer: str) -> Path:
    both = ("--source", source, "--bundle", bundle)
    must("convert", *both, "--quantizer", quantizer)
    must("finalize", *both)
    must("patch", *both)
    return bundle


def test_a_labs_source_has_the_tensors_of_the_real_release():
    tensors = headers(VISION_EXP)
    assert len(tensors) == 72_633
    assert sum(name.startswith("vision.") for name in tensors) == 259
    wanted = [name for name, _, _ in expected_weights(by_headers(VISION_EXP))]
    assert sorted(wanted) == sorted(name for name in tensors if not name.endswith(".scale"))


@pytest.mark.parametrize("name", IMAGE + BIASES)
def test_each_tensor_of_images_that_lacks_is_named(name):
    tensors = headers(SMALL)
    check_headers(by_headers(SMALL, tensors))
    del tensors[name]
    with pytest.raises(UserError, match=f"no {name}"):
        check_headers(by_headers(SMALL, tensors))


def test_a_loader_is_shown_what_describes_the_tower():
    config = {key: v for key, v in config_of(SMALL).items() if key.startswith("vision_")}
    assert len(config) == 10
    assert known_fields(config) == config


@pytest.mark.parametrize("spelling", ["ffn", "mlp"])
@pytest.mark.parametrize("quantizer", ["mlx", "lossless", "affine2g64"])
def test_the_tower_stays_as_in_the_source(source, quantizer, spelling, tmp_path):
    given = source if spelling == "ffn" else spelled_mlp(source, tmp_path / "source")
    bundle = make_bundle(given, tmp_path / "bundle", quantizer)
    old, new = open_source(given).tensors, open_bundle(bundle).tensors
    names = [name for name in old if treatment(name) == "image" or name.endswith(".bias_vl")]
    assert len(names) == len(IMAGE) + 2
    for name in names:
        assert new[name].dtype == old[name].dtype == ("F32" if "bias_vl" in name else "BF16")
        assert np.array_equal(read_array(new[name]), read_array(old[name])), name
    assert not bundles.judge(bundle, given).errors


@pytest.mark.parametrize("spelling", ["ffn", "mlp"])
def test_a_tower_that_config_json_does_not_describe_is_left_out_with_a_note(
    source, spelling, tmp_path
):
    given = spelled_mlp(source, tmp_path / "source")
    if spelling == "ffn":
        shutil.rmtree(given)
        shutil.copytree(source, given)
    config = read_json(given / "config.json")
    write_json(given / "config.json", {k: v for k, v in config.items() if "vision" not in k})
    status, _, err = here("convert", "--source", given, "--bundle", tmp_path / "b")
    assert status == 0, err
    assert "tensors for images, of which config.json has no key, ignored" in err
    must("finalize", "--source", given, "--bundle", tmp_path / "b")
    must("patch", "--source", given, "--bundle", tmp_path / "b")
    assert not [n for n in open_bundle(tmp_path / "b").tensors if treatment(n) == "image"]
    assert not bundles.judge(tmp_path / "b", given).errors


def test_a_key_of_the_tower_that_lacks_is_no_reason_to_leave_it_out(source, tmp_path):
    given = shutil.copytree(source, tmp_path / "source")
    config = read_json(given / "config.json")
    del config["vision_n_layers"]
    write_json(given / "config.json", config)
    line = refusal("convert", "--source", given, "--bundle", tmp_path / "b")
    assert "vision_n_layers" in line


def test_verify_compares_the_numbers_of_the_tower(source, tmp_path):
    bundle = make_bundle(source, tmp_path / "bundle", "lossless")
    bundles.flip(bundle, "vision.blocks.1.ffn.w1.weight")
    bundles.flip(bundle, "layers.0.ffn.gate.bias_vl")
    findings = bundles.judge(bundle, source)
    assert {"passthrough-differs", "control-differs"} <= findings.names
    bundles.edit(bundle, lambda arrays: arrays.pop("aligner.w2.bias"))
    findings = bundles.judge(bundle, source, level=1)
    assert "aligner.w2.bias" in bundles.places(findings, "tensor-missing")
