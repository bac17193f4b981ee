"""Test the three ways to store MTP and DSpark: as the source, as the other experts, dropped.

Catches: a choice that changes a tensor of a main layer, or the answers of a server; MTP that is not
the source's to the last bit; a choice that a later stage forgets, of a finished bundle or of one
that was begun; MTP counted as memory.
"""

import json
import shutil
import subprocess
from pathlib import Path

import bundles
import pytest
from conftest import NANO, ROOT, SCRIPTS
from here import build_bundle, finish_bundle, must, refusal

from dsv4.model import mtp
from dsv4.model.load import expert_labels, open_bundle
from dsv4.verification.report import card
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

QUANTIZERS = ("mlx", "mxfp4", "lossless", "affine2g64", "mixture", "turboquant2")
USUAL = (("MTP", "mlx"), ("DSpark", "mixture"), ("DSpark", "turboquant2"))
OPTIONS = {mtp.SOURCE: (), mtp.AS_EXPERTS: ("--mtp", "as-experts"), mtp.DROPPED: ("--drop-mtp",)}
CASES = [
    pytest.param(kind, name, marks=[] if (kind, name) in USUAL else pytest.mark.full)
    for kind in ("MTP", "DSpark")
    for name in QUANTIZERS
]


def files(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.is_file()}


@pytest.mark.parametrize(("kind", "quantizer"), CASES)
def test_the_choice_is_kept_by_every_stage_and_changes_no_main_layer(
    kind, quantizer, request, tmp_path
):
    source = NANO if kind == "MTP" else request.getfixturevalue("dspark")
    main = []
    for choice, options in OPTIONS.items():
        chosen = ("--quantizer", quantizer, *options)
        if quantizer == "mixture":
            plan = tmp_path / f"{choice}.json"
            must("plan", "--source", source, "--plan", plan, "--size", "1GB", *options)
            chosen += ("--plan", plan)
        bundle = build_bundle(source, tmp_path / choice, *chosen)
        assert not bundles.judge(bundle, source).errors
        assert not bundles.judge(bundle, None).errors
        arrays = bundles.load(bundle)
        main.append({name: (dtype, array.tobytes()) for name, (dtype, array) in arrays.items()
                     if not mtp.is_mtp(name)})  # fmt: skip
        under = {name: dtype for name, (dtype, _) in arrays.items() if mtp.is_mtp(name)}
        assert bool(under) == (choice != mtp.DROPPED)
        if choice == mtp.SOURCE:
            assert not [name for name in under if name.endswith((".biases", ".tq_packed"))]
            labels = expert_labels(open_bundle(bundle))
            assert {labels[base]["mode"] for base in filter(mtp.is_mtp, labels)} == {"mxfp4"}
        both = ("--source", source, "--bundle", bundle)
        assert "nothing to do" in must("requantize", *both)
        assert "nothing to repair" in must("repair", *both, "--without-loader")
    assert main[0] == main[1] == main[2]


@pytest.fixture(scope="module")
def nanos(tmp_path_factory) -> dict[str, Path]:
    """Choice → the nano's bundle by mlx."""
    folder = tmp_path_factory.mktemp("made")
    return {choice: build_bundle(NANO, folder / choice, *OPTIONS[choice]) for choice in OPTIONS}


def test_config_and_card_say_what_became_of_it(nanos, tmp_path):
    said = {choice: json.loads((at / "config.json").read_text())["requantize"]
            for choice, at in nanos.items()}  # fmt: skip
    assert {choice: record.get("mtp") for choice, record in said.items()} == {
        mtp.SOURCE: "source", mtp.AS_EXPERTS: None, mtp.DROPPED: "dropped",
    }  # fmt: skip
    for choice, words in ((mtp.SOURCE, "has the source's own numbers"), (mtp.DROPPED, "left out")):
        out = tmp_path / f"{choice}.json"
        must(
            "verify", "--bundle", nanos[choice], "--source", NANO, "--without-loader", "--json", out
        )
        seen = scan(nanos[choice], Findings())
        facts = card.Facts("user/name", seen, json.loads(out.read_text()), None, None)
        assert words in card.front_matter(facts)
    assert "MTP left out" in must("verify", "--bundle", nanos[mtp.DROPPED], "--level", 1,
                                  "--without-loader")  # fmt: skip


@pytest.mark.parametrize("other", ["lossless", "turboquant2"])
@pytest.mark.parametrize("choice", OPTIONS)
def test_there_and_back_every_file_is_the_same(other, choice, nanos, tmp_path):
    bundle = shutil.copytree(nanos[choice], tmp_path / "bundle")
    both = ("--source", NANO, "--bundle", bundle)
    must("requantize", *both, "--quantizer", other)
    assert not bundles.judge(finish_bundle(NANO, bundle), NANO).errors
    # A lossless bundle with MTP has the source's, whatever it was made from.
    back = OPTIONS[choice] if (other, choice) == ("lossless", mtp.AS_EXPERTS) else ()
    must("requantize", *both, "--quantizer", "mlx", *back)
    assert files(finish_bundle(NANO, bundle)) == files(nanos[choice])


@pytest.mark.parametrize("choice", OPTIONS)
@pytest.mark.parametrize("before", [mtp.SOURCE, mtp.AS_EXPERTS])
def test_a_finished_bundle_changes_if_it_is_asked_to(choice, before, nanos, tmp_path):
    bundle = shutil.copytree(nanos[before], tmp_path / "bundle")
    asked = OPTIONS[choice] or ("--mtp", "source")
    must("requantize", "--source", NANO, "--bundle", bundle, *asked)
    assert files(finish_bundle(NANO, bundle)) == files(nanos[choice])


