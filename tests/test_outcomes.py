"""Ask the installed runtimes how they read a bundle's documents, and test the findings.

Catches: a key that passes every comparison of documents and changes tokens, parsers, cache or
sampling in a runtime; a right bundle, of any quantizer or maker, for which such a change is said.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import edit_json
from conftest import NANO, ROOT, made_once, must
from test_layouts import RELAID, specimen  # noqa: F401

from dsv4.model.source import open_source
from dsv4.model.special_tokens import BOS
from dsv4.toolchain.python_env import environment_with_dsv4
from dsv4.verification.checks import check_all, loading, runtime_outcomes
from dsv4.verification.report.findings import Findings
from dsv4.verification.scan import scan

NEW = ROOT / ".toolchain/new/bin/python"
# Asks about many bundles in one process, as runtime_answers.py asks about one.
ASK = """
import json, sys
from pathlib import Path
from dsv4.verification.checks.runtime_answers import answer_all, hide_torch
hide_torch()
for folder in map(Path, sys.argv[1:]):
    (folder / "results.json").write_text(json.dumps(answer_all(folder)))
"""
CONFIG, JANG, GENERATION = "config.json", "jang_config.json", "generation_config.json"
TOKENIZER = "tokenizer_config.json"
Mutation = tuple[str, Callable[[dict], object]]


def put(path: str, value: object) -> Callable[[dict], object]:
    """Return a change that sets a key, by its path with points; None removes it."""

    def change(document: dict) -> None:
        *parents, key = path.split(".")
        for parent in parents:
            document = document.setdefault(parent, {})
        document[key] = value
        if value is None:
            del document[key]

    return change


# A change → the findings that name the file and key; the runtime that says so.
HARMFUL = [
    (JANG, "weight_format", "mxtq", "runtime-refuses"),
    (CONFIG, "weight_format", "mxtq", "runtime-refuses"),
    (CONFIG, "vision_n_layers", 1, ""),
    (TOKENIZER, "split_special_tokens", True, "tokenizer-outcome"),
    (TOKENIZER, "extra_special_tokens", {"a": "17"}, "tokenizer-outcome"),
    (TOKENIZER, "extra_special_tokens", ["never in a text"], "tokenizer-outcome"),
    (TOKENIZER, "added_tokens_decoder", {"512": {"content": "17"}}, "tokenizer-outcome"),
    ("special_tokens_map.json", "additional_special_tokens", ["17"], "tokenizer-outcome"),
    ("added_tokens.json", "17", 512, "tokenizer-outcome"),
    (JANG, "model_family", "llama", "runtime-family"),
    (JANG, "model_family", "qwen3_5", "runtime-family"),
    (JANG, "capabilities", {"family": "mamba", "cache_type": "mamba"}, "runtime-cache"),
    (JANG, "capabilities", {"modality": "vision", "family": "deepseek_v4"}, "runtime-family"),
    (JANG, "capabilities.cache_subtype", "zaya_cca", "runtime-cache"),
    (JANG, "cache_type", "mamba", "runtime-cache"),
    (JANG, "cache_subtype", "x", "runtime-cache"),
    (JANG, "chat.tool_calling.parser", "qwen", "runtime-parser"),
    (JANG, "chat.tool_calling.parser", "no such one", "runtime-parser"),
    (JANG, "chat.reasoning.parser", "none", "runtime-parser"),
    (JANG, "chat.reasoning.supported", False, "runtime-parser"),
    (JANG, "chat.reasoning.default_effort", "max", "runtime-default"),
    (JANG, "chat.reasoning.default_mode", "thinking", "runtime-default"),
    (JANG, "chat.stop_token_ids", [31], "runtime-default"),
    (TOKENIZER, "chat.role_tokens.user", "<think>", "runtime-default"),
    (CONFIG, "vision_config", {"a": 1}, "runtime-family"),
    (JANG, "chat.sampling_defaults.temperature", 0.6, "runtime-default"),
    (JANG, "chat.sampling_defaults.max_new_tokens", 300, "runtime-default"),
    (JANG, "chat.sampling_defaults.repetition_penalty_thinking", 1.2, "runtime-default"),
    (JANG, "chat.sampling_modes.thinking.top_p", 0.5, "runtime-default"),
    (GENERATION, "repetition_penalty", 1.3, "runtime-default"),
    (GENERATION, "min_p", 0.2, "runtime-default"),
    (GENERATION, "max_new_tokens", 100, "runtime-default"),
    (CONFIG, "top_p", 0.3, "runtime-default"),
    (TOKENIZER, "tool_parser_type", "json_tools", "runtime-parser"),
]
HARMLESS = [
    (JANG, "profile", "JANG_9"),
    (JANG, "chat.role_tokens", {}),
    (JANG, "anything", {"else": [1]}),
    (CONFIG, "routed_expert_bits", 2),
    (TOKENIZER, "model_max_length", 5),
    (TOKENIZER, "tokenizer_class", "TokenizersBackend"),
    (TOKENIZER, "added_tokens_decoder", {"0": {"content": BOS, "special": True}}),
    (GENERATION, "transformers_version", "5"),
    (GENERATION, "do_sample", True),  # without a temperature nothing samples
]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    """The nano as this recipe makes it."""
    return nano_bundle(tmp_path_factory, "mlx")


def nano_bundle(tmp_path_factory, quantizer: str) -> Path:
    def make(folder: Path) -> None:
        must("convert", "--source", NANO, "--bundle", folder, "--quantizer", quantizer)
        must("finalize", "--source", NANO, "--bundle", folder)
        must("patch", "--bundle", folder)

    return made_once(tmp_path_factory, f"nano-{quantizer}", make)


def ask(folders: list[Path], work: Path, python: Path = NEW, source: Path | None = NANO) -> list:
    """Return (findings, checks) of each bundle, by one process of `python`."""
    opened = open_source(source) if source else None
    asked = []
    for number, folder in enumerate(folders):
        place = work / f"ask-{number}"
        place.mkdir(parents=True)
        found = scan(folder, Findings())
        loaders = check_all.promised_loaders(found)
        runtime_outcomes.write_request(found, opened, loaders, place)
        asked.append(place)
    done = subprocess.run(
        [python, "-c", ASK, *asked], env=environment_with_dsv4(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = []
    for place in asked:
        answered, findings = json.loads((place / "results.json").read_text()), Findings()
        checks = loading.add_loader_results(answered["loaders"], findings)
        results.append((findings, [*checks, runtime_outcomes.add_outcomes(answered, findings)]))
    return results


def changed(folder: Path, name: str, change: Callable[[dict], object]) -> Path:
    """Change a JSON file of a bundle, or add one; return the bundle."""
    path = folder / name
    if not path.exists():
        path.write_text("{}")
    edit_json(path, change)
    return folder


def test_every_harmful_change_is_named_with_its_key(bundle, tmp_path):
    folders = [
        changed(shutil.copytree(bundle, tmp_path / f"{i}"), name, put(key, value))
        for i, (name, key, value, _) in enumerate(HARMFUL)
    ]
    silent = []
    for (name, key, value, finding), (findings, _) in zip(
        HARMFUL, ask(folders, tmp_path / "work"), strict=True
    ):
        said = findings.text()
        named = findings.errors and f"by {name}: {key}" in said
        if finding not in findings.names | {""} or not named:
            silent.append((name, key, value, said))
    assert not silent, "\n".join(map(str, silent))


def test_a_harmless_change_is_no_outcome(bundle, tmp_path):
    folders = [
        changed(shutil.copytree(bundle, tmp_path / f"{i}"), name, put(key, value))
        for i, (name, key, value) in enumerate(HARMLESS)
    ]
    for findings, _ in ask([bundle, *folders], tmp_path / "work"):
        assert findings.names == set(), findings.text()


# --- Right bundles ------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("python", [NEW, Path(sys.executable)], ids=["new", "old"])
def test_no_bundle_of_this_recipe_has_an_outcome_of_its_own(tmp_path_factory, tmp_path, python):
    names = ("mlx", "mxfp4", "lossless", "turboquant2", "small", "affine3g64")
    bundles_made = [nano_bundle(tmp_path_factory, name) for name in names]
    for source in (NANO, None):
        work = tmp_path / f"{source is None}"
        asked = ask(bundles_made, work, python, source)
        for name, (findings, checks) in zip(names, asked, strict=True):
            assert findings.names == set(), (name, findings.text())
            said = " ".join(check.text() for check in checks)
            assert ("mlx-vlm was not asked" in said) == (python != NEW and name != "turboquant2")


# Findings of right bundles: jang's converters set sampling, mlx-vlm's config.json makes vMLX expect
# images.
OUTCOMES = {
    "jang-affine2": {"runtime-default"},
    "jangtq-2": {"runtime-default"},
    "jang, prestacked": {"runtime-family"},
}


@pytest.mark.full
@pytest.mark.parametrize("source", [NANO, None], ids=["source", "no source"])
def test_of_other_makers_bundles_only_what_is_known_is_wrong(specimen, tmp_path, source):  # noqa: F811
    names = ("vlm-affine8", "jang-affine2", "jangtq-2", *RELAID)
    asked = ask([specimen(name) for name in names], tmp_path / "work", NEW, source)
    for name, (findings, _) in zip(names, asked, strict=True):
        wrong = {one for one in findings.names if not one.startswith("loader-")}
        assert wrong == OUTCOMES.get(name, set()), findings.text()


WITHOUT = """#!{python}
import importlib.metadata, runpy, sys
sys.modules |= dict.fromkeys(("jang_tools", "vmlx_engine", "mlx_lm"))
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("none" if name in ("jang", "vmlx") else name)
how, what, *_ = sys.argv[1:]
sys.argv = sys.argv[2:]
if how == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
exec(what)
"""


@pytest.mark.full
def test_a_runtime_that_is_missing_is_not_asked(bundle, tmp_path):
    """As in STACK=vlm, which has mlx-vlm alone."""
    python = tmp_path / "python"
    python.write_text(WITHOUT.format(python=NEW))
    python.chmod(0o755)
    said = must("verify", "--bundle", bundle, "--level", 1, "--python", python)
    assert "parameters fed by mlx-vlm" in said
    assert "vMLX was not asked" in said


# --- Repair -------------------------------------------------------------------------------------

PLANTED = [
    (JANG, {"weight_format": "mxtq", "cache_type": "mamba", "capabilities": {"tool_parser": "x"}}),
    (CONFIG, {"vision_n_layers": 1}),
    (TOKENIZER, {"split_special_tokens": True, "extra_special_tokens": ["17"]}),
    ("added_tokens.json", {"17": 512}),
]


@pytest.mark.full
def test_repair_puts_back_the_keys_that_a_runtime_takes_wrongly(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    for name, content in PLANTED:
        changed(folder, name, lambda document, content=content: document.update(content))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    said = must("repair", "--bundle", folder, "--python", NEW)
    assert "level 1 holds" in said
    for name, content in PLANTED:
        lines = " ".join(line for line in said.splitlines() if line.startswith(f"{name}: "))
        assert all(key in lines for key in content), said
    must("repair", "--bundle", folder, "--undo")
    assert {path: path.read_bytes() for path in before} == before
