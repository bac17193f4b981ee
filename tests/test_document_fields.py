"""Every field of every JSON file of a bundle is compared; repair puts a wrong one right.

Catches: a field that may be changed, dropped, added or written twice without a finding; a finding
about a right bundle; a repair that leaves a wrong field, or an undo that does not undo.
"""

import copy
import json
import random
import shutil

import bundles
import here
import pytest
from conftest import SEED, must

from dsv4.storage.checkpoint import INDEX
from dsv4.verification.checks.steering import NEUTRAL, STEERS

FILES = (
    "config.json",
    "jang_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    INDEX,
)
# Changes that no check reports, and why: these are all.
SILENT: dict[tuple[str, str, str], str] = {}


@pytest.fixture(scope="module")
def right(native, source, tmp_path_factory):
    """A finished bundle, natively converted."""
    folder = shutil.copytree(native, tmp_path_factory.mktemp("fields") / "bundle")
    for name in ("finalize", "patch"):
        must(name, "--source", source, "--bundle", folder)
    return folder


def judge(bundle, source):
    """What level 1 finds."""
    return bundles.judge(bundle, source, level=1)


def fields(value, path=()):
    """Every path into a JSON value; of a list its own alone."""
    if path:
        yield path
    for key, one in value.items() if isinstance(value, dict) else ():
        yield from fields(one, (*path, key))


def holder_of(document, path):
    for key in path[:-1]:
        document = document[key]
    return document


def other(value, draw):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + draw.choice((1, 2, 7))
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, *value[:1]] if value else [1]
    return {"x": 1} if isinstance(value, dict) else 1


def mutations(document, name, draw):
    """Yield (what, path, document) for each field changed and dropped, and each key added."""
    left_out = {"weight_map"} if name == INDEX else set()
    paths = [path for path in fields(document) if path[0] not in left_out or len(path) == 1]
    labels = [path for path in paths if path[0] == "quantization" and len(path) > 1]
    kept = set(draw.sample(labels, 12)) if name == "config.json" else set(labels)
    for path in paths:
        if path in labels and path not in kept:
            continue
        for what in ("change", "clear", "drop"):
            made = copy.deepcopy(document)
            holder = holder_of(made, path)
            old = holder.pop(path[-1])
            if what != "drop":
                holder[path[-1]] = other(old, draw) if what == "change" else None
            yield what, path, made
    for key in STEERS.get(name, ()):
        path = tuple(key.split("."))
        made = copy.deepcopy(document)
        holder = made
        for part in path[:-1]:
            holder = holder.setdefault(part, {})
        if path[-1] not in holder:
            holder[path[-1]] = "x"
            yield "add", path, made
    for holder_path in [(), *(p for p in paths if isinstance(holder_of(document, (*p, "")), dict))]:
        if holder_path not in labels or holder_path in kept:
            made = copy.deepcopy(document)
            holder_of(made, (*holder_path, ""))["own_note"] = "x"
            yield "add", (*holder_path, "own_note"), made


@pytest.mark.full
def test_every_field_that_is_changed_dropped_or_added_is_a_finding(source, right, tmp_path):
    draw = random.Random(int(SEED))
    bundle = shutil.copytree(right, tmp_path / "bundle")
    assert judge(bundle, source).names == set()
    silent, number = [], 0
    for name in FILES:
        text = (bundle / name).read_text()
        for what, path, made in mutations(json.loads(text), name, draw):
            (bundle / name).write_text(json.dumps(made))
            number += 1
            if not judge(bundle, source).names:
                silent.append((name, what, ".".join(path)))
        (bundle / name).write_text(text)
    assert [one for one in silent if one not in SILENT] == []
    assert number > 500
    assert len(silent) <= 0.05 * number


def add(file, **values):
    """Return a change of a folder that adds keys to a file, which may be missing."""

    def change(folder):
        path = folder / file
        document = json.loads(path.read_text()) if path.is_file() else {}
        for dotted, value in values.items():
            *parts, key = dotted.split("__")
            holder = document
            for part in parts:
                holder = holder.setdefault(part, {})
            holder[key] = value
        path.write_text(json.dumps(document))

    return change


