"""TurboQuant: the bytes are jang's, in stacks that vMLX reads; nothing is lost on the way.

Catches: a code or norm that is not jang's; another bundle than its converter writes; an expert lost
between stacks and single ones; signs, levels, codes or norms that verify lets pass; what repair
leaves unsaid; a bundle that vMLX's real server does not answer with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import bundles
import logits
import matrix
import numpy as np
import pytest
from bundles import edit_json
from conftest import NANO, ROOT, made_once, must
from here import must as here
from test_layouts import mended

from dsv4.acceptance import nano
from dsv4.acceptance.client import Endpoint, ask_question
from dsv4.model.load import open_bundle
from dsv4.model.names import parse_expert
from dsv4.quantization import fp4, turboquant
from dsv4.quantization.affine_table import BadGroup
from dsv4.quantization.synthetic import pack, random_weights, to_fp4
from dsv4.storage.backup import FOLDER
from dsv4.storage.checkpoint import INDEX, SIDECAR
from dsv4.storage.safetensors_file import read_array
from dsv4.toolchain.server import NAME, running_server

NEW = ROOT / ".toolchain" / "new" / "bin" / "python"
# As jang's converter: MTP's experts in TurboQuant too. test_mtp.py has them as in the source.
AS_EXPERTS = ("--mtp", "as-experts")
TURBO = ("--quantizer", "turboquant2", *AS_EXPERTS)


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


@pytest.mark.parametrize("shape", [(1, 32), (33, 96), (16, 1024), (200, 2048), (200, 4096)])
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
    here("convert", "--source", NANO, "--bundle", bundle, *TURBO)
    return bundle


@pytest.fixture(scope="module")
def finished(turbo, tmp_path_factory):
    """The same after finalize and patch."""
    bundle = shutil.copytree(turbo, tmp_path_factory.mktemp("finished") / "bundle")
    here("finalize", "--source", NANO, "--bundle", bundle)
    here("patch", "--bundle", bundle)
    return bundle


def assert_same_tensors(one, other, but=()):
    ours, theirs = open_bundle(one).tensors, open_bundle(other).tensors
    for name in (set(ours) | set(theirs)) - set(but):
        mine, its = ours[name], theirs[name]
        assert (mine.dtype, mine.shape) == (its.dtype, its.shape), name
        assert read_array(mine).tobytes() == read_array(its).tobytes(), name


def specimen(folder: Path) -> None:
    must("lab/specimens", "--out", folder, "--python", NEW, "jangtq-2")


def test_a_bundle_is_what_jangs_converter_writes(turbo, tmp_path_factory):
    """But for the head, which stays as it is, and APE, which this recipe has in F16."""
    jang = made_once(tmp_path_factory, "of-jangtq-2", specimen) / "jangtq-2"
    head = [f"head.{part}" for part in ("weight", "scales", "biases")]
    ape = [name for name in open_bundle(turbo).tensors if name.endswith(".ape")]
    assert_same_tensors(turbo, jang, [*head, *ape])
    assert (turbo / SIDECAR).read_bytes() == (jang / SIDECAR).read_bytes()
    for file, ours_alone in (
        ("config.json", {"requantize", "eos_token_id"}),
        ("jang_config.json", {"chat", "source_model", "quantization"}),
    ):
        ours, theirs = (json.loads((at / file).read_text()) for at in (turbo, jang))
        assert {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)} <= ours_alone
    assert ours["quantization"] == theirs["quantization"] | {"group_size": 32}


def test_requantized_it_is_the_same_and_back_again_nothing_is_lost(turbo, tmp_path):
    """Shards so small that some hold nothing but experts: they go, and half-way nothing is lost."""
    bundle, whole = tmp_path / "bundle", tmp_path / "whole"
    here("convert", "--source", NANO, "--bundle", bundle, "--shard-bytes", "60000", *AS_EXPERTS)
    shutil.copytree(bundle, whole)
    options = ("--source", NANO, "--bundle", bundle)
    here("requantize", *options, *TURBO, "--part", "2/3")  # experts are gone, stacks not yet here
    halfway = shutil.copytree(bundle, tmp_path / "halfway")
    here("requantize", *options, *TURBO)
    assert_same_tensors(bundle, turbo)
    opened = open_bundle(bundle)
    assert any(".switch_mlp." in name for name in opened.shards[min(opened.shards)].tensors)
    on_disk = {path.name for path in bundle.glob("*.safetensors")}
    assert on_disk == {*opened.weight_map.values(), SIDECAR}
    assert len(on_disk) < len(list(whole.glob("*.safetensors")))
    assert "nothing to do" in here("requantize", *options, *TURBO)
    for other in (bundle, halfway):
        here("requantize", "--source", NANO, "--bundle", other, "--quantizer", "mlx")
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
    here("requantize", "--source", NANO, "--bundle", bundle, *TURBO)
    assert not emptied.exists()


@pytest.mark.parametrize("layers", [1, 3], ids=["MTP", "DSpark"])
def test_mtps_experts_are_single_and_all_others_stacked(layers, turbo, dspark, tmp_path):
    if layers == 3:
        turbo = tmp_path / "bundle"
        here("convert", "--source", dspark, "--bundle", turbo, *TURBO)
        here("finalize", "--source", dspark, "--bundle", turbo)
        here("patch", "--bundle", turbo)
        assert not bundles.judge(turbo, dspark).errors
    names = set(json.loads((turbo / INDEX).read_text())["weight_map"])
    experts = {parse_expert(name)[:2] for name in names if parse_expert(name)}
    assert experts == {("mtp", layer) for layer in range(layers)}
    bits = {name: read_array(tensor)[0] for name, tensor in open_bundle(turbo).tensors.items()
            if name.endswith(".tq_bits")}  # fmt: skip
    assert set(bits.values()) == {2}


# --- What verify proves -------------------------------------------------------------------------


def rewrite(folder: Path, seed: int = 42, columns: int | None = None, scale: float = 1) -> None:
    """Layer 0's first expert as another quantizer would have it: other signs, levels or norms."""
    source, base = open_bundle(NANO).tensors, "layers.0.ffn.experts.0.w1"
    packed, scales = (read_array(source[f"{base}.{part}"]) for part in ("weight", "scale"))
    before = turboquant.signs, turboquant.codebook
    other = np.random.default_rng(seed).choice([-1.0, 1.0], size=2 * packed.shape[1])
    levels = turboquant.codebook(columns or len(other))
    turboquant.signs = lambda _: other.astype(np.float32)
    turboquant.codebook = lambda _: levels
    try:
        words, norms = quantized(packed.view(np.uint8), scales)
    finally:
        turboquant.signs, turboquant.codebook = before
    stack = "layers.0.mlp.switch_mlp.gate_proj"
    bundles.write_numbers(folder, f"{stack}.tq_packed", 0, words.reshape(-1))
    bundles.write_numbers(folder, f"{stack}.tq_norms", 0, scale * norms.astype(np.float32))


