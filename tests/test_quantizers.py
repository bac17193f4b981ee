"""The quantizers beside mlx's: what they hold, what labels they get, what a change of them does."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import bundles
import ml_reference
import mlx.core as mx
import numpy as np
import pytest
import small
from conftest import must, script

from dsv4.errors import UserError
from dsv4.model import labels
from dsv4.model.load import expert_bases, expert_labels, open_bundle
from dsv4.model.source import open_source
from dsv4.quantization.affine_table import BadGroup
from dsv4.quantization.formats import get_quantizer
from dsv4.storage.checkpoint import check_index
from dsv4.storage.safetensors_file import PendingTensor, read_array, write_shard

NAMES = ("mlx", "affine4g32", "mxfp4", "lossless")  # turboquant2: test_turboquant.py
# Quantizers that are no more: what is like their bundles, and the name that these record.
GONE = {"optimal": "affine4g32", "exact5": "affine5g32", "affine3g64-mx": "affine3g64"}


def requantize(source: Path, bundle: Path, name: str, *options: str) -> subprocess.CompletedProcess:
    folders = ("--source", source, "--bundle", bundle)
    return script("requantize", *folders, "--quantizer", name, *options)


def digests(bundle: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.glob("*.*")}


def encode(name: str, packed: np.ndarray, exponents: np.ndarray) -> dict[str, np.ndarray]:
    """One matrix, packed (out, in/2) and exponents (out, in/32), as the parts of a quantizer."""
    quantizer = get_quantizer(name)
    sizes = {"U32": (4, np.uint32), "F16": (2, np.float16), "U8": (1, np.uint8)}
    parts = labels.parts_of(quantizer.label, len(packed), 2 * packed.shape[1])
    flat = {
        p: np.empty(int(np.prod(shape)) * sizes[d][0], np.uint8) for p, (d, shape) in parts.items()
    }
    quantizer.encode(packed.view(np.uint8).reshape(-1), exponents.reshape(-1), flat)
    return {p: flat[p].view(sizes[d][1]).reshape(shape) for p, (d, shape) in parts.items()}


def decode(label: dict, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The matrix as MLX decodes it; F16 scales are widened first, as a float32 model has them."""
    arrays = [mx.array(parts["weight"]), mx.array(parts["scales"])]
    if "biases" in parts:
        arrays = [arrays[0], *(mx.array(parts[p].astype(np.float32)) for p in ("scales", "biases"))]
    return np.array(mx.dequantize(*arrays, **label, stream=mx.cpu).astype(mx.float32))


def test_every_value_at_every_exponent_comes_back_exactly() -> None:
    name, exponents = "mxfp4", np.arange(104, 141, dtype=np.uint8)[:, None]
    packed = np.tile(np.arange(0, 256, 17, dtype=np.uint8), (len(exponents), 1))
    packed[::2] = packed[::2, ::-1]
    decoded = decode(get_quantizer(name).label, encode(name, packed, exponents))
    assert np.array_equal(decoded, ml_reference.decode(packed, exponents))


def test_random_matrices_come_back_exactly() -> None:
    name, rng = "mxfp4", np.random.default_rng(11)
    packed = rng.integers(0, 256, (96, 80)).astype(np.uint8)
    exponents = rng.integers(104, 141, (96, 5)).astype(np.uint8)
    decoded = decode(get_quantizer(name).label, encode(name, packed, exponents))
    assert np.array_equal(decoded, ml_reference.decode(packed, exponents))


@pytest.mark.parametrize("name", NAMES)
def test_an_exponent_of_255_stops_every_quantizer(name: str) -> None:
    with pytest.raises(BadGroup, match="255"):
        encode(name, np.zeros((1, 16), np.uint8), np.array([[255]], np.uint8))


