"""The nano sees faults: what a wrong bundle does to its answers and its logits.

Each planted fault must move exact match or the logit distance past the bound that `make demo` and
`make selftest` judge by, and the right bundle must pass it. Without this, a nano that answers
whatever is done to it would prove nothing. All 50 additions are judged by the greedy answer.
"""

import json
import shutil
import sys
from pathlib import Path

import logits
import numpy as np
import pytest
from conftest import NANO, ROOT, must, script

from dsv4.acceptance import nano as nano_model
from dsv4.model.load import open_bundle
from dsv4.model.source import open_source
from dsv4.model.special_tokens import ASSISTANT, BOS, EOS, USER
from dsv4.quantization import fp4
from dsv4.storage.safetensors_file import read_array

PROJECTIONS = ("w1", "w2", "w3")
EXPERTS = 8


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The right bundle of the nano; test_native.py proves that it is requantize's too."""
    bundle = tmp_path_factory.mktemp("nano") / "right"
    must("convert", "--source", NANO, "--bundle", bundle)
    must("finalize", "--source", NANO, "--bundle", bundle)
    must("patch", "--bundle", bundle)
    return bundle


@pytest.fixture(scope="module")
def lessons():
    """(token ids with the answer, where the answer begins) of 50 additions held out in training."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    out = []
    for a, b in nano_model.held_out(NANO, nano_model.QUESTIONS):
        prompt = encode(f"{BOS}{USER}What is {a}+{b}?{ASSISTANT}<think>")
        out.append((prompt + encode(f"{a}+{b}={a + b}</think>{a + b}{EOS}"), len(prompt)))
    return out


def answers(model, lessons) -> tuple[np.ndarray, int]:
    """Logits at all answer positions, and how many whole answers are greedy."""
    import mlx.core as mx

    rows, exact = [], 0
    for ids, start in lessons:
        found = np.array(model(mx.array([ids[:-1]]))[0, start - 1 :].astype(mx.float32))
        exact += bool((found.argmax(1) == ids[start:]).all())
        rows.append(found)
    return np.concatenate(rows), exact


@pytest.fixture(scope="module")
def config():
    return json.loads((NANO / "config.json").read_text())


@pytest.fixture(scope="module")
def truth(lessons, config):
    """The source's own logits."""
    model = logits.plain_model(config, logits.decode_source(open_source(NANO)))
    found, exact = answers(model, lessons)
    assert exact == nano_model.QUESTIONS
    return found


@pytest.fixture(scope="module")
def weights(right):
    """The right bundle's tensors, dequantized."""
    return logits.decode_bundle(open_bundle(right))


def verdict(found, exact, truth) -> tuple[float, int, bool]:
    """(distance, exact matches, does it pass?)."""
    distance = nano_model.compare(found, truth).distance
    return distance, exact, distance <= nano_model.MAX_DISTANCE and exact >= nano_model.MIN_EXACT


def experts(weights, layer=None):
    """Names of the main layers' routed experts, or of one layer's."""
    prefix = "layers." if layer is None else f"layers.{layer}."
    return [n for n in weights if n.startswith(prefix) and ".ffn.experts." in n]


def each(change):
    """A fault that changes every routed expert on its own."""
    return lambda weights: {name: change(weights[name]) for name in experts(weights)}


def requantized_to(bits):
    def change(array):
        import mlx.core as mx

        packed = mx.quantize(mx.array(array), group_size=32, bits=bits)
        return np.array(mx.dequantize(*packed, group_size=32, bits=bits))

    return each(change)


def swapped(one, other):
    def fault(weights):
        names = [n for n in experts(weights) if f".{one}." in n or f".{other}." in n]
        swap = {one: other, other: one}
        return {n: weights[n.replace(m, swap[m])] for n in names for m in (one, other) if m in n}

    return fault


def rotated(weights):
    out = {}
    for name in experts(weights):
        parts = name.split(".")
        parts[4] = str((int(parts[4]) + 1) % EXPERTS)
        out[name] = weights[".".join(parts)]
    return out


def dead_expert(weights):
    """The expert that most tokens of the hash-routed layer go to gives nothing."""
    busiest = np.bincount(weights["layers.0.ffn.gate.tid2eid"].reshape(-1)).argmax()
    return {
        name: np.zeros_like(weights[name])
        for name in experts(weights, 0)
        if f".experts.{busiest}." in name
    }