def hide(folder: Path) -> None:
    """No stack lies in the first shard."""
    metadata = next(iter(open_bundle(folder).shards.values())).metadata
    bundles.save(folder, dict(sorted(bundles.load(folder).items())), 6, metadata)


def wrong_seed(config: dict) -> None:
    config.update(mxtq_seed=43, weight_format="affine")


STACK = "layers.1.mlp.switch_mlp.down_proj"
PLANTED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a code": (lambda f: bundles.flip(f, f"{STACK}.tq_packed", 0, 1), "expert-level-wrong",
               "layers.1.ffn.experts.0.w2"),
    "a norm": (lambda f: bundles.flip(f, f"{STACK}.tq_norms", 0, 2), "expert-beyond-bound",
               "row 0"),
    "MTP's": (lambda f: bundles.flip(f, "mtp.0.ffn.experts.3.w3.tq_packed", 9, 7),
              "expert-level-wrong", "mtp.0.ffn.experts.3.w3"),
    "NaN": (lambda f: bundles.write_numbers(f, f"{STACK}.tq_norms", 5, [np.nan]), "nan-or-inf",
            "row 5"),
    "bits": (lambda f: bundles.write_numbers(f, f"{STACK}.tq_bits", 0, [4]), "label-bits-wrong",
             "tq_bits"),
    "signs": (lambda f: rewrite(f, seed=43), "expert-level-wrong", "experts.0.w1"),
    "levels": (lambda f: rewrite(f, columns=64), "expert-level-wrong", "experts.0.w1"),
    "norms": (lambda f: rewrite(f, scale=1.002), "expert-beyond-bound", "experts.0.w1"),
    "hidden": (hide, "turbo-stack-hidden", "model-00001-of-00006"),
    "sidecar": (lambda f: (f / SIDECAR).write_bytes((f / SIDECAR).read_bytes()[:-4] + b"\0\0\0?"),
                "turbo-sidecar-wrong", "signs.128.42"),
    "no sidecar": (lambda f: (f / SIDECAR).unlink(), "turbo-sidecar-wrong", "no such file"),
    "seed": (lambda f: edit_json(f / "jang_config.json", wrong_seed), "turbo-config-wrong",
             "mxtq_seed"),
    "format": (lambda f: edit_json(f / "config.json", wrong_seed), "turbo-config-wrong",
               "weight_format"),
}  # fmt: skip


def test_verify_proves_signs_levels_codes_and_norms(finished):
    assert not bundles.judge(finished, NANO).names


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(finished, tmp_path, fault):
    plant, name, where = PLANTED[fault]
    folder = shutil.copytree(finished, tmp_path / "bundle")
    plant(folder)
    findings = bundles.judge(folder, NANO)
    assert name in findings.names
    assert where in bundles.places(findings, name)


def test_affine_experts_under_turboquants_mark_are_named(finished, tmp_path):
    bundle = tmp_path / "bundle"
    here("convert", "--source", NANO, "--bundle", bundle)
    mark = dict(next(iter(open_bundle(finished).shards.values())).metadata)
    bundles.save(bundle, bundles.load(bundle), 1, mark)
    assert "expert-differs" in bundles.judge(bundle, NANO).names


def test_repair_says_what_the_tensors_are(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "bundle")
    for fault in ("no sidecar", "seed", "format"):
        PLANTED[fault][0](folder)
    (folder / INDEX).unlink()
    assert mended(folder) == []
    assert not bundles.judge(folder, NANO).names
    for path in finished.glob("*.*"):
        if path.name != INDEX:
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    (folder / "config.json").unlink()
    shutil.rmtree(folder / FOLDER)
    assert mended(folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads((finished / "config.json").read_text())


# --- What a model says with it ------------------------------------------------------------------


@pytest.mark.full
def test_its_logits_are_the_sources_but_for_two_bits(finished):
    """By jang's codebook and rotation in plain MLX; affine2g128's median of 20 prompts is .24."""
    ids = nano.token_prompts(NANO, nano.held_out(NANO, 3))
    ours, theirs = (
        np.concatenate([model.rows(one, 0)[-1:] for one in ids])
        for model in (logits.tensors(finished), logits.tensors(NANO))
    )
    far = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert 0.02 < np.median(far) < 0.3


@pytest.mark.full
def test_vmlx_serves_it_with_stand_ins_for_its_metal_kernels(finished, tmp_path):
    with running_server(NEW, finished, tmp_path / "server.log", start=matrix.STAND_INS) as url:
        assert ask_question(Endpoint(url, NAME), "What is 17+28?", 40).content == "45"
