"""Random sources in the structure of each release that people run, through check to repair.

Catches: a release that one stage takes and another refuses; a note, a warning or a repair that a
right source does not call for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
from conftest import made_once
from here import build_bundle, finish_bundle, here, must
from make_source import write_source
from source_tensors import Sizes, with_dspark, with_vision

FLASH = Sizes(
    num_hidden_layers=3, n_routed_experts=4, hidden_size=128, num_attention_heads=2,
    compress_ratios=(0, 4, 128, 0),
)  # fmt: skip
PRO = replace(FLASH, compress_ratios=(128, 128, 4, 0), num_attention_heads=4, o_groups=4,
              moe_intermediate_size=256, num_hash_layers=2)  # fmt: skip
FLASH_0731 = with_dspark(FLASH)
RELEASES = {
    "V4-Flash": FLASH,
    "V4-Flash-0731": FLASH_0731,
    "V4-Flash-0731, 3 declared": with_dspark(FLASH, declared=3),
    "V4-Flash-Vision-Exp": with_vision(FLASH_0731),
    "V4-Pro": PRO,
    "V4-Pro-0813": with_dspark(PRO),
    "pruned": replace(FLASH_0731, n_routed_experts=3),
    "4Expert": replace(FLASH_0731, num_experts_per_tok=4),
    "without MTP": replace(FLASH, num_nextn_predict_layers=0, compress_ratios=(0, 4, 128)),
    "dense matrices": FLASH_0731,
}


def make_dense(arrays: bundles.Arrays) -> None:
    """Attention's output matrices in BF16, as abliterated copies have them."""
    for name in [n for n in arrays if n.endswith("attn.wo_b.scale")]:
        del arrays[name]
        weight = name.replace("scale", "weight")
        values = np.random.default_rng(2).standard_normal(arrays[weight][1].shape) * 0.02
        bits = values.astype(np.float32).view(np.uint32) >> 16
        arrays[weight] = "BF16", bits.astype(np.uint16)


@pytest.fixture
def release(request, tmp_path_factory) -> Path:
    name = request.param

    def make(folder: Path) -> None:
        folder.mkdir()
        write_source(folder, RELEASES[name], 5, shards=3)
        if name == "dense matrices":
            bundles.edit(folder, make_dense)

    return made_once(tmp_path_factory, f"release-{name}", make)


def cases() -> list:
    """Every release by lossless; by mlx and some by each further kind of quantizer in test-full."""
    more = [(n, q) for n in ("V4-Flash-Vision-Exp", "V4-Pro-0813", "4Expert", "dense matrices")
            for q in ("small", "turboquant2", "mxfp4", "affine3g128")]  # fmt: skip
    return [
        *((name, "lossless") for name in RELEASES),
        *(pytest.param(name, "mlx", marks=pytest.mark.full) for name in RELEASES),
        *(pytest.param(*one, marks=pytest.mark.full) for one in more),
    ]


@pytest.mark.parametrize(("release", "quantizer"), cases(), indirect=["release"])
def test_a_release_goes_through_every_stage(release, quantizer, tmp_path):
    both = ("--source", release, "--bundle", tmp_path / "b")
    chosen = ("--quantizer", quantizer)
    _, out, _ = here("check", *both)
    assert "ok  source: " in out
    status, _, err = here("convert", *both, *chosen)
    assert (status, err) == (0, "")
    assert "nothing to do" in must("requantize", *both, *chosen)
    finish_bundle(release, tmp_path / "b")
    assert {f.name: f.places for f in bundles.judge(tmp_path / "b", release)} == {}
    assert "nothing to repair" in must("repair", *both, *chosen, "--dry-run")


@pytest.mark.full
@pytest.mark.parametrize("release", ["V4-Flash-Vision-Exp", "V4-Pro-0813"], indirect=True)
def test_the_text_part_is_evaluated(release, tmp_path):
    both = ("--source", release, "--bundle", tmp_path / "b")
    build_bundle(release, tmp_path / "b", "--quantizer", "lossless")
    must("evaluate", *both, "--tokens", 40, "--out", tmp_path / "e")
    must("imatrix", "--source", release, "--tokens", 40, "--out", tmp_path / "i.dat")
