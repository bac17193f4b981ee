"""TurboQuant: the bytes are jang's, in stacks that its loader takes; nothing is lost on the way."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
from conftest import NANO, ROOT, must

from dsv4.model.names import parse_expert
from dsv4.model.opening import open_bundle
from dsv4.storage.checkpoint import INDEX, SIDECAR
from dsv4.storage.shard import read_array
from dsv4.weights import fp4, turboquant
from dsv4.weights.affine import BadGroup
from dsv4.weights.synthetic import pack, random_weights, to_fp4

NEW = ROOT / ".toolchain" / "new" / "bin" / "python"
TURBO = ("--quantizer", "turboquant2")


def expert(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """FP4 codes uint8 (rows, columns / 2) and scale bytes uint8 (rows, columns / 32)."""
    sizes = 0.02 * np.exp(rng.normal(0, 0.5, (rows * columns // 32, 1)))
    halves, exponents = to_fp4(sizes * random_weights(rng, len(sizes), "normal"), "ceil")
    return (
        pack(halves).reshape(rows, columns // 2),
        (exponents + 127).astype(np.uint8).reshape(rows, columns // 32),
    )


def quantized(packed: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = np.empty((len(packed), packed.shape[1] // 8), np.uint32)
    norms = np.empty(len(packed), np.float16)
    turboquant.quantize(packed.reshape(-1), scales.reshape(-1), words.reshape(-1), norms)
    return words, norms


@pytest.mark.parametrize("shape", [(1, 32), (33, 96), (16, 1024), (50, 2048), (2048, 4096)])
def test_no_word_and_no_norm_differs_from_jangs(shape):
    linear = pytest.importorskip("jang_tools.turboquant.linear")
    packed, scales = expert(np.random.default_rng(shape), *shape)
    words, norms = quantized(packed, scales)
    theirs = linear.tq_quantize_weight(fp4.decode(packed, scales, ""), bits=2)
    assert np.array_equal(words, theirs["packed"])
    assert np.array_equal(norms.view(np.uint16), theirs["norms"].view(np.uint16))


def test_what_f16_cannot_hold_stops_or_is_counted():
    packed, scales = np.full((2, 16), 0x77, np.uint8), np.array([[120], [255]], np.uint8)
    with pytest.raises(BadGroup, match="255"):
        quantized(packed, scales)
    scales[1] = 141  # norm: 6 · 2^14 · √32
    with pytest.raises(BadGroup, match="norm") as stopped:
        quantized(packed, scales)
    assert stopped.value.group == 1
    words, norms = np.empty(4, np.uint32), np.empty(2, np.float16)
    scales[1] = 90
    tally = turboquant.quantize(packed.reshape(-1), scales.reshape(-1), words, norms)
    assert (tally.underflows, norms[1]) == (1, 0)


@pytest.fixture(scope="module")
def turbo(tmp_path_factory):
    """The nano in TurboQuant, converted."""
    bundle = tmp_path_factory.mktemp("turbo") / "bundle"
    must("convert", "--source", NANO, "--bundle", bundle, *TURBO)
    return bundle


def assert_same_tensors(one, other, but=()):
    ours, theirs = open_bundle(one).tensors, open_bundle(other).tensors
    for name in (set(ours) | set(theirs)) - set(but):
        mine, its = ours[name], theirs[name]
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape), name
        assert read_array(mine).tobytes() == read_array(its).tobytes(), name


def test_a_bundle_is_what_jangs_converter_writes(turbo, tmp_path):
    """But for the head, which stays as it is, and APE, which this recipe has in F16."""
    command = [NEW, "-m", "jang_tools.dsv4.convert_dsv4_jangtq", "--src", NANO]
    options = ["--dst", tmp_path / "jang", "--profile", "2", "--variant", "std"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head = [f"head.{part}" for part in ("weight", "scales", "biases")]
    ape = [name for name in open_bundle(turbo).tensors if name.endswith(".ape")]
    assert_same_tensors(turbo, tmp_path / "jang", [*head, *ape])
    assert (turbo / SIDECAR).read_bytes() == (tmp_path / "jang" / SIDECAR).read_bytes()
    for file, ours_alone in (
        ("config.json", {"requantize", "eos_token_id"}),
        ("jang_config.json", {"chat", "source_model", "quantization"}),
    ):
        ours, theirs = (json.loads((at / file).read_text()) for at in (turbo, tmp_path / "jang"))
        assert {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)} <= ours_alone
    assert ours["quantization"] == theirs["quantization"] | {"group_size": 32}


def test_requantized_it_is_the_same_and_back_again_nothing_is_lost(turbo, tmp_path):
    """Shards so small that some hold nothing but experts: they go, and half-way nothing is lost."""
    bundle, whole = tmp_path / "bundle", tmp_path / "whole"
    must("convert", "--source", NANO, "--bundle", bundle, "--shard-bytes", "60000")
    shutil.copytree(bundle, whole)
    options = ("--source", NANO, "--bundle", bundle)
    must("requantize", *options, *TURBO, "--part", "2/3")  # experts are gone, stacks not yet here
    halfway = shutil.copytree(bundle, tmp_path / "halfway")
    must("requantize", *options, *TURBO)
    assert_same_tensors(bundle, turbo)
    opened = open_bundle(bundle)
    assert any(".switch_mlp." in name for name in opened.shards[min(opened.shards)].tensors)
    on_disk = {path.name for path in bundle.glob("*.safetensors")}
    assert on_disk == {*opened.weight_map.values(), SIDECAR}
    assert len(on_disk) < len(list(whole.glob("*.safetensors")))
    assert "nothing to do" in must("requantize", *options, *TURBO)
    for other in (bundle, halfway):
        must("requantize", "--source", NANO, "--bundle", other)
        assert_same_tensors(other, whole)
        assert not (other / SIDECAR).exists()
        config = json.loads((other / "config.json").read_text())
        assert config == json.loads((whole / "config.json").read_text())


def test_a_shard_that_was_emptied_and_not_removed_is_no_stranger(turbo, tmp_path):
    bundle = shutil.copytree(turbo, tmp_path / "bundle")
    metadata = dict(next(iter(open_bundle(bundle).shards.values())).metadata)
    header = json.dumps({"__metadata__": metadata}).encode()
    emptied = bundle / "model-00002-of-00002.safetensors"
    emptied.write_bytes(len(header).to_bytes(8, "little") + header)
    must("requantize", "--source", NANO, "--bundle", bundle, *TURBO)
    assert not emptied.exists()


def test_mtps_experts_are_single_and_all_others_stacked(turbo):
    names = set(json.loads((turbo / INDEX).read_text())["weight_map"])
    assert {parse_expert(name)[0] for name in names if parse_expert(name)} == {"mtp"}
    bits = {name: read_array(tensor)[0] for name, tensor in open_bundle(turbo).tensors.items()
            if name.endswith(".tq_bits")}  # fmt: skip
    assert set(bits.values()) == {2}