def test_what_was_dropped_is_made_by_convert_alone(nanos, tmp_path):
    bundle = shutil.copytree(nanos[mtp.DROPPED], tmp_path / "bundle")
    both = ("--source", NANO, "--bundle", bundle)
    for command in ("convert", "requantize"):
        assert "convert" in refusal(command, *both, "--mtp", "source")
    assert files(bundle) == files(nanos[mtp.DROPPED])


def test_an_unfinished_convert_goes_on_with_the_choice_that_it_began_with(tmp_path):
    small = ("--source", NANO, "--shard-bytes", "300000", "--bundle")
    must("convert", *small, tmp_path / "whole", *OPTIONS[mtp.AS_EXPERTS])
    must("convert", *small, tmp_path / "bundle", "--part", "1/2", *OPTIONS[mtp.AS_EXPERTS])
    must("convert", *small, tmp_path / "bundle")
    assert files(tmp_path / "bundle") == files(tmp_path / "whole")


def test_mtp_that_is_not_what_the_record_says_is_found(nanos, tmp_path):
    bundle = shutil.copytree(nanos[mtp.AS_EXPERTS], tmp_path / "rounded")
    record = json.loads((nanos[mtp.SOURCE] / "config.json").read_text())["requantize"]
    arrays = bundles.load(bundle)
    metadata = dict(next(iter(open_bundle(bundle).shards.values())).metadata)
    bundles.save(bundle, arrays, 1, metadata | {"requantize_table": record["table"]})
    bundles.edit_json(bundle / "config.json", lambda config: config.update(requantize=record))
    assert "rounded" in bundles.judge(bundle, NANO).names
    lost = shutil.copytree(nanos[mtp.DROPPED], tmp_path / "lost")
    plain = json.loads((nanos[mtp.AS_EXPERTS] / "config.json").read_text())["requantize"]
    bundles.edit_json(lost / "config.json", lambda config: config.update(requantize=plain))
    assert "tensor-missing" in bundles.judge(lost, NANO).names


PLANTED = {
    "mtp.0.ffn.experts.3.w3.weight": "expert-differs",
    "mtp.0.ffn.experts.3.w3.scales": "expert-differs",
    "mtp.0.e_proj.weight": "module-differs",
    "mtp.0.attn.wq_a.scales": "module-differs",
    "mtp.0.norm.weight": "passthrough-differs",
}


@pytest.mark.parametrize("name", PLANTED)
def test_one_flipped_bit_is_named(name, nanos, tmp_path):
    bundle = shutil.copytree(nanos[mtp.SOURCE], tmp_path / "bundle")
    bundles.flip(bundle, name, 5, 1)
    found = bundles.judge(bundle, NANO)
    assert found.names == {PLANTED[name]}
    assert name.rpartition(".")[0] in bundles.places(found, PLANTED[name])


@pytest.mark.parametrize("base", ["mtp.0.ffn.experts.3.w3", "mtp.0.e_proj"])
@pytest.mark.parametrize("quantizer", ["mlx", "turboquant2"])
def test_a_lost_label_is_named_and_repaired(base, quantizer, nanos, tmp_path):
    bundle = tmp_path / "bundle"
    if quantizer == "mlx":
        shutil.copytree(nanos[mtp.SOURCE], bundle)
    else:
        build_bundle(NANO, bundle, "--quantizer", quantizer)
    right = (bundle / "config.json").read_bytes()
    bundles.edit_json(bundle / "config.json", lambda config: config["quantization"].pop(base))
    assert "scales-without-label" in bundles.judge(bundle, NANO, level=1).names
    must("repair", "--source", NANO, "--bundle", bundle, "--without-loader")
    assert json.loads((bundle / "config.json").read_bytes()) == json.loads(right)


def test_both_settings_are_one_line(tmp_path):
    said = refusal("convert", "--source", NANO, "--bundle", tmp_path / "b", "--mtp", "source",
                   "--drop-mtp")  # fmt: skip
    assert "MTP and DROP_MTP: found both" in said


def test_a_lost_config_is_made_anew_by_what_the_shards_record(nanos, tmp_path):
    for choice in OPTIONS:
        bundle = shutil.copytree(nanos[choice], tmp_path / choice)
        (bundle / "config.json").write_text("{}")
        must("repair", "--source", NANO, "--bundle", bundle, "--without-loader")
        assert not bundles.judge(bundle, NANO).errors
        right, now = (
            json.loads((at / "config.json").read_text()) for at in (nanos[choice], bundle)
        )
        assert now["requantize"] == right["requantize"]
        assert now["quantization"] == right["quantization"]


@pytest.mark.full
@pytest.mark.parametrize("how", ["loader", "mlx-lm", "mlx-vlm"])
def test_every_runtime_answers_alike(how, nanos, tmp_path):
    python, prompts = ROOT / ".toolchain" / "new" / "bin" / "python", [[0, 5, 9, 40], [0, 12, 13]]
    found = set()
    for choice, bundle in nanos.items():
        out = tmp_path / f"{choice}.npy"
        command = [python, SCRIPTS / "lab" / "logits.py", "--folder", bundle, "--how", how,
                   "--every", "--out", out]  # fmt: skip
        subprocess.run(command, input=json.dumps(prompts), text=True, check=True,
                       capture_output=True)  # fmt: skip
        found.add(out.read_bytes())
    assert len(found) == 1
