"""What headers show to be wrong with a source is named before anything is written.

Catches: a matrix cut in half, a scale that belongs to nothing, a table of experts that are not
there, another format or model taken for an incomplete copy of the source.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
import small
from conftest import script
from here import here, must, refusal
from hub_server import Hub
from make_source import config_of, write_source
from source_tensors import Sizes, headers, with_dspark
from test_download import environment, sent_of_shards

from dsv4.errors import UserError
from dsv4.model.chat_template import ENCODING
from dsv4.model.expected_tensors import check_tables, source_faults
from dsv4.model.load import open_bundle
from dsv4.model.names import is_control
from dsv4.model.source import open_source
from dsv4.model.source_format import check_format, check_model_type
from dsv4.quantization.fp8 import E4M3
from dsv4.storage.checkpoint import INDEX, SINGLE, Checkpoint
from dsv4.storage.safetensors_file import Shard, Tensor, read_array
from dsv4.storage.tensor_reader import round_to_dtype

SIZES = with_dspark(Sizes(n_routed_experts=2))
RIGHT = headers(SIZES)
EXPERT = "layers.1.ffn.experts.1.w1"


def source(changes: dict[str, Tensor | None], **config: object) -> Checkpoint:
    """A source by its headers alone: tensors changed, added, or (None) taken away."""
    tensors = {n: t for n, t in {**RIGHT, **changes}.items() if t is not None}
    shard = Shard(Path("model.safetensors"), tensors, {}, 0)
    where = dict.fromkeys(tensors, shard.path.name)
    return Checkpoint(Path(), config_of(SIZES) | config, where, {shard.path.name: shard})


def as_dtype(dtype: str, *names: str) -> dict[str, Tensor]:
    return {name: replace(RIGHT[name], dtype=dtype) for name in names}


def test_a_right_source_has_no_fault():
    assert source_faults(source({})) == []


HALF = {f"{EXPERT}.{part}": replace(RIGHT[f"{EXPERT}.{part}"], shape=(64, n))
        for part, n in (("weight", 128), ("scale", 8))}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (HALF, f"{EXPERT}.weight: shape [64, 128], expected [128, 128]"),
        ({"norm.weight": replace(RIGHT["norm.weight"], shape=(128,))}, "norm.weight: shape [128]"),
        ({"mtp.2.norm.weight": None}, "no mtp.2.norm.weight"),
        (as_dtype("F16", "layers.0.attn.wq_b.scale"), "wq_b.scale: F16 [4, 1], expected F8_E8M0"),
        (
            as_dtype("BF16", "layers.0.attn.wkv.weight"),
            "wkv.scale: F8_E8M0 beside a weight in BF16",
        ),
        (as_dtype("F8_E4M3", f"{EXPERT}.weight"), f"{EXPERT}.weight: F8_E4M3, expected I8"),
        (as_dtype("I64", "layers.1.ffn.gate.bias"), "gate.bias: I64, expected F16 or BF16 or F32"),
    ],
    ids=["half-expert", "half-norm", "missing", "f16-scale", "raw-cast", "fp8-expert", "integers"],
)
def test_a_fault_of_a_tensor_is_named(changes, words):
    assert any(words in fault for fault in source_faults(source(changes)))


def test_a_grown_vocabulary_and_another_top_k_are_named():
    faults = source_faults(source({}, vocab_size=513, num_experts_per_tok=1))
    named = {fault.partition(":")[0] for fault in faults}
    assert {"embed.weight", "head.weight", "layers.0.ffn.gate.tid2eid"} <= named


def test_dense_matrices_of_a_fine_tuned_source_are_no_fault():
    base = "layers.0.attn.wkv"
    changes = {**as_dtype("BF16", f"{base}.weight"), f"{base}.scale": None}
    assert source_faults(source(changes)) == []


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{EXPERT}.weight_scale": RIGHT[f"{EXPERT}.scale"]}, "NVFP4"),
        ({"model.layers.0.mlp.gate.weight": RIGHT["norm.weight"]}, "transformers' names"),
        (as_dtype("F8_E4M3", *(n for n in RIGHT if ".experts." in n and n.endswith(".weight"))),
         "experts in FP8"),
        (as_dtype("BF16", *(n for n in RIGHT if ".experts." in n and n.endswith(".weight"))),
         "experts in BF16, not quantized"),
    ],
    ids=["nvfp4", "transformers", "fp8", "bf16"],
)  # fmt: skip
def test_another_format_is_named_and_nothing_is_fetched_again(tensors, words):
    with pytest.raises(UserError, match=words) as stop:
        check_format(source(tensors))
    assert "fetch" not in f"{stop.value}"


def test_another_model_is_named():
    with pytest.raises(UserError, match=r"V4\.1 \(model_type 'deepseek_v41'\), another model"):
        check_model_type({"model_type": "deepseek_v41"}, "config.json")


def test_a_table_that_names_an_expert_which_was_pruned_is_named(tmp_path):
    write_source(tmp_path, Sizes(), 1, 1)
    opened = open_source(tmp_path)
    table = opened.tensors["layers.0.ffn.gate.tid2eid"]
    assert read_array(table).max() == 7
    pruned = replace(opened, config=opened.config | {"n_routed_experts": 6})
    with pytest.raises(UserError, match=r"layers\.0\.ffn\.gate\.tid2eid: experts 0 to 7 of 6"):
        check_tables(pruned)


# --- On the hub -----------------------------------------------------------------------------------

REPO = "somebody/DeepSeek-V4-Flash-pruned"
REFUSED = {
    "half-matrix": lambda arrays, config: halve(arrays, "layers.1.attn.wq_b.weight"),
    "missing": lambda arrays, config: arrays.pop("layers.0.ffn.experts.1.w2.scale"),
    "stale-table": lambda arrays, config: name_expert(arrays, 99),
    "another-model": lambda arrays, config: config.update(model_type="deepseek_v41"),
    "transformers-names": lambda arrays, config: arrays.update(
        {"model.norm.weight": arrays.pop("norm.weight")}
    ),
}


def halve(arrays: small.Arrays, name: str) -> None:
    dtype, array = arrays[name]
    arrays[name] = dtype, array[: len(array) // 2]


def name_expert(arrays: small.Arrays, number: int) -> None:
    dtype, table = arrays["layers.0.ffn.gate.tid2eid"]
    arrays["layers.0.ffn.gate.tid2eid"] = dtype, np.full_like(table, number)


@pytest.fixture(params=REFUSED)
def refused(request, tmp_path) -> Iterator[tuple[Hub, str]]:
    """A hub with a source that is wrong, and which fault it has."""
    sizes = small.Sizes(hidden=512, width=256)
    arrays, config = small.source_arrays(sizes, np.random.default_rng(3)), sizes.config()
    REFUSED[request.param](arrays, config)
    small.save(tmp_path / "origin", arrays, 40, config)
    files = {p.name: p.read_bytes() for p in (tmp_path / "origin").iterdir()}
    files |= dict.fromkeys(("tokenizer.json", "tokenizer_config.json", ENCODING), b"{}")
    with Hub() as hub:
        hub.add(REPO, files)
        yield hub, request.param


def test_no_shard_of_a_source_that_is_refused_is_fetched(refused, tmp_path, monkeypatch):
    """With LOW_DISK for every second fault: both ways ask the same function."""
    hub, kind = refused
    low_disk = list(REFUSED).index(kind) % 2
    for name, value in environment(hub, tmp_path / "s").items():
        monkeypatch.setenv(name, value)
    where = ("--source", tmp_path / "s", "--repo", REPO, *(["--low-disk"] if low_disk else []))
    done = script("download", *where, "--patience", 0)
    assert done.returncode == 1, kind
    assert f"hub: {REPO}" in done.stderr or "model_type" in done.stderr
    assert not list((tmp_path / "s").glob("**/*.safetensors"))
    assert sent_of_shards(hub) == 0
    done = script("check", *where, "--bundle", tmp_path / "b")
    assert "NO  source:" in done.stdout
    assert sent_of_shards(hub) == 0


def test_f32_scales_are_no_fault_of_a_source_on_the_hub(tmp_path, monkeypatch):
    """Its headers stand in sparse files, where every scale would be 0."""
    arrays = small.source_arrays(ODD_SIZES, np.random.default_rng(4))
    wide_scales(arrays)
    small.save(tmp_path / "o", arrays, 99, ODD_SIZES.config())
    files = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    files |= dict.fromkeys(("tokenizer.json", "tokenizer_config.json", ENCODING), b"{}")
    with Hub() as hub:
        hub.add(REPO, files)
        for name, value in environment(hub, tmp_path / "s").items():
            monkeypatch.setenv(name, value)
        where = ("--source", tmp_path / "s", "--repo", REPO, "--patience", 0)
        done = script("download", *where)
        assert (done.returncode, done.stderr) == (0, "")


def test_tokenizer_files_come_from_the_base_repository(tmp_path, monkeypatch):
    sizes = small.Sizes()
    small.save(
        tmp_path / "o", small.source_arrays(sizes, np.random.default_rng(4)), 99, sizes.config()
    )
    tuned = {p.name: p.read_bytes() for p in (tmp_path / "o").iterdir()}
    base = {"tokenizer.json": b"{}", "tokenizer_config.json": b"[]", ENCODING: b"# encoding"}
    with Hub() as hub:
        hub.add(REPO, tuned)
        hub.add("deepseek-ai/base", base | {"config.json": b"other"})
        for name, value in environment(hub, tmp_path / "s").items():
            monkeypatch.setenv(name, value)
        where = ("--source", tmp_path / "s", "--repo", REPO, "--patience", 0)
        done = script("download", *where)
        assert done.returncode == 1
        assert "BASE=" in done.stderr
        done = script("download", *where, "--base", "deepseek-ai/base")
        assert (done.returncode, done.stderr) == (0, "")
        assert {n: (tmp_path / "s" / n).read_bytes() for n in base} == base
        assert (tmp_path / "s" / "config.json").read_bytes() == tuned["config.json"]


# --- What is unusual, and converts ----------------------------------------------------------------

ODD_SIZES = small.Sizes()


def rounded_controls(arrays: small.Arrays) -> None:
    for name, (dtype, array) in list(arrays.items()):
        if dtype == "F32":
            arrays[name] = (
                "BF16",
                round_to_dtype(array, "BF16").view(np.uint16).reshape(array.shape),
            )


def wide_scales(arrays: small.Arrays) -> None:
    for name, (dtype, array) in list(arrays.items()):
        if dtype == "F8_E8M0":
            arrays[name] = "F32", np.exp2(array.astype(np.float32) - 127)


def narrow_tables(arrays: small.Arrays) -> None:
    for name, (dtype, array) in list(arrays.items()):
        if dtype == "I64":
            arrays[name] = "I32", array.astype(np.int32)


UNUSUAL = {
    "bf16-controls": (rounded_controls, "control tensors in BF16, widened to F32"),
    "f32-scales": (wide_scales, "scales in F32, taken as UE8M0"),
    "i32-tables": (narrow_tables, ""),
}


@pytest.mark.parametrize(
    "quantizer", ["mlx", "lossless", "mxfp4", pytest.param("affine2g64", marks=pytest.mark.full)]
)
@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_source_that_loses_nothing_converts(kind, quantizer, tmp_path):
    change, note = UNUSUAL[kind]
    arrays = small.source_arrays(small.Sizes(width=64), np.random.default_rng(9))
    change(arrays)
    small.save(tmp_path / "s", arrays, 30, small.Sizes(width=64).config())
    status, _, err = here(
        "convert", "--source", tmp_path / "s", "--bundle", tmp_path / "b", "--quantizer", quantizer
    )
    assert status == 0, err
    assert note in err
    findings = bundles.judge(tmp_path / "b", tmp_path / "s")
    of_numbers = {f.name for f in findings.errors} - FILES_LACKING
    assert of_numbers == set()
    controls = [t for n, t in open_bundle(tmp_path / "b").tensors.items() if is_control(n)]
    assert {tensor.dtype for tensor in controls} == {"F32"}


# small.py's sources have no tokenizer, encoding or generation_config.json.
FILES_LACKING = {"encoding-missing", "tokenizer-broken", "tokenizer-missing",
                 "tokenizer-config-broken", "generation-config-broken", "chat-template-missing",
                 "chat-template-file-missing",
                 "jang-config-group-size", "eos-wrong"}  # fmt: skip


def test_a_scale_that_is_no_power_of_two_is_refused(tmp_path):
    arrays = small.source_arrays(ODD_SIZES, np.random.default_rng(9))
    wide_scales(arrays)
    arrays["layers.0.attn.wkv.scale"][1][:] *= 1.5
    small.save(tmp_path / "s", arrays, 30, ODD_SIZES.config())
    line = refusal("convert", "--source", tmp_path / "s", "--bundle", tmp_path / "b")
    assert "layers.0.attn.wkv.scale: 1 F32 scales that are no power of two" in line


def test_shards_outside_the_index_are_ignored_with_a_note(tmp_path):
    arrays = small.source_arrays(ODD_SIZES, np.random.default_rng(9))
    small.save(tmp_path / "s", arrays, 30, ODD_SIZES.config())
    first = sorted((tmp_path / "s").glob("model-*.safetensors"))[0]
    shutil.copy(first, tmp_path / "s" / "a.safetensors")
    status, _, err = here("convert", "--source", tmp_path / "s", "--bundle", tmp_path / "b")
    assert status == 0, err
    assert "shards that the index does not name, ignored: a.safetensors" in err


def test_one_shard_needs_no_index(tmp_path):
    arrays = small.source_arrays(ODD_SIZES, np.random.default_rng(9))
    small.save(tmp_path / "s", arrays, 10**6, ODD_SIZES.config())
    (tmp_path / "s" / INDEX).unlink()
    (tmp_path / "s" / "model-00001-of-00001.safetensors").rename(tmp_path / "s" / SINGLE)
    must("convert", "--source", tmp_path / "s", "--bundle", tmp_path / "b")
    assert len(open_bundle(tmp_path / "b").tensors) > len(arrays)


def raw_codes(arrays: small.Arrays) -> str:
    """FP8 codes as BF16 numbers, without their scale."""
    name = "layers.1.attn.wq_b.weight"
    codes = arrays[name][1]
    del arrays["layers.1.attn.wq_b.scale"]
    values = round_to_dtype(E4M3[codes], "BF16").view(np.uint16).reshape(codes.shape)
    arrays[name] = "BF16", values
    return f"{name}: BF16 values that are all FP8 codes"


def constant_codes(arrays: small.Arrays) -> str:
    name = "layers.1.ffn.experts.2.w3.weight"
    arrays[name] = "I8", np.full_like(arrays[name][1], 0x22)
    return f"{name}: all sampled values are the same"


def huge_scales(arrays: small.Arrays) -> str:
    name = "layers.1.attn.wkv"
    arrays[f"{name}.scale"] = "F8_E8M0", arrays[f"{name}.scale"][1] + 8
    return f"{name}.weight: RMS"


@pytest.mark.parametrize("change", [raw_codes, constant_codes, huge_scales])
def test_values_that_cannot_be_weights_stop_convert_and_are_found_by_verify(change, tmp_path):
    sizes = small.Sizes(layers=4)
    arrays = small.source_arrays(sizes, np.random.default_rng(9))
    small.save(tmp_path / "good", arrays, 30, sizes.config())
    must("convert", "--source", tmp_path / "good", "--bundle", tmp_path / "b")
    words = change(arrays)
    small.save(tmp_path / "s", arrays, 30, sizes.config())
    line = refusal("convert", "--source", tmp_path / "s", "--bundle", tmp_path / "c")
    assert words in line
    assert not (tmp_path / "c").exists()
    findings = bundles.judge(tmp_path / "b", tmp_path / "s")
    assert "source-implausible" in findings