def from_codes(decode):
    """A fault that decodes the source's codes (out, in/2) and scale bytes in a wrong way."""

    def fault(weights):
        tensors = open_source(NANO).tensors
        out = {}
        for name in experts(weights):
            scale = tensors[name.removesuffix(".weight") + ".scale"]
            out[name] = decode(read_array(tensors[name]).view(np.uint8), read_array(scale))
        return out

    return fault


def linear(codes, scales):
    """Codes read as signed integers, as if they were int4."""
    pairs = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1).astype(np.int8)
    values = np.where(pairs > 7, pairs - 16, pairs).astype(np.float32) * 6 / 7
    return values * fp4.UE8M0[scales].repeat(32, axis=1)


FAULTS = {
    "experts zeroed": each(np.zeros_like),
    "scales doubled": each(lambda array: array * 2),
    "scales of one layer doubled": lambda w: {n: w[n] * 2 for n in experts(w, 1)},
    "scales shifted by a group": from_codes(lambda c, s: fp4.decode(c, np.roll(s, 1, 1), "")),
    "scales shifted by a row": from_codes(lambda c, s: fp4.decode(c, np.roll(s, 1, 0), "")),
    "nibbles swapped": from_codes(lambda c, s: fp4.decode((c << 4) | (c >> 4), s, "")),
    "codes read linearly": from_codes(linear),
    "signs lost": each(np.abs),
    "w1 and w3 swapped": swapped("w1", "w3"),
    "experts rotated": rotated,
    "2-bit experts": requantized_to(2),
    "3-bit experts": requantized_to(3),
    "one expert dead": dead_expert,
    "tid2eid shifted": lambda w: {
        "layers.0.ffn.gate.tid2eid": np.roll(w["layers.0.ffn.gate.tid2eid"], 1, axis=0)
    },
}


def test_the_right_bundle_passes(weights, lessons, config, truth):
    found, exact = answers(logits.plain_model(config, weights), lessons)
    distance, exact, passes = verdict(found, exact, truth)
    print(f"right bundle: distance {distance:.4f}, {exact} exact")
    assert passes


# The faults that `make test` plants: one of the experts, one of the hash table.
FIRST = ("3-bit experts", "tid2eid shifted")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=[] if name in FIRST else pytest.mark.full) for name in FAULTS],
)
def test_a_fault_is_seen(fault, weights, lessons, config, truth):
    planted = FAULTS[fault](weights)
    assert planted
    found, exact = answers(logits.plain_model(config, {**weights, **planted}), lessons)
    distance, exact, passes = verdict(found, exact, truth)
    print(f"{fault}: distance {distance:.4f}, {exact} exact")
    assert not passes


def loaded(bundle, work):
    """Logits through the real loader at the prompts of `make demo`, and the source's."""
    ids = nano_model.token_prompts(NANO, nano_model.held_out(NANO, 10))
    found = nano_model.run_logits(Path(sys.executable), bundle, "loader", ids, work)
    truth = nano_model.run_logits(Path(sys.executable), NANO, "source", ids, work)
    return nano_model.compare(found, truth)


@pytest.mark.full
def test_the_stock_bundle_is_seen(tmp_path):
    stock = tmp_path / "stock"
    must("convert", "--source", NANO, "--bundle", stock, "--converter", "jang")
    assert loaded(stock, tmp_path).distance > nano_model.MAX_DISTANCE


@pytest.mark.full
def test_a_wrong_label_is_seen(right, tmp_path):
    """mxfp4 over affine tensors: the label that the loader finds decides how they decode."""
    bundle = shutil.copytree(right, tmp_path / "wrong")
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    for key, label in config["quantization"].items():
        if isinstance(label, dict) and "switch_mlp" in key:
            label.update(mode="mxfp4")
    path.write_text(json.dumps(config))
    result = script(
        "lab/logits", "--folder", bundle, "--how", "loader", "--out", tmp_path / "x.npy",
        input=json.dumps([[0, 5, 6]]), cwd=ROOT,
    )  # fmt: skip
    assert result.returncode or loaded(bundle, tmp_path).distance > nano_model.MAX_DISTANCE
