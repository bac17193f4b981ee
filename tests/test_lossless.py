"""QUANTIZER=lossless: the source's own numbers, under labels that every runtime finds.

Catches: one changed bit of any tensor, a rounded number under the name of lossless, a label that
lacks under one of the names, NaN in the source's FP8, a header whose length depends
on the values, a run that decides anew after a kill, a way back that is not one.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
from bundles import Arrays, edit_json, flip, judge, load, places
from conftest import made_once, must, refusal
from test_low_disk import Place, files, hub, origin  # noqa: F401

from dsv4.conversion.lossless import RECORD, f16_overflow
from dsv4.conversion.shard_metadata import converted_by
from dsv4.model.bundle_tensors import plan_shards
from dsv4.model.labels import MXFP4, MXFP8
from dsv4.model.load import open_bundle
from dsv4.model.source import open_source
from dsv4.quantization import affine_table
from dsv4.quantization.formats import get_quantizer, with_bf16_overflow
from dsv4.storage.disk_space import staging_folder
from dsv4.storage.safetensors_file import read_array, read_shard
from dsv4.verification.checks.runtimes import recognize_stack, refusal_reason, runtime_verdicts
from dsv4.verification.scan import scan

LOSSLESS = ("--quantizer", "lossless")
MLX = ("--quantizer", "mlx")
FP8 = "layers.1.attn.wq_b"
PATHS = (
    FP8,
    "model.layers.1.self_attn.wq_b",
    "language_model.model.layers.1.attn.wq_b",
    "layers.2.ffn.shared_experts.w1",
    "model.layers.2.mlp.shared_experts.gate_proj",
    "language_model.model.layers.2.ffn.shared_experts.gate_proj",
    "mtp.0.e_proj",
)


@pytest.fixture(scope="session")
def lossless(source, tmp_path_factory) -> Path:
    """A whole lossless bundle of the random source, after every stage."""

    def make(folder: Path) -> None:
        making = folder.with_name("lossless-making")
        must("convert", "--source", source, "--bundle", making, *LOSSLESS)
        must("finalize", "--source", source, "--bundle", making)
        must("patch", "--source", source, "--bundle", making)
        making.rename(folder)

    return made_once(tmp_path_factory, "lossless", make)


@pytest.fixture
def copy(lossless, tmp_path) -> Path:
    return shutil.copytree(lossless, tmp_path / "bundle")


# --- A decoder of its own, number by number -----------------------------------------------------

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def e4m3(code: int) -> float:
    """S EEEE MMM, bias 7; without exponent a multiple of 2^-9."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


FP8_VALUES = np.array([e4m3(code) for code in range(256)])
FP4_VALUES = np.array([s * v for s in (1.0, -1.0) for v in E2M1])


def powers(exponents: np.ndarray) -> np.ndarray:
    return 2.0 ** (exponents.astype(np.int64) - 127)


def decoded(arrays: Arrays, name: str) -> np.ndarray:
    """A tensor of source or bundle in float64, from its bytes."""
    dtype, array = arrays[name]
    base = name.removesuffix(".weight")
    if f"{base}.scales" in arrays:
        codes = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1)
        scale = powers(arrays[f"{base}.scales"][1])
        four = codes.shape[1] == 16 * scale.shape[1]
        values = fp4(codes) if four else FP8_VALUES[codes]
        return values * scale.repeat(32, axis=1)
    if dtype == "I8":
        return fp4(array.view(np.uint8)) * powers(arrays[f"{base}.scale"][1]).repeat(32, axis=1)
    if dtype == "F8_E4M3":
        rows, columns = array.shape
        blocks = powers(arrays[f"{base}.scale"][1]).repeat(128, axis=0).repeat(128, axis=1)
        return FP8_VALUES[array.view(np.uint8)] * blocks[:rows, :columns]
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64) if dtype[0] == "F" else array


def fp4(codes: np.ndarray) -> np.ndarray:
    return FP4_VALUES[np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)]


