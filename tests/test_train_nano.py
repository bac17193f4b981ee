"""The nano's training code; skipped where torch or transformers are not installed."""

import dataclasses
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from nano import data, export, rounding, sheets, tokenizer, training  # noqa: E402
from nano.architecture import NANO  # noqa: E402
from nano.comparison import reference_difference  # noqa: E402
from nano.model import initial_routing, initial_tensors, logits, symmetric_comb  # noqa: E402

RECIPE = training.Recipe(
    seed=1, one_form=2, all_forms=2, rounded=2, batch=16, processes=1, rate=1e-3,
    weight_decay=0.05, warmup=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def lessons():
    words = tokenizer.build(data.texts())
    sentences = [data.Lesson(*sentence) for sentence in data.SENTENCES]
    return training.Lessons(
        sheets.sheets(words, data.additions()[:40]), sheets.sheets(words, sentences)
    )


def test_model_agrees_with_transformers():
    assert reference_difference(NANO, seed=3, length=40) < 1e-5


def test_moving_powers_of_two_changes_no_logit():
    """Catches a move that its neighbour does not undo."""
    tensors = symmetric_comb(initial_tensors(NANO, 5), NANO.streams)
    routing = initial_routing(NANO, 5)
    ids = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(5))
    before, _ = logits(tensors, routing, ids, NANO)
    after, _ = logits(export.spread_exponents(tensors, NANO, 5), routing, ids, NANO)
    assert (before - after).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_rounding_is_settled_after_once(kind):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(2))
    codes, values = getattr(rounding, f"{kind}_codes"), getattr(rounding, f"{kind}_values")
    once = values(*codes(weight))
    assert torch.equal(values(*codes(once)), once)
    assert (once - weight).norm() / weight.norm() < (0.15 if kind == "fp4" else 0.04)


def test_packed_expert_puts_the_even_column_in_the_low_nibble():
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([6.0, -0.5, 1.0, 0.0])  # codes 7, 9, 2, 0
    packed, scale = export.pack_expert(weight)
    assert packed.view(torch.uint8)[0, :2].tolist() == [0x97, 0x02]
    assert scale.view(torch.uint8).tolist() == [[127]]


def test_resumed_run_repeats_an_unbroken_one(lessons, tmp_path):
    whole = training.train(RECIPE, NANO, lessons, tmp_path / "whole.pt", [3])
    (tmp_path / "whole-3.pt").rename(tmp_path / "broken.pt")
    resumed = training.train(RECIPE, NANO, lessons, tmp_path / "broken.pt", [])
    assert resumed.step == whole.step == RECIPE.steps
    assert all(torch.equal(resumed.tensors[n], whole.tensors[n]) for n in whole.tensors)


def test_state_of_another_recipe_is_refused(lessons, tmp_path):
    training.save_state(tmp_path / "s.pt", training.fresh_state(NANO, RECIPE), RECIPE)
    other = dataclasses.replace(RECIPE, seed=2)
    with pytest.raises(ValueError, match="--fresh"):
        training.load_state(tmp_path / "s.pt", NANO, other)
