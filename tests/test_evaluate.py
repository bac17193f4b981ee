"""A model run layer by layer is the whole model, and what is said of a bundle is true.

Catches: a layer that sees other tokens, another cache or other numbers than in the whole model; a
kill that loses a layer or mixes two runs; a fault of one layer that shows elsewhere; an imatrix
that is not what the experts are fed.
"""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import logits
import make_source
import mlx.core as mx
import numpy as np
import pytest
from conftest import NANO, ROOT, SCRIPTS, made_once
from here import here, must, refusal

from dsv4.errors import UserError
from dsv4.evaluation import activations, cpu_matmul, driver, evaluate
from dsv4.evaluation.comparability import tokens_of
from dsv4.evaluation.evaluate import EvalRequest
from dsv4.model.load import open_bundle
from dsv4.model.source import open_source
from dsv4.quantization.imatrix import open_imatrix
from dsv4.storage import own_folders
from dsv4.storage.checkpoint import INDEX, read_json
from dsv4.storage.safetensors_file import read_array, read_shard

PYTHON = ROOT / ".toolchain" / "new" / "bin" / "python"
SEED = 20261125


def job(folder, kind, ids, work, **more):
    work.mkdir(parents=True, exist_ok=True)
    return {"folder": str(folder), "kind": kind, "ids": ids, "work": str(work), **more}


