"""Releases with DSpark in place of MTP (-0731, Pro-0813), and sources stripped of MTP.

What is stored says how many layers lie under mtp; num_nextn_predict_layers may say 0, 1 or 3.
Catches: such a source refused, by any stage; a tensor of DSpark that lacks unseen; a source that
lacks the MTP that it declares taken without a word; a bundle that lost its MTP called whole.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bundles
import pytest
from conftest import made_once, script
from here import here, must, refusal
from make_source import config_of, write_source
from source_tensors import FLASH, Sizes, headers, with_dspark
from test_low_disk import REPO, Place, hub, shards  # noqa: F401

from dsv4.errors import UserError
from dsv4.model.configs import known_fields
from dsv4.model.expected_tensors import check_headers, expected_weights
from dsv4.model.load import open_bundle
from dsv4.model.names import columns_of, kind, mtp_layer, parse_expert
from dsv4.storage.checkpoint import INDEX, Checkpoint
from dsv4.storage.safetensors_file import Shard, Tensor

TINY = Sizes(
    num_hidden_layers=1, n_routed_experts=2, compress_ratios=(4, 0), hidden_size=128,
    num_attention_heads=2,
)  # fmt: skip
FLASH_0731 = with_dspark(FLASH, rank=256)


def by_headers(sizes: Sizes, tensors: dict[str, Tensor] | None = None) -> Checkpoint:
    """A source of which nothing but headers is known."""
    tensors = headers(sizes) if tensors is None else tensors
    shard = Shard(Path("model.safetensors"), tensors, {}, 0)
    weight_map = dict.fromkeys(tensors, shard.path.name)
    return Checkpoint(Path("source"), config_of(sizes), weight_map, {shard.path.name: shard})


# --- What is asked for


def test_a_labs_source_has_the_tensors_of_the_real_release():
    """72,317, and so many in each stage; 166.9 GB."""
    tensors = headers(FLASH_0731)
    stages = Counter(mtp_layer(name) for name in tensors)
    assert (len(tensors), stages[0], stages[1], stages[2]) == (72_317, 1_568, 1_565, 1_572)
    assert round(sum(tensor.nbytes for tensor in tensors.values()) / 1e9, 1) == 166.9


@pytest.mark.parametrize("sizes", [FLASH, FLASH_0731], ids=["first", "0731"])
def test_what_is_called_for_is_what_the_release_has(sizes):
    source = by_headers(sizes)
    wanted = [name for name, _, _ in expected_weights(source)]
    assert len(wanted) == len(set(wanted))
    assert set(wanted) == {name for name in source.tensors if not name.endswith(".scale")}


@pytest.mark.parametrize("sizes", [FLASH, FLASH_0731], ids=["first", "0731"])
def test_config_tells_the_columns_of_every_matrix(sizes):
    config = config_of(sizes)
    for name, tensor in headers(sizes).items():
        if parse_expert(name) and ".experts.7." not in name:
            continue
        if kind(name) in ("expert", "matrix"):
            columns = tensor.shape[1] * (2 if kind(name) == "expert" else 1)
            assert columns_of(name.removesuffix(".weight"), config) == columns, name


def test_a_loader_is_shown_what_describes_dspark():
    config = {key: value for key, value in config_of(FLASH_0731).items() if key[:7] == "dspark_"}
    assert len(config) == 4
    assert known_fields(config) == config


STORED = [
    name for name in headers(with_dspark(TINY)) if mtp_layer(name) is not None
    and (not parse_expert(name) or name.startswith("mtp.1.ffn.experts.1.w2."))
]  # fmt: skip


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> Path:
    """A tiny source with DSpark, each tensor in a shard of its own."""
    folder = tmp_path_factory.mktemp("apart") / "source"
    folder.mkdir()
    write_source(folder, with_dspark(TINY), 1, shards=len(headers(with_dspark(TINY))))
    return folder


@contextlib.contextmanager
def without(source: Path, name: str) -> Iterator[None]:
    """The source without one of its tensors, in index and shard alike."""
    index = json.loads((source / INDEX).read_text())
    kept = dict(index["weight_map"])
    shard = source / kept.pop(name)
    away = shard.rename(source.parent / shard.name)
    (source / INDEX).write_text(json.dumps({**index, "weight_map": kept}))
    yield
    (source / INDEX).write_text(json.dumps(index))
    away.rename(shard)


@pytest.mark.parametrize("name", STORED)
def test_a_tensor_of_dspark_that_lacks_is_named_before_anything_is_written(name, apart, tmp_path):
    with without(apart, name):
        line = refusal("convert", "--source", apart, "--bundle", tmp_path / "bundle")
    assert f"no {name}" in line
    assert not list(tmp_path.iterdir())


def test_nothing_that_the_parametrised_test_takes_away_is_refused_when_it_is_there(apart, tmp_path):
    assert len(STORED) == 3 * 29 + 3 + 7 + 2
    must("convert", "--source", apart, "--bundle", tmp_path / "bundle", "--dry-run")


def test_a_stage_that_lacks_is_missed():
    tensors = headers(with_dspark(TINY))
    for stage, words in ((0, "no mtp.0."), (1, "no mtp.1."), (2, "no mtp.1.norm.weight")):
        kept = {name: t for name, t in tensors.items() if mtp_layer(name) != stage}
        with pytest.raises(UserError, match=words):
            check_headers(by_headers(with_dspark(TINY), kept))


def test_where_no_own_tensor_is_left_config_says_whose_stages_they_are():
    own = {"main_proj", "main_norm", "norm", "markov_head", "confidence_head"}
    tensors = {
        name: tensor for name, tensor in headers(with_dspark(TINY)).items()
        if mtp_layer(name) is None or name.split(".")[2] not in own
    }  # fmt: skip
    with pytest.raises(UserError, match=r"no mtp\.0\.main_proj\.weight"):
        check_headers(by_headers(with_dspark(TINY), tensors))
    with pytest.raises(UserError, match=r"no mtp\.0\.e_proj\.weight"):
        check_headers(by_headers(TINY, tensors))


# --- Every stage


DECLARED = {"dspark": 3, "dspark_nextn1": 1, "dspark_nextn0": 0, "mtp_nextn0": 0, "no_mtp": 1}
LAYERS = {"mtp_nextn0": 1, "no_mtp": 0}


@pytest.fixture(scope="module")
def stored(request, tmp_path_factory) -> tuple[Path, int, int]:
    """A source, how many layers it has under mtp, and how many it declares."""
    name, declared = request.param, DECLARED[request.param]

    def make(folder: Path) -> None:
        folder.mkdir()
        layers = LAYERS.get(name, 3)
        sizes = replace(TINY, num_nextn_predict_layers=layers)
        write_source(folder, with_dspark(sizes) if layers == 3 else sizes, 3, shards=4)
        bundles.edit_json(
            folder / "config.json", lambda c: c.update(num_nextn_predict_layers=declared)
        )

    return made_once(tmp_path_factory, f"stored-{name}", make), LAYERS.get(name, 3), declared


def experts_under_mtp(bundle: Path) -> set[int]:
    return {at[1] for name in open_bundle(bundle).tensors if (at := parse_expert(name))
            and at[0] == "mtp"}  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "quantizer"),
    [
        ("dspark", "mlx"), ("dspark", "lossless"), ("dspark_nextn1", "mixture"),
        ("dspark_nextn0", "lossless"), ("mtp_nextn0", "mlx"), ("no_mtp", "mlx"),
        ("no_mtp", "mixture"),
    ],
    indirect=["stored"],
)  # fmt: skip
def test_it_goes_through_every_stage(stored, quantizer, tmp_path):
    source, layers, declared = stored
    bundle, plan = tmp_path / "bundle", tmp_path / "plan.json"
    both = ("--source", source, "--bundle", bundle)
    chosen = ("--quantizer", quantizer)
    assert "; whole by their headers" in must("download", "--source", source).replace(",", ";")
    if quantizer == "mixture":
        must("plan", "--source", source, "--plan", plan, "--size", "2MB")
        assert list(json.loads(plan.read_text())["experts"]) == ["layers.0"]
        chosen += ("--plan", plan)
    status, out, err = here("convert", *both, *chosen)
    assert status == 0, (out, err)
    assert err.count("note: ") == err.count("config.json") == (layers < declared)
    assert experts_under_mtp(bundle) == set(range(layers))
    assert "nothing to do" in must("requantize", *both, *chosen)
    must("finalize", *both)
    must("patch", "--bundle", bundle)
    assert not bundles.judge(bundle, source).errors
    assert not bundles.judge(bundle, None).errors
    if quantizer == "mlx":
        assert "nothing to repair" in must("repair", *both, *chosen)
        must("requantize", *both, "--quantizer", "affine2g64")
        must("finalize", *both)
        must("patch", "--bundle", bundle)
        assert not bundles.judge(bundle, source).errors


@pytest.mark.parametrize("stored", DECLARED, indirect=True)
def test_a_source_without_the_mtp_that_it_declares_is_whole_and_check_says_so(stored, tmp_path):
    source, layers, declared = stored
    _, out, _ = here("check", "--source", source, "--bundle", tmp_path / "bundle")
    (line,) = [line for line in out.splitlines() if " source: " in line]
    assert line.startswith("ok  source: DeepSeek-V4 of other sizes with")
    assert ("config.json" in line) == (layers < declared)


def test_a_bundle_that_lost_its_mtp_is_found_without_a_source(dspark, tmp_path):
    bundle = tmp_path / "bundle"
    must("convert", "--source", dspark, "--bundle", bundle)
    bundles.edit(bundle, lambda arrays: [arrays.pop(n) for n in list(arrays) if n[:4] == "mtp."])
    findings = bundles.judge(bundle, None, level=1)
    missing = next(finding for finding in findings if finding.name == "expert-missing")
    assert missing.count == 3 * 4 * 3


def contents(folder: Path) -> dict[str, bytes]:
    """A folder as it lies on the hub."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def files(stored) -> dict[str, bytes]:
    return contents(stored[0])