def load_source(folder: Path) -> Arrays:
    return {n: (t.dtype, read_array(t)) for n, t in open_source(folder).tensors.items()}


def test_every_number_is_the_source_s_sign_of_zero_included(source, lossless):
    given, made = load_source(source), load(lossless)
    for name in (name for name in given if not name.endswith(".scale")):
        one, other = decoded(given, name), decoded(made, name)
        assert np.array_equal(one, other), name
        assert np.array_equal(np.signbit(one), np.signbit(other)), name
    assert len(made) == len(given)  # a scale for each weight that has one, and nothing else


def test_bf16_becomes_f16_where_each_value_is_one_and_nowhere_else(source, lossless):
    given, made, kept = load_source(source), load(lossless), 0
    for name, (dtype, array) in given.items():
        if dtype == "BF16":
            values = (array.astype(np.uint32) << 16).view(np.float32)
            exact = (values.astype(np.float16) == values).all()
            assert made[name][0] == ("F16" if exact else "BF16"), name
            kept += not exact
        elif dtype in ("F32", "I64"):
            assert made[name][0] == dtype
    assert kept  # both cases occur


def test_of_all_bf16_numbers_those_beyond_f16_are_counted(source):
    bits = np.arange(1 << 16).astype(np.uint16)
    finite = bits[(bits >> 7 & 0xFF) != 0xFF]
    values = (finite.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        expected = int((values.astype(np.float16) != values).sum())
    tensor = next(iter(open_source(source).tensors.values()))
    assert f16_overflow(finite.view(np.uint8), tensor) == expected


def test_sizes_do_not_depend_on_what_the_values_decide(source, lossless):
    tensors = open_source(source).tensors
    size = sum(path.stat().st_size for path in lossless.glob("*.safetensors"))
    every = dict.fromkeys((n for n, t in tensors.items() if t.dtype == "BF16"), 1)
    plain = get_quantizer("lossless")
    for quantizer in (plain, with_bf16_overflow(plain, every)):
        shards = plan_shards(tensors, quantizer.form, converted_by(None, quantizer))
        assert sum(shard.size for shard in shards) == size


# --- verify ------------------------------------------------------------


def test_verify_finds_nothing_and_certifies(source, lossless, tmp_path):
    out = tmp_path / "verify.json"
    said = must("verify", "--bundle", lossless, "--source", source, "--without-loader",
                "--json", out)  # fmt: skip
    assert "lossless: each one is the source's" in said
    result = json.loads(out.read_text())
    assert not result["findings"]
    assert {o["stored_as"] for o in result["errors"]["others"]} >= {"mxfp8 8-bit", "F16", "BF16"}
    assert all(o["relative_rms"] == 0 for o in result["errors"]["others"])


@pytest.mark.parametrize(
    ("name", "byte", "fault", "where"),
    [
        (f"{FP8}.weight", 70, "module-differs", "column 70"),
        (f"{FP8}.scales", 1, "module-differs", "group 1"),
        ("layers.0.ffn.experts.1.w1.weight", 3, "expert-differs", "row 0"),
        ("norm.weight", 4, "passthrough-differs", "element [2]"),
        ("embed.weight", 6, "module-differs", "element [0, 3]"),
        ("hc_head_fn", 0, "control-differs", "element [0, 0]"),
    ],
)
def test_one_flipped_bit_is_named(source, copy, name, byte, fault, where):
    flip(copy, name, byte)
    findings = judge(copy, source)
    assert fault in findings
    assert name.removesuffix(".scales").removesuffix(".weight") in places(findings, fault)
    assert where in places(findings, fault)


def test_a_rounded_number_is_not_lossless(source, tmp_path):
    """Marked lossless, but with the 8-bit matrices of mlx."""
    must("convert", "--source", source, "--bundle", tmp_path / "b", "--quantizer", "mxfp4")
    shard = next((tmp_path / "b").glob("*.safetensors"))
    data = shard.read_bytes()
    old = b'"requantize_quantizer":"mxfp4"'
    new = b'"requantize_quantizer":"lossless"'
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(old, new).rstrip()
    header += b" " * (-len(header) % 8)
    shard.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert "rounded" in judge(tmp_path / "b", source)


@pytest.mark.parametrize("path", PATHS)
def test_a_missing_label_is_found_and_repair_adds_it(source, copy, path):
    config = copy / "config.json"
    right, shards = config.read_bytes(), {p: p.stat().st_mtime_ns for p in copy.glob("*.safet*")}
    edit_json(config, lambda c: c["quantization"].pop(path))
    # The top level says mxfp8, so nothing goes wrong yet: a warning, no error.
    assert judge(copy, None, level=1).names == {"label-at-top-only"}
    affine_top = {"group_size": 32, "bits": 8, "mode": "affine"}
    edit_json(config, lambda c: c["quantization"].update(affine_top))
    assert "scales-without-label" in judge(copy, None, level=1)
    assert path in places(judge(copy, None, level=1), "scales-without-label")
    if path == PATHS[1]:  # repair takes seconds
        must("repair", "--bundle", copy, "--without-loader")
        assert json.loads(config.read_bytes()) == json.loads(right)
        assert shards == {p: p.stat().st_mtime_ns for p in copy.glob("*.safet*")}


def test_labels_stand_under_every_name(lossless):
    labels = json.loads((lossless / "config.json").read_text())["quantization"]
    assert {key: labels[key] for key in PATHS} == dict.fromkeys(PATHS, MXFP8)
    assert labels["layers.0.ffn.experts.0.w1"] == MXFP4
    assert {key: labels[key] for key in MXFP8} == MXFP8
    assert "embed" not in labels


def test_old_vmlx_is_refused_and_no_other(lossless):
    old = {"vmlx": "1.3.97", "jang": "2.5.9", "mlx": "0.31.2", "mlx-lm": "0.31.2"}
    assert refusal_reason(old, "lossless")
    assert not refusal_reason(old, "mlx")
    assert not refusal_reason(old | {"vmlx": "1.6.81"}, "lossless")
    assert not recognize_stack(old, quantizer="lossless")[0]
    findings = judge(lossless, None, level=1)
    loads = runtime_verdicts(scan(lossless, findings), findings)
    assert loads["vMLX 1.6.81"] == loads["mlx-vlm 0.7.10"] == ""
    assert "crashes" in loads["vMLX 1.3.97, loader patched"]


# --- What stops a run ------------------------------------------------------------


def poke(source: Path, name: str, byte: int, value: int) -> None:
    tensor = open_source(source).tensors[name]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + byte)
        file.write(bytes([value]))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [("weight", 0x7F, "code 0x7f"), ("weight", 0xFF, "code 0xff"), ("scale", 255, "byte 0xff")],
)
def test_a_nan_in_fp8_stops_the_run(source_copy, tmp_path, part, value, said):
    poke(source_copy, f"{FP8}.{part}", 1, value)
    line = refusal("convert", "--source", source_copy, "--bundle", tmp_path / "b", *LOSSLESS)
    assert f"{FP8}.weight" in line
    assert said in line
    assert not (tmp_path / "b").exists()