def relative(found, reference):
    return np.linalg.norm(found - reference) / np.linalg.norm(reference)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return driver.settings_for(PYTHON, "jang", tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def engine(settings):
    with driver.WorkerProcess(settings, "cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A random source with compress ratios 4 and 128, and DSpark, which must not matter.

    16 heads of the indexer: with 4 many of its scores are exactly 0, and who wins among them is
    nobody's truth.
    """

    def make(folder):
        folder.mkdir()
        make_source.write_source(
            folder, make_source.with_dspark(make_source.Sizes(index_n_heads=16)), SEED, shards=3
        )

    return made_once(tmp_path_factory, "compressed", make)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The nano as mlx makes it, and the same with one expert of layer 1 scaled by 4."""

    def make(folder):
        folder.mkdir()
        must("convert", "--source", NANO, "--bundle", folder / "right")
        must("finalize", "--source", NANO, "--bundle", folder / "right")
        wrong = shutil.copytree(folder / "right", folder / "wrong")
        for name in ("scales", "biases"):
            change(wrong, f"layers.1.ffn.shared_experts.w2.{name}", lambda old: old * 4)

    folder = made_once(tmp_path_factory, "evaluated", make)
    return folder / "right", folder / "wrong"


def change(bundle, name, how):
    """Replace the numbers of one tensor."""
    tensor = read_shard(bundle / read_json(bundle / INDEX)["weight_map"][name]).tensors[name]
    new = how(read_array(tensor))
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(new.astype(new.dtype).tobytes())


@pytest.fixture(scope="module", params=["nano", "compressed"])
def both(request):
    """(source, 700 tokens, transformers' logits after each of them)."""
    folder = NANO if request.param == "nano" else request.getfixturevalue("compressed")
    ids = [0, *map(int, np.random.default_rng(SEED).integers(2, 512, 699))]
    return folder, ids, logits.Reference(folder).rows(ids, 0)


@pytest.mark.parametrize(("tokens", "portion"), [(24, 2048), (160, 2048), (700, 2048), (700, 233)])
def test_streamed_logits_are_those_of_the_whole_model(both, tokens, portion, engine, tmp_path):
    """Against transformers, all in float32, also when a text comes in portions, the last of which
    would be one token; a later token changes nothing before it."""
    folder, ids, reference = both
    engine.run(job(folder, "source", ids[:tokens], tmp_path, portion=portion), "test")
    found = np.load(tmp_path / activations.LOGITS)
    assert found.shape == (tokens, 512)
    assert relative(found, reference[:tokens]) < 1e-5


WHOLE = """
import sys, json, numpy as np
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/lab"]
from dsv4.evaluation.forward import PassRunner, PassSpec
from dsv4.evaluation.model_code import Vlm
jobs = json.load(sys.stdin)
for job in jobs:
    PassRunner(PassSpec(**job), Vlm, lambda told: None).run()
import logits
from pathlib import Path
for job in jobs:
    rows = logits.mlx_vlm(Path(job["folder"])).rows(job["ids"], 0)
    np.save(job["work"] + "/whole.npy", rows)
"""


@pytest.mark.full
def test_streamed_logits_of_mlx_vlm_are_those_of_its_whole_model(bundles, compressed, tmp_path):
    """RUNTIME=vlm, bit for bit: affine in F16, and lossless in F32 with compressed caches."""
    must("convert", "--source", compressed, "--bundle", tmp_path / "b", "--quantizer", "lossless")
    must("finalize", "--source", compressed, "--bundle", tmp_path / "b")
    ids = [0, *map(int, np.random.default_rng(SEED).integers(2, 512, 159))]
    jobs = [
        job(bundles[0], "bundle", ids[:24], tmp_path / "affine"),
        job(tmp_path / "b", "bundle", ids, tmp_path / "lossless"),
    ]
    subprocess.run(
        [PYTHON, "-c", WHOLE, SCRIPTS], input=json.dumps(jobs), text=True, check=True,
        env={"HF_HUB_OFFLINE": "1", "MLX_DISABLE_COMPILE": "1"},
    )  # fmt: skip
    for one in jobs:
        found, whole = (
            np.load(f"{one['work']}/{name}") for name in (activations.LOGITS, "whole.npy")
        )
        assert found.shape == (len(one["ids"]), 512)
        assert np.array_equal(found, whole)


@pytest.mark.parametrize(
    ("mode", "size", "bits"),
    [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("affine", 64, 2), ("affine", 32, 8)],
)
def test_products_by_blas_are_those_of_mlx(mode, size, bits):
    """Float32 rows by packed matrices: plain, stacked as jang's wo_a, and sorted by expert."""
    random = np.random.default_rng(SEED)
    stack = mx.array(random.standard_normal((3, 64, 128), np.float32))
    parts = mx.quantize(stack, size, bits, mode=mode)
    form = {"group_size": size, "bits": bits, "mode": mode}
    rows = mx.array(random.standard_normal((3, 1, 40, 128), np.float32))
    experts = mx.array(np.repeat([0, 2], [37, 3]).astype(np.uint32))
    asked = [
        lambda x: mx.quantized_matmul(x[0, 0], *(part[0] for part in parts), **form),
        lambda x: mx.quantized_matmul(x, *(part[:, None] for part in parts), **form),
        lambda x: mx.gather_qmm(x[0, 0][:, None], *parts, rhs_indices=experts,
                                sorted_indices=True, **form),
    ]  # fmt: skip
    for ask in asked:
        own = np.array(ask(rows))
        with cpu_matmul.using_blas(True):
            found = np.array(ask(rows))
            half = np.array(ask(rows.astype(mx.float16)))  # is MLX's in any case
        assert found.shape == own.shape
        assert relative(found, own) < 1e-6
        assert np.array_equal(half, np.array(ask(rows.astype(mx.float16))))
    assert mx.gather_qmm is cpu_matmul.gathered_product


@pytest.mark.parametrize("sinks", [None, [0.5, -1.0, 3.0, 0.0]])
@pytest.mark.parametrize("added", [False, True])
def test_attention_by_blas_is_that_of_mlx(sinks, added):
    """Four heads on one and on two of keys, masked by what is seen or by what is added."""
    random = np.random.default_rng(SEED)
    seen = mx.array(random.random((1, 1, 40, 56)) < 0.3) | (mx.arange(56) == 0)
    mask = mx.where(seen, mx.array(0.0), mx.array(-1e9)) if added else seen
    sinks = None if sinks is None else mx.array(sinks)
    for heads in (1, 2):
        q, k, v = (mx.array(random.standard_normal((1, n, rows, 32), np.float32))
                   for n, rows in ((4, 40), (heads, 56), (heads, 56)))  # fmt: skip

        def ask(q=q, k=k, v=v):
            given = {"scale": 0.3, "mask": mask, "sinks": sinks}
            return np.array(mx.fast.scaled_dot_product_attention(q, k, v, **given))

        own = ask()
        with cpu_matmul.using_blas(True):
            found = ask()
        assert relative(found, own) < 1e-6
    assert mx.fast.scaled_dot_product_attention is cpu_matmul.attention


def test_a_lossless_bundle_in_float32_is_the_source(engine, tmp_path):
    """Bit for bit, after every layer and in the logits; so both are read rightly."""
    must("convert", "--source", NANO, "--bundle", tmp_path / "lossless", "--quantizer", "lossless")
    ids, source, bundle = [0, *range(50, 90)], tmp_path / "a", tmp_path / "b"
    engine.run(job(NANO, "source", ids, source, keep=True), "test")
    more = {"wide": True, "against": str(source)}
    engine.run(job(tmp_path / "lossless", "bundle", ids, bundle, **more), "test")
    assert activations.read_record(bundle).errors == [0.0] * 4
    a, b = (np.load(folder / activations.LOGITS) for folder in (source, bundle))
    assert np.array_equal(a, b)


def test_a_killed_pass_goes_on_at_its_layer(settings, engine, tmp_path):
    """SIGKILL after layer 0: what was done stays as it is, and the end is the same."""
    ids = [0, *range(100, 130)]
    alone, killed = (job(NANO, "source", ids, tmp_path / n, keep=True) for n in ("a", "b"))
    engine.run(alone, "test")
    with driver.WorkerProcess(settings, "cpu") as doomed:
        next(told for told in doomed.messages(killed) if told.get("layer") == 0)
    kept = activations.states_path(tmp_path / "b", 1)
    (tmp_path / "b" / ".after-002.npy.partial").write_bytes(b"what a kill leaves")
    before = kept.stat().st_mtime_ns
    told = list(engine.messages(killed))
    assert [one["layer"] for one in told if "layer" in one] == [1, 2]
    assert kept.stat().st_mtime_ns == before
    a, b = (np.load(tmp_path / n / activations.LOGITS) for n in ("a", "b"))
    assert np.array_equal(a, b)


def test_the_engine_ends_with_whoever_asked(settings):
    with driver.WorkerProcess(settings, "cpu") as engine:
        engine._child.stdin.close()
        assert engine._child.wait(timeout=60) == 0


def test_evaluate_says_how_far_and_in_which_layer(bundles, tmp_path):
    """Two bundles in one run: a fault in layer 1 shows in its line, not before."""
    out, text = tmp_path / "evaluate", tmp_path / "text"
    text.write_text("".join(f"What is {n}+28? " for n in range(20)))
    said = must("evaluate", "--source", NANO, "--bundle", *bundles, "--out", out,
                "--text", text, "--tokens", 24)  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluate.html", "evaluate.json", "evaluate.md", "text",
    ]  # fmt: skip
    result = json.loads((tmp_path / "evaluate.json").read_text())
    right, wrong = result["bundles"]
    assert right["error_by_layer"][:2] == wrong["error_by_layer"][:2]  # embedding, layer 0
    assert all(e < 0.2 for e in right["error_by_layer"])
    assert wrong["error_by_layer"][2] > 3 * right["error_by_layer"][2]
    assert len(right["kl_by_token"]) == 23
    assert 0 < right["kl_median"] < wrong["kl_median"]
    assert right["kl_mean"] == pytest.approx(np.mean(right["kl_by_token"]))
    for line in (f"| layer 1 | {right['error_by_layer'][2]:.2e}", "| right | cpu | float16 |"):
        assert line in said
        assert line in (tmp_path / "evaluate.md").read_text()
    page = (tmp_path / "evaluate.html").read_text()
    assert page.count("<svg ") == page.count('role="img" aria-label=') == 2
    assert not re.search(r"""(src|href)="?[^"#]|url\((?!#)|@import|#010203""", page)
    assert "currentColor" in page
    assert ">1e+00</text>" in page
    assert "right on cpu" in page


def test_perplexity_and_kl_are_those_of_the_logits(tmp_path):
    """By hand: two tokens of three, uniform against 1/2, 1/4, 1/4."""
    for name, rows in (("a", [[0, 0, 0]]), ("b", [np.log([2, 1, 1])])):
        (tmp_path / name).mkdir()
        activations.write_rows(tmp_path / name / activations.LOGITS, (2, 3), np.array([rows * 2]))
    found = evaluate.compare(tmp_path / "a", tmp_path / "b", [0, 1])
    assert evaluate.perplexity(found.bundle) == pytest.approx(3)
    assert evaluate.perplexity(found.source) == pytest.approx(4)
    kl = 0.5 * np.log(3 / 2) + 0.5 * np.log(3 / 4)
    assert found.kl == pytest.approx([kl])
    assert found.same.tolist() == [True]


def test_an_imatrix_is_what_hooks_in_transformers_see(tmp_path):
    """Means of squares by expert, and how many tokens each saw; who saw none is named."""
    import torch

    text = tmp_path / "text"
    text.write_text("7 7 7 7 7 7")
    out = tmp_path / "made.dat"
    said = must("imatrix", "--source", NANO, "--text", text, "--out", out)
    ids = tokens_of(open_source(NANO), text, None)
    seen = watched(logits.Reference(NANO), ids, torch)
    entries = open_imatrix(out).entries
    assert len(entries) == 3 * len(seen)
    described = json.loads((tmp_path / "made.dat.json").read_text())
    assert described["layers"] == [tokens.tolist() for tokens, _ in seen]
    unseen = [[n, e] for n, (tokens, _) in enumerate(seen) for e in np.flatnonzero(tokens == 0)]
    assert described["unseen"] == unseen != []
    assert f"{len(unseen)} saw none, and all their columns will count alike" in said
    assert f"layer {unseen[0][0]} expert {unseen[0][1]}" in said
    data = out.read_bytes()
    for layer, (tokens, sums) in enumerate(seen):
        for name, total in sums.items():
            entry = entries[f"blk.{layer}.{name}.weight"]
            found = np.frombuffer(data, "<f4", entry.count, entry.offset).reshape(total.shape)
            expected = total / np.maximum(tokens, 1)[:, None]
            least = 1e-6 * expected.max()  # what float32 leaves of sums of small squares
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=least)


