"""Level 1: ask the installed runtimes how they read a bundle's documents, and check the answers.

runtime_answers.py asks them in the toolchain's Python, about the bundle's documents and about the
right ones: the source's tokenizer and generation_config.json, its config.json, and no settings for
vMLX, which then takes those of its own table for DeepSeek-V4. Without a source the right tokenizer
is tokenizer.json alone, and the right sampling that of generation_config.json. No file of the
bundle is run: keys that name code and the encoding file are left out.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from dsv4.errors import UserError
from dsv4.model import defaults
from dsv4.model.chat_template import (
    CHAT_TEMPLATE,
    EFFORT_KEY,
    conversations,
    effort_holder,
    folder_release,
)
from dsv4.model.configs import TURBO_CONFIG, chat_settings, known_fields, without_code
from dsv4.model.labels import RECORD, TURBO, has_turboquant
from dsv4.model.naming_schemes import MLX_LM, MLX_VLM, VMLX
from dsv4.model.source_format import MODEL_TYPE
from dsv4.storage import limits, own_folders
from dsv4.storage.checkpoint import INDEX, Checkpoint, read_json
from dsv4.toolchain import child_process
from dsv4.toolchain.python_env import environment_with_dsv4
from dsv4.verification.checks.loading import (
    CAUSES,
    PARAMETERS,
    add_loader_results,
    describe_causes,
    write_headers_only,
)
from dsv4.verification.checks.runtime_causes import put_back
from dsv4.verification.report.findings import Check, Findings
from dsv4.verification.scan import Scan

ANSWERS = "dsv4.verification.checks.runtime_answers"
LIMIT = 600  # seconds; the headers of 180 GB take some ten, a tokenizer of 130,000 tokens one
OUTCOME = {"runtime": str, "what": str, "found": str, "expected": str, "causes": CAUSES}
RESULTS = {
    "loaders": {str: ({"error": str, "causes?": CAUSES}, PARAMETERS)},
    "unasked": {str: str},
    "answers": {str: int},
    "outcomes": [OUTCOME],
}
# Of config.json: kept in the right documents, because labels are checked by themselves.
LABELS = ("quantization", "quantization_config")
# Of config.json: what this recipe adds to the source's.
RECIPE = (
    "_name_or_path",
    "routed_expert_bits",
    "group_size",
    "mxtq_seed",
    "rope_parameters",
    RECORD,
)
FORMAT_KEYS = ("weight_format", "method")  # of `quantization`, as vMLX reads them
AFFINE = ("affine", "jang_affine", "mxfp4", "mxfp8", "nvfp4")  # values of weight_format
# Question → the finding for a wrong answer.
FINDINGS = {
    "family": "runtime-family",
    "images": "runtime-family",
    "cache": "runtime-cache",
    "tool parser": "runtime-parser",
    "reasoning parser": "runtime-parser",
    "start of a tool call": "runtime-parser",
    "thinking": "runtime-parser",
    "thinking by default": "runtime-default",
    "effort": "runtime-default",
    "stop tokens": "runtime-default",
    "sampling": "runtime-default",
    "sampling by mode": "runtime-default",
    "loading": "runtime-refuses",
    "experts in TurboQuant": "runtime-refuses",
}
# Texts that tokenizers often split otherwise, beside the prompts of the built-in conversations.
TEXTS = (
    "", "17", "17+28=45", "1234567890", "3.14159", " two  spaces ", "\ttab\r\n\n\nlines\n", "a",
    "The quick brown fox", "don't CAN'T I'll", "snake_case camelCase", "for i in range(10):\n    x",
    "http://a.b/c?d=e&f", "日本語と中文", "Привет, мир", "مرحبا", "👩‍👩‍👧 🇩🇪", "e\u0301 é ﬁ ½",
    "▁Ġ", "<think>a</think>b", "<｜User｜>hi<｜Assistant｜>", "<|User|>", "<｜end▁of▁sentence｜>",
    "<｜DSML｜invoke name=\"x\">", "[BOS] <s> </s> <unk> <pad>",
)  # fmt: skip


def read_documents(folder: Path, names: list[str]) -> dict[str, Any]:
    """Return file → its JSON without keys that name code, or its text; broken ones are left out.

    Of tokenizer.json the text.
    """
    found: dict[str, Any] = {}
    for name in names:
        try:
            if name.endswith(".json") and name != "tokenizer.json":
                found[name] = without_code(read_json(folder / name))
            else:
                found[name] = limits.read_bounded(folder / name).decode("utf-8")
        except (UserError, OSError, UnicodeDecodeError):
            continue
    return found


def without_labels(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json without labels of modules: transformers would copy them for seconds."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    labels = config.get("quantization")
    if isinstance(labels, dict):
        plain = {key: value for key, value in labels.items() if not isinstance(value, dict)}
        config["quantization"] = plain
    return config


def affine_quantization(quantization: Any) -> Any:
    """Return `quantization` of either document without the keys that select TurboQuant."""
    if not isinstance(quantization, dict):
        return quantization
    return {key: value for key, value in quantization.items() if key not in FORMAT_KEYS}


def document_names(folder: Path) -> list[str]:
    """Return the JSON files and templates in a folder, without the index."""
    names = [path.name for path in folder.glob("*.json*")] + [CHAT_TEMPLATE]
    return sorted(n for n in names if n != INDEX and (folder / n).is_file() and n[0] != ".")


def documents_to_compare(
    bundle: Scan, source: Checkpoint | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the bundle's documents, `right_documents` and `restored_documents`."""
    folder = bundle.checkpoint.folder
    own = read_documents(folder, document_names(folder))
    right = right_documents(bundle, own, source)
    return own, right, restored_documents(bundle, own, right)