def assert_made_with(name: str, source: Path, bundle: Path) -> None:
    """Every expert holds what the quantizer gives; index, labels and record agree."""
    opened, origin = open_bundle(bundle), open_source(source)
    check_index(opened, "test")
    label = get_quantizer(name).label
    assert all(one == label for one in expert_labels(opened).values())
    assert labels.recorded_quantizer(opened.config) == name
    for base in expert_bases(origin):
        expected = encode(
            name,
            read_array(origin.tensors[f"{base}.weight"]).view(np.uint8),
            read_array(origin.tensors[f"{base}.scale"]),
        )
        held = {n.rpartition(".")[2] for n in opened.tensors if n.startswith(f"{base}.")}
        assert held == set(expected), base
        for part, array in expected.items():
            tensor = opened.tensors[f"{base}.{part}"]
            assert tensor.shape == array.shape
            assert read_array(tensor).tobytes() == array.tobytes(), tensor.name
        assert opened.config["quantization"][base] == label


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_bundle_becomes_what_the_quantizer_gives(tmp_path: Path, name: str) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(), seed=21)
    done = requantize(source, bundle, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert_made_with(name, source, bundle)
    before = digests(bundle)
    assert "nothing to do" in requantize(source, bundle, name).stdout
    assert digests(bundle) == before


def test_a_change_of_quantizer_starts_from_the_source_again(tmp_path: Path) -> None:
    source, bundle, expected = small.make(tmp_path, small.Sizes(), seed=22)
    before = ""
    for name in ("affine5g32", "mxfp4", "affine4g32", "mlx"):
        done = requantize(source, bundle, name)
        said = f"holds experts as {before}; QUANTIZER={name} asks for" if before else ""
        assert (done.returncode, done.stderr.count("\n")) == (0, bool(before)), name
        assert said in done.stderr
        before = name
        assert_made_with(name, source, bundle)
    opened = open_bundle(bundle)
    for name, (_, array) in expected.items():
        assert read_array(opened.tensors[name]).tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize(("first", "then"), [("mlx", "mxfp4"), ("mxfp4", "affine5g32")])
def test_a_change_that_was_interrupted_goes_on(tmp_path: Path, first: str, then: str) -> None:
    sizes = small.Sizes(bundle_shard=5)
    source, bundle, _ = small.make(tmp_path, sizes, seed=23)
    assert requantize(source, bundle, first).returncode == 0
    assert requantize(source, bundle, then, "--part", "2/3").returncode == 0
    done = requantize(source, bundle, then)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert f"; QUANTIZER={then} asks for" in done.stderr
    assert_made_with(then, source, bundle)


def test_a_change_of_mind_in_the_middle_leads_back(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(bundle_shard=5), seed=24)
    assert requantize(source, bundle, "affine5g32").returncode == 0
    assert requantize(source, bundle, "mxfp4", "--part", "1/2").returncode == 0
    assert requantize(source, bundle, "affine5g32").returncode == 0
    assert_made_with("affine5g32", source, bundle)


def test_another_source_still_stops_whatever_the_quantizer(tmp_path: Path) -> None:
    source, bundle, _ = small.make(tmp_path / "one", small.Sizes(), seed=25)
    other, _, _ = small.make(tmp_path / "two", small.Sizes(), seed=26)
    assert requantize(source, bundle, "mlx").returncode == 0
    before = digests(bundle)
    done = requantize(other, bundle, "affine5g32")
    assert done.returncode == 1
    assert "a shard made from source" in done.stderr
    assert digests(bundle) == before


def test_mxfp4_leaves_stock_shards_of_experts_alone(tmp_path: Path) -> None:
    sizes = small.Sizes(bundle_shard=4)
    source, bundle, _ = small.make(tmp_path, sizes, seed=27)
    before = digests(bundle)
    assert requantize(source, bundle, "mxfp4").returncode == 0
    after = digests(bundle)
    opened = open_bundle(bundle)
    for file, shard in opened.shards.items():
        if all(".experts." in name for name in shard.tensors):
            assert before[file] == after[file], file
    assert any(before[file] == after[file] for file in opened.shards)
    assert_made_with("mxfp4", source, bundle)


def test_mxfp4_stops_at_stock_bytes_of_another_source(tmp_path: Path) -> None:
    source, _, _ = small.make(tmp_path / "one", small.Sizes(bundle_shard=4), seed=28)
    _, bundle, _ = small.make(tmp_path / "two", small.Sizes(bundle_shard=4), seed=29)
    done = requantize(source, bundle, "mxfp4")
    assert done.returncode == 1
    assert "other values than the source's" in done.stderr


def test_fp4_bytes_of_a_stock_bundle_get_no_label(tmp_path: Path) -> None:
    _, bundle, _ = small.make(tmp_path, small.Sizes(), seed=30)
    with pytest.raises(UserError, match="FP4 bytes"):
        expert_labels(open_bundle(bundle))


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_fits_its_own_label_and_no_other(tmp_path: Path, name: str) -> None:
    source, bundle, _ = small.make(tmp_path, small.Sizes(layers=1, experts=1), seed=31)
    assert requantize(source, bundle, name).returncode == 0
    config = json.loads((bundle / "config.json").read_text())
    base = "layers.0.ffn.experts.0.w1"
    stored = labels.stored_label(open_bundle(bundle).tensors, base, config)
    assert stored == config["quantization"][base] == get_quantizer(name).label
    same = {"mlx", "affine4g32"} if name in ("mlx", "affine4g32") else {"mxfp4", "lossless"}
    assert {other for other in NAMES if get_quantizer(other).label == stored} == same


@pytest.mark.parametrize("name", NAMES)
def test_verify_passes_every_quantizer_and_fails_it_under_anothers_label(
    source: Path, stock: Path, tmp_path: Path, name: str
) -> None:
    bundle = shutil.copytree(stock, tmp_path / "bundle")
    must("requantize", "--source", source, "--bundle", bundle, "--quantizer", name)
    must("finalize", "--source", source, "--bundle", bundle)
    must("patch", "--bundle", bundle)
    options = ("--bundle", bundle, "--source", source, "--without-loader")
    assert "passed" in must("verify", *options)
    config = json.loads((bundle / "config.json").read_text())
    other = labels.affine_label(5)
    labelled = {key: other if ".experts." in key else value
                for key, value in config["quantization"].items()}  # fmt: skip
    config["quantization"] = labelled
    (bundle / "config.json").write_text(json.dumps(config))
    assert script("verify", *options, "--level", "1").returncode == 1


@pytest.fixture(scope="module", params=GONE)
def gone(request, source: Path, stock: Path, tmp_path_factory) -> tuple[Path, str]:
    """A bundle whose shards and config.json record a quantizer that this version does not have."""
    bundle = shutil.copytree(stock, tmp_path_factory.mktemp("gone") / "bundle")
    name = request.param
    must("requantize", "--source", source, "--bundle", bundle, "--quantizer", GONE[name])
    must("finalize", "--source", source, "--bundle", bundle)
    must("patch", "--bundle", bundle)
    for file, shard in open_bundle(bundle).shards.items():
        arrays = [
            PendingTensor(
                t.name, t.dtype, t.shape, functools.partial(lambda a: [a], read_array(t).copy())
            )
            for t in shard.tensors.values()
        ]
        if "requantize_quantizer" in shard.metadata:
            mark = {"requantize_quantizer": name, "requantize_table": "0123456789abcdef"}
            write_shard(bundle / file, arrays, shard.metadata | mark)
    config = json.loads((bundle / "config.json").read_text())
    config["requantize"] = {"quantizer": name, "table": "0123456789abcdef"}
    (bundle / "config.json").write_text(json.dumps(config))
    return bundle, name


def test_a_bundle_of_a_quantizer_that_is_gone_is_judged_by_its_errors(gone, source, tmp_path):
    bundle, name = gone
    assert bundles.judge(bundle, None, level=1).names == set()
    findings = bundles.judge(bundle, source)
    assert (findings.names, findings.errors) == ({"quantizer-unknown"}, [])
    assert name in bundles.places(findings, "quantizer-unknown")
    done = script("verify", "--bundle", bundle, "--source", source, "--without-loader")
    assert done.returncode == 0
    assert "a quantizer that this version does not have" in done.stdout + done.stderr
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    arrays = bundles.load(damaged)
    arrays["layers.1.ffn.experts.3.w1.scales"][1].view(np.float16)[:] *= 2
    metadata = next(iter(open_bundle(damaged).shards.values())).metadata
    bundles.save(damaged, arrays, 1, metadata)
    assert any("layers.1.ffn.experts.3.w1" in str(f) for f in bundles.judge(damaged, source).errors)


def test_a_bundle_of_a_quantizer_that_is_gone_is_kept_or_made_anew(gone, source, tmp_path):
    bundle, _ = gone
    options = ("--source", source, "--quantizer", "mlx")
    assert "nothing to repair" in must("repair", "--bundle", bundle, *options, "--without-loader")
    half = shutil.copytree(bundle, tmp_path / "half")
    arrays, shards = bundles.load(half), open_bundle(half).shards
    del arrays["layers.1.ffn.experts.3.w1.scales"]
    bundles.save(half, arrays, 1, next(iter(shards.values())).metadata)
    refused = script("repair", "--bundle", half, *options, "--without-loader")
    assert refused.returncode == 1
    assert "; make requantize to make every expert" in refused.stderr
    anew = shutil.copytree(bundle, tmp_path / "anew")
    must("requantize", "--bundle", anew, *options)
    must("patch", "--bundle", anew)
    assert bundles.judge(anew, source).names == set()
