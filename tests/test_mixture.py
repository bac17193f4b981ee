"""A mixture to a size: the choice is the least one, the size is kept, a wrong plan is one line."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import bundles
import numpy as np
import pytest
from conftest import must, refusal

from dsv4.conversion.size_planner import SizePlanner
from dsv4.errors import UserError
from dsv4.model import mac_memory
from dsv4.model.bundle_tensors import SHARD_BYTES
from dsv4.model.load import expert_labels, open_bundle
from dsv4.model.names import stack_of
from dsv4.model.source import open_source
from dsv4.quantization import knapsack
from dsv4.quantization.mixture_plan import label_name, read_plan
from dsv4.settings import parse_context, parse_memory, parse_size
from dsv4.verification.checks.runtimes import refusal_reason

FLASH = {
    "num_hidden_layers": 43, "head_dim": 512, "sliding_window": 128, "index_head_dim": 128,
    "index_n_heads": 64, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_least_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = [
        [(int(7 * rng.integers(1, 30)), float(rng.random())) for _ in range(rng.integers(1, 6))]
        for _ in range(5)
    ]
    budget = knapsack.min_size(items) + int(rng.integers(0, 300))
    picks = knapsack.choose(items, budget)
    chosen = [options[pick] for options, pick in zip(items, picks, strict=True)]
    assert sum(size for size, _ in chosen) <= budget
    every = (of for of in itertools.product(*items) if sum(size for size, _ in of) <= budget)
    least = min(sum(cost for _, cost in of) for of in every)
    assert sum(cost for _, cost in chosen) == pytest.approx(least)


def test_sizes_of_no_common_unit_stay_within_the_budget() -> None:
    rng = np.random.default_rng(1)
    items = [[(int(rng.integers(1, 10**9)), float(rng.random())) for _ in range(4)] for _ in "abcd"]
    budget = knapsack.min_size(items) + 10**9
    picks = knapsack.choose(items, budget)
    assert sum(of[pick][0] for of, pick in zip(items, picks, strict=True)) <= budget


def test_a_macs_memory_leaves_what_cache_server_and_macos_take() -> None:
    # 41 layers with a pool: 21 of ratio 4 with an indexer, 20 of 128; two bytes a number.
    entries = 43 * 128 * 512 + 21 * (65536 // 4) * (512 + 128) + 20 * (65536 // 128) * 512
    assert mac_memory.cache_bytes(FLASH, 65536) == 2 * entries
    gib = mac_memory.GIB
    # The indexer's scores of 512 tokens: 64 heads, float32, twice; 4 GiB and 16 GiB.
    assert 4 * gib == 2 * 64 * 512 * (65536 // 4) * 4
    assert mac_memory.bundle_budget(FLASH, 96 * gib, 65536) == 90 * gib - 7 * gib - 2 * entries
    assert mac_memory.server_bytes(FLASH, 1 << 18) == 19 * gib
    words = mac_memory.describe_fit(FLASH, 82 * gib, 65536)
    assert words == (
        "fits 96 GB with 65,536 tokens of context; needs sudo sysctl iogpu.wired_limit_mb=92160"
    )
    assert "no sysctl needed" in mac_memory.describe_fit(FLASH, 60 * gib, 65536, 96 * gib)
    assert "does not fit 64 GB" in mac_memory.describe_fit(FLASH, 60 * gib, 65536, 64 * gib)


def test_sizes_are_read_as_they_are_said() -> None:
    assert (parse_size("88GB"), parse_size("2.5MB"), parse_size("5e9")) == (
        88_000_000_000, 2_500_000, 5_000_000_000
    )  # fmt: skip
    assert (parse_memory("96GB"), parse_context("64k"), parse_context("100")) == (
        96 << 30, 65536, 100
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned(source: Path, tmp_path_factory) -> tuple[Path, Path, int]:
    """A plan, the bundle that it made, and the size that was asked for."""
    folder = tmp_path_factory.mktemp("mixture")
    plan, bundle, size = folder / "plan.json", folder / "bundle", 4_500_000
    options = ("--quantizer", "mixture", "--plan", plan)
    least = refusal("plan", "--source", source, "--plan", plan, "--size", "1MB")
    assert "at least, expected a size that can be reached" in least
    assert not plan.exists()
    size = int(float(least.partition("found ")[2].split(" MB")[0]) * 1.06e6)
    said = must("plan", "--source", source, "--plan", plan, "--size", str(size))
    assert "written" in said
    must("convert", "--source", source, "--bundle", bundle, *options)
    must("finalize", "--source", source, "--bundle", bundle)
    must("patch", "--bundle", bundle)
    return plan, bundle, size


def test_the_bundle_has_the_size_and_the_forms_of_its_plan(planned, source) -> None:
    plan, bundle, size = planned
    document, opened = json.loads(plan.read_text()), open_bundle(bundle)
    assert sum(path.stat().st_size for path in bundle.glob("*.safetensors")) == document["bytes"]
    assert 0.9 * size < document["bytes"] <= size
    forms = {
        f"{layer}.{p}": form for layer, of in document["experts"].items() for p, form in of.items()
    }
    labels = expert_labels(opened)
    stored = {stack_of(base): label_name(label) for base, label in labels.items()}
    assert {s: form for s, form in stored.items() if s.startswith("layers.")} == forms
    assert {form for s, form in stored.items() if s.startswith("mtp.")} == {"mxfp4"}
    assert len(set(forms.values())) > 1
    for base, label in labels.items():
        assert opened.config["quantization"][base] == label
    assert bundles.judge(bundle, source).names == set()


def test_a_lost_label_of_a_mixture_is_named_and_mended(planned, source, tmp_path) -> None:
    bundle = shutil.copytree(planned[1], tmp_path / "bundle")
    path = bundle / "config.json"
    right, config = path.read_bytes(), json.loads(path.read_text())
    labels = config["quantization"]
    del labels[next(n for n in labels if n[:6] == "model." and labels[n]["mode"] == "affine")]
    config["quantization"]["layers.0.ffn.experts.1.w1"]["group_size"] = 32
    path.write_text(json.dumps(config))
    found = bundles.judge(bundle, source, level=1)
    assert found.names == {"label-missing", "label-group-wrong", "label-bits-wrong"}
    must("repair", "--bundle", bundle, "--without-loader")
    assert json.loads(path.read_bytes()) == json.loads(right)


def edited(planned, tmp_path: Path, change) -> Path:
    document = json.loads(planned[0].read_text())
    change(document["experts"])
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.update({"layers.99": {"gate_proj": "mxfp4"}}), "the source does not have"),
        (lambda e: e["layers.0"].update({"side_proj": "mxfp4"}), "the source does not have"),
        (lambda e: e["layers.0"].pop("up_proj"), "nothing for layers.0.up_proj"),
        (lambda e: e["layers.0"].update({"up_proj": "affine9g64"}), "expected affineBgG or mxfp4"),
        (lambda e: e.update({"layers.0": ["mxfp4"]}), "{layer: {projection: form}}"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_line(planned, source, tmp_path, change, said) -> None:
    path = edited(planned, tmp_path, change)
    with pytest.raises(UserError) as stop:
        read_plan(path, open_source(source), "source")
    assert said in str(stop.value)
    assert "\n" not in str(stop.value)


def mostly_exact(experts: dict) -> None:
    """All of them as the source has them, but one stack."""
    experts.update({layer: dict.fromkeys(of, "mxfp4") for layer, of in experts.items()})
    experts["layers.1"]["up_proj"] = "affine3g32"


def test_an_edited_plan_makes_the_experts_anew(planned, source, tmp_path) -> None:
    """Most are exact then, so that the plan's most usual form is one that is copied."""
    bundle = shutil.copytree(planned[1], tmp_path / "bundle")
    plan = edited(planned, tmp_path, mostly_exact)
    options = ("--source", source, "--bundle", bundle, "--quantizer", "mixture", "--plan", plan)
    must("requantize", *options)
    label = expert_labels(open_bundle(bundle))["layers.1.ffn.experts.0.w3"]
    assert label == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert bundles.judge(bundle, source).names == set()