def test_scale_bytes_that_bf16_rounds_are_named(source_copy, tmp_path):
    poke(source_copy, f"{FP8}.scale", 0, 2)
    said = must("convert", "--source", source_copy, "--bundle", tmp_path / "b", *LOSSLESS)
    assert f"(1 in {FP8}.scale)" in said


# --- There and back ------------------------------------------------------------


def test_requantize_leads_to_it_and_back_to_the_same_bytes(source, lossless, tmp_path):
    bundle = tmp_path / "bundle"
    must("convert", "--source", source, "--bundle", bundle)
    must("finalize", "--source", source, "--bundle", bundle)
    must("patch", "--source", source, "--bundle", bundle)
    before = {p.name: p.read_bytes() for p in bundle.iterdir() if p.is_file()}
    must("requantize", "--source", source, "--bundle", bundle, *LOSSLESS)
    for path in (path for path in lossless.iterdir() if path.is_file()):
        assert (bundle / path.name).read_bytes() == path.read_bytes(), path.name
    must("requantize", "--source", source, "--bundle", bundle, *MLX)
    assert {p.name: p.read_bytes() for p in bundle.iterdir() if p.is_file()} == before


def same_arrays(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(
        (dtype, array.tobytes()) == (other[name][0], other[name][1].tobytes())
        for name, (dtype, array) in one.items()
    )


def test_a_change_that_was_interrupted_goes_on_both_ways(source, lossless, tmp_path):
    bundle, both = tmp_path / "bundle", ("--source", source, "--bundle", tmp_path / "bundle")
    must("convert", *both, "--shard-bytes", "9e5")
    assert len(open_bundle(bundle).shards) > 4
    before = load(bundle)
    for n, (options, wanted) in enumerate(((LOSSLESS, load(lossless)), (MLX, before))):
        must("requantize", *both, *options, "--part", f"{n + 1}/2")
        must("requantize", *both, *options)
        assert same_arrays(load(bundle), wanted)
    must("requantize", *both, *LOSSLESS, "--part", "1/2")
    must("requantize", *both, *MLX)  # a change of mind
    assert same_arrays(load(bundle), before)
    assert not (bundle / RECORD).exists()


def test_a_stock_bundle_becomes_lossless(tmp_path):
    source, bundle, _ = small.make(tmp_path, small.Sizes(bundle_shard=6), seed=61)
    must("requantize", "--source", source, "--bundle", bundle, *LOSSLESS)
    given, made = load_source(source), load(bundle)
    for name in (name for name in given if not name.endswith(".scale")):
        assert np.array_equal(decoded(given, name), decoded(made, name)), name


def test_a_killed_conversion_goes_on_with_what_was_decided(source, lossless, tmp_path):
    """Some shards are there, with the record: the same bytes, and no value is looked at again."""
    whole, bundle = tmp_path / "whole", tmp_path / "bundle"
    options = ("--source", source, *LOSSLESS, "--shard-bytes", "9e5")
    must("convert", "--bundle", whole, *options)
    must("convert", "--bundle", bundle, *options, "--dry-run")
    place = staging_folder(bundle)
    place.mkdir()
    for path in sorted(whole.glob("*.safetensors"))[::2]:
        shutil.copy2(path, place / path.name)
    times = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    must("convert", "--bundle", bundle, *options)
    for path in whole.iterdir():
        if path.is_file():
            assert (bundle / path.name).read_bytes() == path.read_bytes(), path.name
    assert all((bundle / name).stat().st_mtime_ns == at for name, at in times.items())
    assert not (bundle / RECORD).exists()


def test_low_disk_makes_the_same_bundle(origin, hub, tmp_path):  # noqa: F811
    wanted = tmp_path / "wanted"
    must("convert", "--source", origin, "--bundle", wanted, *LOSSLESS, "--shard-bytes", "6e5")
    place = Place(tmp_path / "low", hub)
    place.must("download")
    place.must("convert", *LOSSLESS)
    assert not list(place.source.glob("*.safetensors"))
    for path in wanted.glob("*.safetensors"):
        assert (place.bundle / path.name).read_bytes() == path.read_bytes()


# --- The table of mlx is the same on every machine ----------------------------------------------


def test_the_sign_of_a_nan_does_not_enter_the_digest(monkeypatch):
    ask, digest = affine_table._ask_mlx, affine_table.build_table().digest

    def flipped(probes):
        scales, *rest = ask(probes)
        return np.where(np.isnan(scales), -scales, scales), *rest

    assert np.isnan(ask(affine_table._probes()[1][0])[0]).any()
    monkeypatch.setattr(affine_table, "_ask_mlx", flipped)
    assert affine_table.build_table().digest == digest


def test_the_marks_tell_the_quantizer(lossless):
    shards = [read_shard(path) for path in lossless.glob("*.safetensors")]
    assert {s.metadata["requantize_quantizer"] for s in shards} == {"lossless"}