def write_twice(folder):
    path = folder / "jang_config.json"
    path.write_text(path.read_text().replace("{", '{"model_family": "llama",', 1))


# What passed on 2026-11-30, though it keeps a runtime from loading, or changes its tokens, parsers
# or defaults → the finding.
HARMFUL = {
    "jang's weight_format": (add("jang_config.json", weight_format="mxtq"), "document-differs"),
    "config's weight_format": (add("config.json", weight_format="mxtq"), "document-steers"),
    "split_special_tokens": (
        add("tokenizer_config.json", split_special_tokens=True), "document-steers"),
    "extra_special_tokens": (
        add("tokenizer_config.json", extra_special_tokens=["17"]), "document-steers"),
    "special_tokens_map.json": (
        add("special_tokens_map.json", additional_special_tokens=["17"]), "document-steers"),
    "added_tokens.json": (add("added_tokens.json", **{"17": 512}), "document-steers"),
    "model_family": (add("jang_config.json", model_family="llama"), "document-differs"),
    "capabilities": (
        add("jang_config.json", capabilities__cache_type="mamba"), "document-steers"),
    "cache_type": (add("jang_config.json", cache_type="mamba"), "document-steers"),
    "tool parser": (
        add("jang_config.json", chat__tool_calling__parser="hermes"), "document-differs"),
    "reasoning": (add("jang_config.json", chat__reasoning__parser="none"), "document-steers"),
    "sampling_defaults": (
        add("jang_config.json", chat__sampling_defaults__top_k=3), "sampling-differs"),
    "min_p": (add("generation_config.json", min_p=0.2), "generation-config-differs"),
    "repetition_penalty": (
        add("generation_config.json", repetition_penalty=1.3), "generation-config-differs"),
    "vision_n_layers": (add("config.json", vision_n_layers=1), "document-steers"),
    "a second program": (
        lambda folder: (folder / "encoding/json.py").write_text("raise SystemExit"),
        "document-steers"),
    "duplicate keys": (write_twice, "document-twice"),
    "rope factor": (add("config.json", rope_scaling__factor=8), "config-differs"),
    "top-k": (add("config.json", num_experts_per_tok=1), "config-differs"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HARMFUL)
def test_a_harmful_change_is_named_mended_and_undone(source, right, tmp_path, fault):
    change, finding = HARMFUL[fault]
    bundle = shutil.copytree(right, tmp_path / "bundle")
    change(bundle)
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    findings = judge(bundle, source)
    assert finding in {one.name for one in findings.errors}
    dry = here.must(
        "repair", "--bundle", bundle, "--source", source, "--without-loader", "--dry-run"
    )
    assert "would be" in dry
    here.must("repair", "--bundle", bundle, "--source", source, "--without-loader")
    assert judge(bundle, source).names == set()
    for name in FILES:
        assert json.loads((bundle / name).read_text()) == json.loads((right / name).read_text())
    here.must("repair", "--bundle", bundle, "--undo")
    assert before == {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def test_a_users_own_keys_are_the_mildest_finding_and_stay(source, right, tmp_path):
    bundle = shutil.copytree(right, tmp_path / "bundle")
    for name in FILES:
        add(name, my_note="bought in May")(bundle)
    findings = judge(bundle, source)
    assert findings.names == {"document-addition"}
    assert not findings.errors
    here.must("repair", "--bundle", bundle, "--source", source, "--without-loader")
    assert json.loads((bundle / "config.json").read_text())["my_note"]


def test_without_a_source_the_labels_prove_jang_config(right, tmp_path):
    bundle = shutil.copytree(right, tmp_path / "bundle")
    assert judge(bundle, None).names == set()
    add("jang_config.json", chat__tool_calling__parser="hermes")(bundle)
    assert judge(bundle, None).names == {"document-differs"}


def test_what_transformers_writes_is_no_finding(source, right, tmp_path):
    bundle = shutil.copytree(right, tmp_path / "bundle")
    add("tokenizer_config.json", **dict.fromkeys(NEUTRAL, "x"))(bundle)
    assert judge(bundle, source).names == set()
