"""finalize and patch: files, stop tokens, template and labels, written once and kept.

Catches: an EOS list that a runtime does not read, a template that renders another prompt than the
encoding file, labels that disagree with the tensors, a second run that changes something.
"""

import hashlib
import importlib.util
import json

import pytest
from conftest import must, refusal
from random_talk import OFFICIAL

from dsv4.model import template_sandbox
from dsv4.model.chat_template import EARLIER, is_own_template, template_text

# What this project wrote until November 2026.
BEFORE = (
    "{{- '<｜begin▁of▁sentence｜>' -}}{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- message.content -}}"
    "{%- elif message.role in ['user', 'developer'] -%}{{- '<｜User｜>' + message.content -}}"
    "{%- elif message.role == 'tool' -%}"
    "{{- '<｜User｜><tool_result>' + message.content + '</tool_result>' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- '<｜Assistant｜></think>' + (message.content or '') + '<｜end▁of▁sentence｜>' -}}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' -}}"
    "{{- '<think>' if enable_thinking | default(false) else '</think>' -}}{%- endif -%}"
)


def read(folder, name):
    return json.loads((folder / name).read_text())


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_stop_tokens_stand_where_each_runtime_reads_them(good):
    tokens = {t["content"]: t["id"] for t in read(good, "tokenizer.json")["added_tokens"]}
    eos = [tokens["<｜end▁of▁sentence｜>"], tokens["<｜User｜>"]]
    assert read(good, "config.json")["eos_token_id"] == eos
    assert read(good, "generation_config.json")["eos_token_id"] == eos
    assert read(good, "tokenizer_config.json")["eos_token"] == "<｜end▁of▁sentence｜>"


def test_the_labels_stand_under_every_name_in_use(good):
    labels = read(good, "config.json")["quantization"]
    assert (labels["bits"], labels["group_size"], labels["mode"]) == (8, 32, "affine")
    expert = {"bits": 4, "group_size": 32, "mode": "affine"}
    for name in (
        "model.layers.3.mlp.switch_mlp.down_proj",
        "language_model.model.layers.0.ffn.switch_mlp.up_proj",
        "layers.2.ffn.experts.7.w1",
        "mtp.0.ffn.experts.0.w3",
    ):
        assert labels[name] == expert
    assert read(good, "jang_config.json")["quantization"]["group_size"] == 32
    assert "quantization_config" not in read(good, "config.json")


def test_no_document_limits_answers_or_says_how_to_sample(good, native):
    """vMLX would take it for every request without max_tokens, before generation_config.json."""
    for folder in (good, native):
        assert "sampling_defaults" not in read(folder, "jang_config.json")["chat"]
    assert "max_new_tokens" not in read(good, "generation_config.json")


def test_a_second_run_changes_nothing(source, good_copy):
    before = contents(good_copy)
    must("requantize", "--source", source, "--bundle", good_copy)
    must("finalize", "--source", source, "--bundle", good_copy)
    must("patch", "--bundle", good_copy)
    assert contents(good_copy) == before


def test_a_dry_run_says_what_would_change_and_changes_nothing(source, stock_copy):
    must("requantize", "--source", source, "--bundle", stock_copy)
    before = contents(stock_copy)
    assert "would set tokenizer_config.json: chat_template" in must(
        "patch", "--bundle", stock_copy, "--dry-run"
    )
    assert contents(stock_copy) == before