def watched(reference, ids, torch):
    """(tokens of each expert, entry → sums of squares) of each layer, by hooks on the experts."""
    out = []

    def hook(experts, inputs):
        hidden, chosen, weights = (one.detach() for one in inputs)
        tokens = np.zeros(experts.num_experts, int)
        x = np.zeros((experts.num_experts, hidden.shape[-1]))
        middle = np.zeros((experts.num_experts, experts.intermediate_dim))
        for expert in range(experts.num_experts):
            at, place = torch.where(chosen == expert)
            inner = experts._apply_gate(hidden[at] @ experts.gate_up_proj[expert].T)
            tokens[expert] = len(at)
            x[expert] = hidden[at].square().sum(0)
            middle[expert] = (inner * weights[at, place, None]).square().sum(0)
        out.append((tokens, {"ffn_gate_exps": x, "ffn_up_exps": x, "ffn_down_exps": middle}))

    for layer in reference.model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(hook)
    reference.rows(ids, 0)
    return out


# ------------------------------------------------------------------------------------- bad input


def stops(call, *words):
    with pytest.raises(UserError) as stop:
        call()
    assert all(word in str(stop.value) for word in words), stop.value


def asked(settings, bundle, text, **more):
    values = {"tokens": 48, "devices": ["cpu"], "wide": False} | more
    return lambda: evaluate.evaluate(EvalRequest(NANO, [bundle], text, **values), settings)