@pytest.mark.parametrize("stored", ["dspark_nextn1", "no_mtp"], indirect=True)
def test_it_comes_from_the_hub_whole_or_in_parts(stored, hub, tmp_path):  # noqa: F811
    """With LOW_DISK=1 and without: the same shards; and inspect finds nothing in the bundle."""
    (tmp_path / "whole").mkdir()
    parts, whole = Place(tmp_path, hub), Place(tmp_path / "whole", hub)
    parts.must("download")
    done = parts.run("convert")
    assert (done.returncode, done.stderr.count("note: ")) == (0, stored[1] < stored[2]), done.stderr
    command = [word for word in whole.command("download") if word != "--low-disk"]
    done = script(*command, env=whole.env)
    assert (done.returncode, done.stderr) == (0, "")
    must("convert", "--source", whole.source, "--bundle", whole.bundle, "--shard-bytes", "6e5")
    assert shards(whole.bundle) == shards(parts.bundle)
    must("finalize", "--source", whole.source, "--bundle", whole.bundle)
    must("patch", "--bundle", whole.bundle)
    hub.add("user/bundle", contents(whole.bundle))
    done = script("inspect_bundle", "--repo", "user/bundle", "--against", REPO, env=whole.env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("MTP left out" in done.stdout) == (stored[1] < stored[2])