def right_documents(bundle: Scan, own: dict[str, Any], source: Checkpoint | None) -> dict[str, Any]:
    """Return the documents that give DeepSeek's tokens, parsers and sampling in every runtime."""
    theirs = read_documents(source.folder, document_names(source.folder)) if source else {}
    right = dict(theirs) if "tokenizer.json" in theirs else tokenizer_documents(own)
    right["config.json"] = right_config(bundle, own["config.json"], theirs.get("config.json"))
    generation = own.get(defaults.GENERATION, {})
    right[defaults.GENERATION] = defaults.reference(generation, theirs.get(defaults.GENERATION))
    right.pop("jang_config.json", None)
    if CHAT_TEMPLATE in own:
        right[CHAT_TEMPLATE] = own[CHAT_TEMPLATE]
    tokenizer = dict(right.get("tokenizer_config.json") or {})
    tokenizer.pop("chat_template", None)
    if template := (own.get("tokenizer_config.json") or {}).get("chat_template"):
        tokenizer["chat_template"] = template
    return {**right, "tokenizer_config.json": tokenizer}


def right_config(
    bundle: Scan, own: dict[str, Any], theirs: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the source's config.json, else the known keys of the bundle's, with its labels."""
    kept = LABELS if not has_turboquant(bundle.tensors) else (*LABELS, *TURBO_CONFIG)
    config = known_fields(own) if theirs is None else theirs
    if not any(name.startswith("vision.") for name in bundle.tensors):
        config = {k: v for k, v in config.items() if k != "vision_n_layers"}
    config = {k: v for k, v in config.items() if k not in (*LABELS, *TURBO_CONFIG)}
    config |= {key: own[key] for key in (*kept, *RECIPE) if key in own}
    if "quantization" in config and not has_turboquant(bundle.tensors):
        config["quantization"] = affine_quantization(config["quantization"])
    return config


def restored_documents(
    bundle: Scan, documents: dict[str, Any], right: dict[str, Any]
) -> dict[str, Any]:
    """Return the right documents with the settings for vMLX that this recipe writes, if any.

    They tell which keys to put back. They are no measure of what is right: that is vMLX's own
    table, for a bundle without settings.
    """
    own = documents.get("jang_config.json")
    if not isinstance(own, dict):
        return right
    form = own.get("weight_format")
    turbo = has_turboquant(bundle.tensors)
    chat = chat_settings(bundle.config)
    if holder := effort_holder(own):
        chat["reasoning"][EFFORT_KEY] = holder[EFFORT_KEY]
    jang = {"weight_format": TURBO if turbo else form if form in AFFINE else "affine"}
    jang |= {"model_family": MODEL_TYPE, "chat": chat}
    kept = ("quantization", "mxtq_bits", "mxtq_seed", "profile")
    jang |= {key: own[key] for key in kept if key in own}
    if "quantization" in jang and not turbo:
        jang["quantization"] = affine_quantization(jang["quantization"])
    return {**right, "jang_config.json": jang}


def tokenizer_documents(own: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer.json, and of tokenizer_config.json the keys that every tokenizer has."""
    kept = ("tokenizer_class", "bos_token", "eos_token", "pad_token", "model_max_length",
            "clean_up_tokenization_spaces", "add_bos_token", "add_eos_token")  # fmt: skip
    config = own.get("tokenizer_config.json") or {}
    config = {key: config[key] for key in kept if key in config}
    return {"tokenizer.json": own.get("tokenizer.json"), "tokenizer_config.json": config}


def runtimes_to_ask(bundle: Scan) -> list[str]:
    """Return the runtimes that load tensors with these names, and transformers.

    The names are those of QUESTIONS in runtime_answers.py.
    """
    promised = bundle.scheme.runtimes
    vlm = MLX_VLM in promised and not has_turboquant(bundle.tensors)
    vmlx = VMLX in promised or MLX_LM in promised
    return ["transformers and mlx_lm", *["mlx-vlm"] * vlm, *["vMLX"] * vmlx]


def write_request(
    bundle: Scan, source: Checkpoint | None, loaders: list[str], folder: Path
) -> None:
    """Write the input of runtime_answers.py: documents, right documents, texts and headers."""
    place = bundle.checkpoint.folder
    own, right, restored = documents_to_compare(bundle, source)
    release = folder_release(source.folder if source else place) or "first"
    prompts = [prompt for _, _, prompt in conversations(release)]
    loadable = {"config.json": known_fields(right["config.json"]),
                "jang_config.json": restored.get("jang_config.json")}  # fmt: skip
    request = {
        name: {**documents, "config.json": without_labels(documents["config.json"])}
        for name, documents in (("documents", own), ("right", right), ("restored", restored))
    }
    request |= {"loadable": loadable, "texts": [*TEXTS, *prompts], "loaders": loaders,
                "runtimes": runtimes_to_ask(bundle)}  # fmt: skip
    (folder / "headers").mkdir()
    write_headers_only(bundle, folder / "headers")
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")


def ask_runtimes(
    bundle: Scan, source: Checkpoint | None, python: Path, loaders: list[str]
) -> dict[str, Any]:
    """Return the results of runtime_answers.py. Raises UserError when there are none."""
    with tempfile.TemporaryDirectory(prefix="hollow-") as name:
        folder = own_folders.make_own(Path(name))  # if this process is killed, the child removes it
        write_request(bundle, source, loaders, folder)
        what, log = f"{ANSWERS} in {python}", folder / "log"
        command = [str(python), "-m", ANSWERS, "--folder", name, "--end-with-parent"]
        status = child_process.run_child(command, environment_with_dsv4(), log, LIMIT, what)
        if status or not (folder / "results.json").is_file():
            raise UserError(what, child_process.last_log_line(log), "a result", "make check")
        return read_json(folder / "results.json", RESULTS)


def mended_documents(
    bundle: Scan, source: Checkpoint | None, python: Path, loaders: list[str]
) -> dict[str, tuple[dict[str, Any] | None, list[str]]]:
    """Return file → (its content with the keys put back that cause outcomes, these keys).

    The content is None for a file that is to be removed. Raises UserError when the runtimes cannot
    be asked.
    """
    results = ask_runtimes(bundle, source, python, loaders)
    causes = [cause for one in (*results["outcomes"], *results["loaders"].values())
              for cause in one.get("causes", [])]  # fmt: skip
    own, _, restored = documents_to_compare(bundle, source)
    files: dict[str, list[str]] = {}
    for cause in causes:
        files.setdefault(cause["file"], []).append(".".join(cause["path"]))
    changes = [(cause["file"], tuple(cause["path"])) for cause in causes]
    mended = put_back(own, restored, changes)
    return {name: (mended.get(name), sorted(set(keys))) for name, keys in files.items()
            if not isinstance(mended.get(name), str)}  # fmt: skip


def check_runtimes(
    bundle: Scan, source: Checkpoint | None, python: Path, loaders: list[str], findings: Findings
) -> list[Check]:
    """Run the loaders of these runtimes on the headers, and compare every runtime's answers."""
    try:
        results = ask_runtimes(bundle, source, python, loaders)
    except UserError as stop:
        findings.add("loader-not-checked", f"{python}", f"{stop}", "the loaders there")
        return [Check("parameters replayed", 0)]
    return [*add_loader_results(results["loaders"], findings), add_outcomes(results, findings)]


def add_outcomes(results: dict[str, Any], findings: Findings) -> Check:
    """Report the answers that are not those of the right documents, with the keys that do it.

    Of a runtime's answers that the same keys change, one finding of a name is enough.
    """
    seen = []
    for outcome in results["outcomes"]:
        name = FINDINGS.get(outcome["what"], "tokenizer-outcome")
        one = name, outcome["runtime"], outcome["causes"]
        if one in seen:
            continue
        seen += [one] if outcome["causes"] else []
        where = f"{outcome['runtime']}: {outcome['what']}"
        findings.add(
            name, where, outcome["found"] + describe_causes(outcome["causes"]), outcome["expected"]
        )
    missing = [f"{name} was not asked: {why}" for name, why in results["unasked"].items()]
    note = "; ".join([", ".join(results["answers"]), *missing])
    return Check("answers of runtimes", sum(results["answers"].values()), note, optional=True)
