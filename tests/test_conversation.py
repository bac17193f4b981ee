"""verify proves the conversation, repair mends it: tokenizer, special tokens, encoding, templates.

Catches: a bundle whose text becomes other tokens, whose templates lose tools or contradict, whose
encoding file is not the source's; a repair that leaves one of these, an undo that does not undo.
"""

import json
import shutil
from pathlib import Path

import bundles
import pytest
from conftest import NANO, must

from dsv4.model.chat_template import conversations, template_text
from dsv4.verification.checks import conversation
from dsv4.verification.checks.conversation import features_used, template_faults

JINJA = "chat_template.jinja"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk") / "bundle"
    for name in ("convert", "finalize", "patch"):
        must(name, "--source", NANO, "--bundle", folder)
    return folder


def edit(folder: Path, name: str, change) -> None:
    """Change a JSON document by a function."""
    path = folder / name
    document = json.loads(path.read_text()) if path.is_file() else {}
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False))


def rotate(tokenizer: dict) -> None:
    """Every token gets the id of the next."""
    vocabulary = tokenizer["model"]["vocab"]
    names, ids = list(vocabulary), list(vocabulary.values())
    tokenizer["model"]["vocab"] = dict(zip(names, [*ids[1:], ids[0]], strict=True))


def without_tools(text: str) -> str:
    return text.replace("tools", "no_tools")


FAULTS = {
    "tokenizer-differs": lambda b: edit(b, "tokenizer.json", rotate),
    "special-token-wrong": lambda b: edit(
        b, "tokenizer_config.json", lambda d: d.update(eos_token="<｜User｜>")
    ),
    "special-token-wrong by id": lambda b: edit(
        b, "config.json", lambda d: d.update(bos_token_id=7)
    ),
    "special-token-wrong in the map": lambda b: edit(
        b, "special_tokens_map.json", lambda d: d.update(bos_token="x")
    ),
    "tokenizer-config-differs": lambda b: edit(
        b, "tokenizer_config.json", lambda d: d.update(tokenizer_class="Other")
    ),
    "tokenizer-config-differs by an added token": lambda b: edit(
        b, "tokenizer_config.json", lambda d: d.update(added_tokens_decoder={"5": {"content": "a"}})
    ),
    "token-out-of-range": lambda b: edit(
        b, "tokenizer.json", lambda d: d["added_tokens"].append({"content": "new", "id": 512})
    ),
    "encoding-differs": lambda b: (b / "encoding/encoding_dsv4.py").write_text("raise SystemExit"),
    "chat-template-wrong": lambda b: (b / JINJA).write_text(CHATML),
    "chat-templates-differ": lambda b: (b / JINJA).write_text("{#- -#}" + (b / JINJA).read_text()),
    "chat-template-file-missing": lambda b: (b / JINJA).unlink(),
    "chat-template-missing": lambda b: edit(
        b, "tokenizer_config.json", lambda d: d.pop("chat_template")
    ),
    "chat-template-incomplete": lambda b: (b / JINJA).write_text(
        without_tools((b / JINJA).read_text())
    ),
    "chat-template-wrong by time": lambda b: (b / JINJA).write_text(
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_mended_and_undone(right, tmp_path, fault):
    bundle = shutil.copytree(right, tmp_path / "bundle")
    FAULTS[fault](bundle)
    if fault == "tokenizer-config-differs" and "tokenizer_class" not in json.loads(
        (NANO / "tokenizer_config.json").read_text()
    ):
        pytest.skip("the nano's tokenizer_config.json names no class")
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    assert fault.split(" ")[0] in bundles.judge(bundle, NANO, level=1).names
    must("repair", "--bundle", bundle, "--source", NANO, "--without-loader")
    assert not bundles.judge(bundle, NANO, level=1).names
    must("repair", "--bundle", bundle, "--undo")
    assert before == {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}


def test_a_tokenizer_that_transformers_wrote_anew_is_the_same(right, tmp_path):
    bundle = shutil.copytree(right, tmp_path / "bundle")
    added = json.loads((bundle / "tokenizer.json").read_text())["added_tokens"]
    said = {
        "tokenizer_class": "TokenizersBackend", "backend": "tokenizers",
        "added_tokens_decoder": {f"{one['id']}": one for one in added},
    }  # fmt: skip
    edit(bundle, "tokenizer.json", lambda d: d.update(post_processor=conversation.NO_OP_PROCESSOR))
    edit(bundle, "tokenizer_config.json",
         lambda d: (d.update(said), d.pop("add_bos_token"), d.pop("add_eos_token")))  # fmt: skip
    assert not bundles.judge(bundle, NANO, level=1).names
    adds = {**conversation.NO_OP_PROCESSOR, "single": [conversation.SECOND, conversation.FIRST]}
    edit(bundle, "tokenizer.json", lambda d: d.update(post_processor=adds))
    edit(bundle, "tokenizer_config.json", lambda d: d.update(add_bos_token=True))
    names = bundles.judge(bundle, NANO, level=1).names
    assert names == {"tokenizer-differs", "tokenizer-config-differs"}


def test_templates_are_mended_without_a_source(right, tmp_path):
    bundle = shutil.copytree(right, tmp_path / "bundle")
    (bundle / JINJA).write_text(CHATML)
    must("repair", "--bundle", bundle, "--without-loader")
    assert (bundle / JINJA).read_text() == template_text("nano")


def test_an_unknown_encoding_is_code_that_vmlx_will_run(right, tmp_path):
    bundle = shutil.copytree(right, tmp_path / "bundle")
    path = bundle / "encoding/encoding_dsv4.py"
    path.write_text(path.read_text() + "\n# mine\nprint('x')\n")
    findings = bundles.judge(bundle, None, level=1)
    assert "encoding-unknown" in findings.names
    assert not findings.errors
    place = next(iter(findings)).places[0]
    assert "unknown code that vMLX will run" in place["found"]


@pytest.mark.parametrize("release", ["first", "0731", "nano"])
def test_the_recipes_template_loses_nothing_and_another_releases_loses_efforts(release):
    assert template_faults(template_text(release), release) == ()
    other = "0731" if release == "first" else "first"
    assert template_faults(template_text(other), release)
    found = set().union(*(features_used(talk) for _, talk, _ in conversations(release)))
    assert found == {"tools", "thinking", "efforts"}