def contents(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()}


def test_all_but_the_experts_can_be_the_sources_own(planned, source, tmp_path) -> None:
    plan, made, _ = planned
    bundle, document = tmp_path / "bundle", json.loads(plan.read_text())
    options = ("--source", source, "--quantizer", "mixture-lossless", "--plan", plan, "--bundle")
    must("convert", *options, bundle)
    must("finalize", "--source", source, "--bundle", bundle)
    must("patch", "--bundle", bundle)
    planner = SizePlanner(
        open_source(source), document["squared_errors"], SHARD_BYTES, options[3], "source"
    )
    forms = {f"{n}.{p}": form for n, of in document["experts"].items() for p, form in of.items()}
    assert planner.nbytes(forms) == sum(f.stat().st_size for f in bundle.glob("*.safetensors"))
    other = shutil.copytree(made, tmp_path / "other")
    must("requantize", *options, other)
    assert contents(other) == contents(bundle)
    must("requantize", "--source", source, "--quantizer", "mixture", "--plan", plan,
         "--bundle", other)  # fmt: skip
    assert contents(other) == contents(made)
    assert open_bundle(bundle).config["quantization"]["layers.1.attn.wkv"]["mode"] == "mxfp8"
    assert bundles.judge(bundle, source).names == set()
    bundles.flip(bundle, "layers.1.attn.wkv.scales", 2)
    assert bundles.judge(bundle, source).names == {"module-differs"}
    assert "crashes on FP8's" in refusal_reason({"vmlx": "1.3.97"}, "mixture-lossless")


def test_a_plan_that_is_not_there_is_one_line(source, tmp_path) -> None:
    said = refusal("plan", "--source", source, "--plan", tmp_path / "none.json")
    assert "none.json: found no such file, expected a plan; make plan FIT" in said


def test_an_imatrix_of_another_model_stops_the_plan(source, tmp_path) -> None:
    path = tmp_path / "i.dat"
    name = b"blk.0.ffn_gate_exps.weight"
    head = np.array([1, len(name)], "<i4").tobytes() + name
    path.write_bytes(head + np.array([1, 4], "<i4").tobytes() + np.ones(4, "<f4").tobytes())
    options = ("--plan", tmp_path / "p.json", "--size", "9GB", "--imatrix", path)
    assert "use an imatrix of this model" in refusal("plan", "--source", source, *options)