def test_what_cannot_be_compared_is_refused(bundles, settings, tmp_path):
    text, short = tmp_path / "text", tmp_path / "short"
    text.write_text("words " * 20)
    short.write_text("")
    stops(asked(settings, bundles[0], short), "found 0 tokens")
    stops(asked(settings, bundles[0], tmp_path / "none"), "no such file")
    short.write_bytes(b"\xff\xfe")
    stops(asked(settings, bundles[0], short), "no UTF-8")
    stops(asked(settings, NANO, text), "no quantization")
    turbo = tmp_path / "turbo"
    must("convert", "--source", NANO, "--bundle", turbo, "--quantizer", "turboquant2")
    stops(asked(settings, turbo, text), "experts in TurboQuant")
    copy = shutil.copytree(bundles[0], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 10001}))
    stops(asked(settings, copy, text), "rope_theta: found 10001", "10000 as in the source")
    (copy / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<another>"
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    stops(asked(settings, copy, text), "another tokenizer")
    assert driver.folders(settings.work) == []


def test_a_tokenizer_that_is_none_or_too_large_is_refused(tmp_path):
    """MLX looks a token up wherever its number leads, beyond the embedding too."""
    text = tmp_path / "text"
    text.write_text("words and 17")
    source = open_source(NANO)
    small = replace(source, config=source.config | {"vocab_size": 9})
    stops(lambda: tokens_of(small, text, None), "less than vocab_size, 9")
    tokenizer = json.loads((NANO / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": 1}}))
    broken = replace(source, folder=tmp_path)
    stops(lambda: tokens_of(broken, text, None), "tokenizer.json: found", "expected a tokenizer")


def test_a_device_that_is_not_there_is_refused(bundles, settings, tmp_path):
    if "gpu" in settings.devices:
        pytest.skip("this MLX has a GPU")
    line = refusal("evaluate", "--source", NANO, "--bundle", bundles[0], "--device", "both",
                   "--out", tmp_path / "out")  # fmt: skip
    assert "DEVICE=both: found no GPU" in line
    assert not list(tmp_path.iterdir())
    assert here("evaluate", "--source", NANO, "--bundle", NANO, "--tokens", 2)[0] == 2


def test_a_bundle_that_gives_no_numbers_or_fits_no_label_stops_at_its_layer(
    bundles, engine, tmp_path
):
    copy = shutil.copytree(bundles[0], tmp_path / "copy")
    change(copy, "layers.1.attn.kv_norm.weight", lambda old: old * np.float16(np.nan))
    work = tmp_path / "work"
    stops(lambda: engine.run(job(copy, "bundle", [0, 9, 8], work), "t"),
          "hidden states after 2 layers: found a NaN")  # fmt: skip
    assert activations.read_record(work).layers == 1
    other = shutil.copytree(bundles[0], tmp_path / "logits")

    def first_row_nan(old):
        new = old.copy()
        new[0] = 0x7FC0  # NaN in BF16
        return new

    change(other, "head.weight", first_row_nan)
    stops(lambda: engine.run(job(other, "bundle", [0, 9, 8], tmp_path / "nan"), "t"),
          "logits: found a NaN")  # fmt: skip
    config = json.loads((copy / "config.json").read_text())
    label = config["quantization"]["model.layers.0.mlp.switch_mlp.up_proj"]
    label["bits"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    stops(lambda: engine.run(job(copy, "bundle", [0, 9, 8], tmp_path / "other"), "t"),
          "layer 0: found Expected shape", "labels in config.json")  # fmt: skip


def test_a_source_whose_scale_is_no_number_stops_at_its_layer(engine, tmp_path):
    copy = shutil.copytree(NANO, tmp_path / "copy")
    change(copy, "layers.1.ffn.experts.3.w1.scale", lambda old: old | 255)
    stops(lambda: engine.run(job(copy, "source", [0, *range(2, 400)], tmp_path / "work"), "t"),
          "layer 1: a matrix in FP4: found scale byte 255 (NaN)")  # fmt: skip


def test_a_changed_input_is_another_pass(bundles, settings, tmp_path, monkeypatch):
    """Other tokens, another device, a touched shard, another label, other code of ours."""
    copy = shutil.copytree(bundles[0], tmp_path / "copy")
    one = {"ids": [0, 1, 2], "work": "a"}

    def key(device="cpu", **more):
        return driver.key_of(open_bundle(copy), settings, device, one | more)

    keys = [key(), key("gpu"), key(ids=[0, 1, 3]), key(wide=True)]
    newer = replace(settings, versions={"mlx": "1.0"})
    keys.append(driver.key_of(open_bundle(copy), newer, "cpu", one))
    shard = next(copy.glob("*.safetensors"))
    shard.touch()
    keys.append(key())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"requantize": {}}))
    keys.append(key())
    packages = shutil.copytree(driver.PACKAGES, tmp_path / "dsv4")
    monkeypatch.setattr(driver, "PACKAGES", packages)
    assert key(work="b") == keys[-1]
    for name in ("evaluation/forward", "quantization/fp4", "model/load", "storage/tensor_reader"):
        with (packages / f"{name}.py").open("a") as file:
            file.write("# another line\n")
        keys.append(key())
    assert len(set(keys)) == len(keys)
    old, new, other = (
        own_folders.make_own(tmp_path / f"pass-{n}") for n in ("0" * 16, "1" * 16, "port")
    )
    driver.remove_other_passes(tmp_path, [new])
    assert [path.is_dir() for path in (old, new, other)] == [False, True, True]


def test_a_volume_that_tells_no_room_stops_nothing(tmp_path, monkeypatch):
    config = {"hc_mult": 4, "hidden_size": 4096, "vocab_size": 129_280}
    monkeypatch.setattr(driver.disk_space, "free_bytes", lambda path: None)
    driver.check_space(tmp_path, config, 2048, 44, 2)
    monkeypatch.setattr(driver.disk_space, "free_bytes", lambda path: 10**9)
    with pytest.raises(UserError, match=r"found 1\.0 GB"):
        driver.check_space(tmp_path, config, 2048, 44, 2)