def templates(folder):
    """What stands in chat_template.jinja and in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    text = file.read_bytes().decode() if file.is_file() else None
    return text, read(folder, "tokenizer_config.json").get("chat_template")


def give_templates(folder, in_file, in_config):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(read(folder, path.name) | {"chat_template": in_config}))
    (folder / "chat_template.jinja").write_text(in_file, newline="")


def test_one_template_stands_where_each_runtime_reads_it(good):
    assert templates(good) == (template_text("nano"), template_text("nano"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("", "{{ mine }}"), ("{{ mine }}", "{{ mine }}")),
        (("{{ mine }}", ""), ("{{ mine }}", "{{ mine }}")),
        (("{{ one }}\n", "{{ another }}"), ("{{ one }}\n", "{{ another }}")),
        ((template_text("first"), "{{ mine }}"), ("{{ mine }}", "{{ mine }}")),
        ((template_text("0731"), template_text("first")),
         (template_text("nano"), template_text("nano"))),
        (("", [{"name": "default", "template": "x"}]),
         (template_text("nano"), [{"name": "default", "template": "x"}])),
    ],
)  # fmt: skip
def test_somebody_elses_template_is_kept_and_ours_is_renewed(good_copy, before, after):
    give_templates(good_copy, *before)
    must("patch", "--bundle", good_copy)
    assert templates(good_copy) == after


def test_the_template_of_before_is_renewed(good_copy):
    assert hashlib.sha256(BEFORE.encode()).hexdigest() == EARLIER
    assert is_own_template(BEFORE)
    assert not is_own_template(BEFORE + " ")
    give_templates(good_copy, BEFORE, BEFORE)
    must("patch", "--bundle", good_copy)
    assert templates(good_copy) == (template_text("nano"), template_text("nano"))


@pytest.mark.parametrize(("encoding", "release"), [(OFFICIAL, "0731"), (None, "first")])
def test_the_template_is_made_for_the_release_of_the_encoding(good_copy, encoding, release):
    unknown = b"def encode_messages(): ..."
    program = encoding.read_bytes() if encoding else unknown
    (good_copy / "encoding" / "encoding_dsv4.py").write_bytes(program)
    must("patch", "--bundle", good_copy)
    assert templates(good_copy) == (template_text(release), template_text(release))


def test_finalize_keeps_the_template_that_patch_wrote(source_copy, good_copy):
    (source_copy / "chat_template.jinja").write_text("{{ the_sources }}")
    must("finalize", "--source", source_copy, "--bundle", good_copy)
    assert templates(good_copy)[0] == template_text("nano")
    (good_copy / "chat_template.jinja").unlink()
    must("finalize", "--source", source_copy, "--bundle", good_copy)
    assert templates(good_copy)[0] == "{{ the_sources }}"


def test_labels_are_refused_to_a_stock_bundle(stock_copy):
    assert "run requantize" in refusal("patch", "--bundle", stock_copy)


def test_a_tokenizer_without_the_special_tokens_is_refused(good_copy):
    path = good_copy / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    assert "<｜end▁of▁sentence｜>" in refusal("patch", "--bundle", good_copy)


def test_finalize_brings_back_what_is_missing_and_keeps_what_patch_wrote(source, good_copy):
    (good_copy / "encoding" / "encoding_dsv4.py").unlink()
    (good_copy / "tokenizer.json").write_text("{}")
    edited = (good_copy / "tokenizer_config.json").read_bytes()
    must("finalize", "--source", source, "--bundle", good_copy)
    for name in ("encoding/encoding_dsv4.py", "tokenizer.json"):
        assert (good_copy / name).read_bytes() == (source / name).read_bytes()
    assert (good_copy / "tokenizer_config.json").read_bytes() == edited


def test_finalize_takes_everything_from_a_reference(source, good, stock_copy):
    must("finalize", "--source", source, "--bundle", stock_copy, "--reference", good)
    name = "tokenizer_config.json"
    assert (stock_copy / name).read_bytes() == (good / name).read_bytes()


def test_finalize_without_an_encoding_stops(source_copy, good_copy):
    (source_copy / "encoding" / "encoding_dsv4.py").unlink()
    line = refusal("finalize", "--source", source_copy, "--bundle", good_copy)
    assert "encoding/encoding_dsv4.py" in line
    assert "REFERENCE" in line


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("system", ["", "You are a helpful AI assistant."])
def test_the_template_renders_what_the_encoding_file_renders(source, system, thinking):
    path = source / "encoding" / "encoding_dsv4.py"
    spec = importlib.util.spec_from_file_location("encoding_of_the_source", path)
    encoding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(encoding)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": "What is 17+28?"},
        {"role": "assistant", "content": "45"},
        {"role": "user", "content": "And 1+1?"},
    ]
    rendered = template_sandbox.environment().from_string(template_text("nano")).render(
        messages=messages, add_generation_prompt=True, enable_thinking=thinking
    )  # fmt: skip
    mode = "thinking" if thinking else "chat"
    assert rendered == encoding.encode_messages(messages, thinking_mode=mode)
