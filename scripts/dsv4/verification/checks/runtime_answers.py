"""Ask the installed runtimes how they read a bundle, and find the keys that change an answer.

Runs in the toolchain's Python, in one process, because importing the runtimes takes most of the
time. `loader_replay` runs their loaders on the headers. Each function of QUESTIONS asks a runtime's
own code about a folder with the bundle's JSON and no tensors: the tokens of built-in texts, the
parsers and the cache that it chooses, and how it samples for a request that sets nothing. The same
is asked about a folder with the right documents. A question that is answered otherwise is asked
again with keys put back, about PROBES times for a runtime, until one key explains it.

Reads FOLDER/request.json and FOLDER/headers, as runtime_outcomes.py writes them, and writes
FOLDER/results.json, whose form is RESULTS there. Removes no other file, unless run with
--end-with-parent, as verify does with its temporary folder.

    PYTHONPATH=scripts .venv/bin/python -m dsv4.verification.checks.runtime_answers --folder DIR
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dsv4.toolchain.child_process import end_with_parent
from dsv4.toolchain.hide_torchvision import hide
from dsv4.verification.checks.loader_replay import replay_loaders
from dsv4.verification.checks.runtime_causes import (
    Answers,
    Documents,
    Search,
    differing_keys,
    shorten,
)

PROBES = 12  # how often a runtime is asked again: each time it reads the tokenizer, or headers
TOKENIZER_FILES = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "processor",
                   "preprocessor", "vocab", "additional")  # fmt: skip
DEFAULTS = ("config.json", "generation_config.json", "jang_config.json")


# --- The questions ------------------------------------------------------------------------------


def ask_tokenizer(folder: Path, request: Answers) -> Answers:
    """Ask transformers' AutoTokenizer, by mlx_lm's loader where that is installed.

    vMLX's loader takes the same one.
    """
    try:
        from mlx_lm.utils import load_tokenizer
    except ImportError:
        from transformers import AutoTokenizer

        return tokenizer_answers(AutoTokenizer.from_pretrained(folder), request)
    return tokenizer_answers(load_tokenizer(folder, eos_token_ids=[1]), request)


def tokenizer_answers(tokenizer: Any, request: Answers) -> Answers:
    """Return tokens of the texts, the text of the ids, added tokens and the template."""
    texts = request["texts"]
    answers = {
        "tokens": [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts],
        "tokens of a completion": [list(tokenizer.encode(text)) for text in texts],
        "text": [tokenizer.decode(ids, skip_special_tokens=True) for ids in request["ids"]],
        "added tokens": dict(sorted(tokenizer.get_added_vocab().items())),
        "chat template": tokenizer.chat_template,
    }
    if hasattr(tokenizer, "tool_call_start"):
        answers["start of a tool call"] = tokenizer.tool_call_start
    return answers


def ask_mlx_vlm(folder: Path, request: Answers) -> Answers:
    """Ask mlx-vlm's processor, which the model's import registers."""
    import_mlx_vlm()
    from mlx_vlm.utils import load_processor

    return tokenizer_answers(load_processor(folder, add_detokenizer=False).tokenizer, request)


def import_mlx_vlm() -> None:
    """Import mlx-vlm's model. Raises ImportError when it has no DeepSeek-V4."""
    import mlx_vlm.models.deepseek_v4

    del mlx_vlm


def ask_mlx_vlm_sampling(folder: Path, request: Answers) -> Answers:
    """Ask mlx-vlm how it samples for a request that sets nothing."""
    import_mlx_vlm()
    from mlx_vlm.generate.common import resolve_sampling_defaults
    from mlx_vlm.utils import apply_generation_config_defaults, load_config

    config = apply_generation_config_defaults(SimpleNamespace(), load_config(folder))
    names = ("temperature", "top_p", "top_k")
    return {"sampling": dict(zip(names, resolve_sampling_defaults(config), strict=True))}


def ask_vmlx(folder: Path, request: Answers) -> Answers:
    """Ask vMLX's registry for family, cache and parsers, and its server for defaults."""
    from vmlx_engine.api.utils import is_mllm_model
    from vmlx_engine.model_config_registry import get_model_config_registry
    from vmlx_engine.reasoning import get_parser
    from vmlx_engine.tool_parsers import ToolParserManager

    model = get_model_config_registry().lookup(str(folder))
    hints = model.architecture_hints or {}
    return {
        "family": model.family_name,
        "cache": [model.cache_type, getattr(model, "cache_subtype", None)],
        "images": is_mllm_model(str(folder)),
        "tool parser": class_name(ToolParserManager.get_tool_parser, model.tool_parser),
        "reasoning parser": class_name(get_parser, model.reasoning_parser),
        "thinking": [model.think_in_template, getattr(model, "supports_thinking", None),
                     hints.get("default_enable_thinking")],
        **vmlx_defaults(folder, model, request),
    }  # fmt: skip


def class_name(get: Callable[[str], type], name: str | None) -> str | None:
    """Return the name of the class that `get` finds for a parser's name."""
    if name is None:
        return None
    try:
        return get(name).__name__
    except (KeyError, ValueError):
        return f"none is named {name}"


def vmlx_defaults(folder: Path, model: Any, request: Answers) -> Answers:
    """Return the defaults by vMLX's server; {} for a version that takes none from a bundle."""
    from vmlx_engine import server

    if not hasattr(server, "_model_effective_defaults_status"):
        return {}
    from vmlx_engine.loaders.load_jangtq_dsv4 import _dsv4_uses_jangtq_hydration
    from vmlx_engine.utils.multi_eos import collect_multi_eos_ids

    path = server._model_path = server._model_name = str(folder)
    modes = {}
    for thinking in (True, False):
        mode = {"enable_thinking": thinking}
        penalty = server._resolve_repetition_penalty(None, path, enable_thinking=thinking) or 1.0
        server._apply_bundle_sampling_mode(mode, SimpleNamespace(model=path))
        modes["thinking" if thinking else "chat"] = {**mode, "repetition_penalty": penalty}
    sampling = server._model_effective_defaults_status(path)["effective_defaults"]
    policy = server._resolve_dsv4_thinking_policy(
        requested_enable_thinking=None, tools_present=False, tool_choice=None,
        default_mode=server._jang_chat_default_mode(path),
    )  # fmt: skip
    stops, unknown = collect_multi_eos_ids(
        SimpleNamespace(convert_tokens_to_ids=request["token_id"]), path,
        registry_eos_tokens=model.eos_tokens, reasoning_parser=model.reasoning_parser,
        use_rust_tokenizer=False,
    )  # fmt: skip
    return {
        "sampling": {"repetition_penalty": 1.0, **sampling},  # 1: none
        "sampling by mode": modes,
        "thinking by default": policy.enable_thinking,
        "effort": server._dsv4_reasoning_contract(path)[1],
        "stop tokens": [*sorted(stops), *unknown],
        "experts in TurboQuant": _dsv4_uses_jangtq_hydration(path),
    }


# (the runtime, the question, how often it may be asked again, the files that it reads).
QUESTIONS: tuple[tuple[str, Callable[..., Answers], int, tuple[str, ...]], ...] = (
    ("transformers and mlx_lm", ask_tokenizer, PROBES, TOKENIZER_FILES),
    ("mlx-vlm", ask_mlx_vlm, PROBES, TOKENIZER_FILES),
    ("mlx-vlm", ask_mlx_vlm_sampling, 5 * PROBES, DEFAULTS),
    ("vMLX", ask_vmlx, 5 * PROBES, (*DEFAULTS, "tokenizer_config.json")),  # a millisecond each
)


def ask(question: Callable[..., Answers], folder: Path, request: Answers) -> Answers:
    """Return the answers, or {"loading": the error}. Raises ImportError where it is missing."""
    try:
        return json.loads(json.dumps(question(folder, request), default=str))
    except ImportError:
        raise
    except Exception as error:  # whatever a runtime raises is the answer
        return {"loading": f"{type(error).__name__}: {error}"}


# --- The answers, and the keys that make them differ --------------------------------------------


def write_documents(folder: Path, documents: Documents) -> None:
    """Write the files of a bundle that has no tensors."""
    for name, content in documents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")


def differing(found: Any, expected: Any, texts: list[str]) -> tuple[str, str]:
    """Return two answers as text; of lists and objects the first entry that differs."""
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(texts):
        at = next(
            i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]
        )
        return f"{shorten(texts[at])} → {shorten(found[at])}", shorten(expected[at])
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
        pair = ({key: one[key] for key in keys if key in one} for one in (found, expected))
        return tuple(map(shorten, pair))
    return shorten(found), shorten(expected)


def outcomes(folder: Path, number: int, request: Answers) -> tuple[int, list[Answers]]:
    """Return how many answers a question has, and those that are not the right documents'.

    number: of QUESTIONS. Raises ImportError for a runtime that is missing, or does not take the
    right documents.
    """
    runtime, question, left, start = QUESTIONS[number]

    def ask_about(documents: Documents) -> Answers:
        with tempfile.TemporaryDirectory(prefix="ask-", dir=folder) as place:
            write_documents(Path(place), documents)
            return ask(question, Path(place), request)

    own, right, restored = (
        {name: one for name, one in request[of].items() if name.startswith(start)}
        for of in ("documents", "right", "restored")
    )
    answers = ask_about(request["documents"])
    expected = dict(answers) if own == right else ask_about(request["right"])
    if "loading" in expected:
        raise ImportError(f"of the right documents it says {shorten(expected['loading'])}")
    expected |= {"tokens": request["ids"]} if "tokens" in expected else {}
    wrong = differing_keys(answers, expected)
    rest = {name: one for name, one in request["documents"].items() if name not in own}
    search = Search(lambda some: ask_about(rest | some), left, own, restored)
    causes = search.causes(answers, expected) if wrong else {}
    found = []
    for what in ["loading"] if "loading" in answers else wrong:
        shown = differing(answers.get(what), expected.get(what), request["texts"])
        found.append({"runtime": runtime, "what": what, "found": shown[0], "expected": shown[1],
                      "causes": causes.get(what, [])})  # fmt: skip
    return len(expected), found


def add_right_tokens(request: Answers, folder: Path) -> None:
    """Add the tokens of the texts by tokenizer.json alone, and its function token → id."""
    from tokenizers import Tokenizer

    path = folder / "right-tokenizer.json"
    write_documents(folder, {path.name: request["right"]["tokenizer.json"]})
    tokenizer = Tokenizer.from_file(str(path))
    texts = request["texts"]
    request["ids"] = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    request["token_id"] = tokenizer.token_to_id


def loader_results(folder: Path, request: Answers) -> dict[str, Answers]:
    """Return loader → its result on the headers, with the keys that make it fail as "causes"."""
    headers, names = folder / "headers", ("config.json", "jang_config.json")
    results = replay_loaders(headers, request["loaders"])
    own = {n: json.loads((headers / n).read_text()) for n in names if (headers / n).is_file()}
    for loader, result in results.items():

        def loads(documents: Documents, loader: str = loader) -> Answers:
            with tempfile.TemporaryDirectory(prefix="ask-", dir=folder) as place:
                for path in headers.iterdir():
                    if path.name not in own:
                        (Path(place) / path.name).symlink_to(path)
                write_documents(Path(place), documents)
                again = replay_loaders(Path(place), request["loaders"], (loader,))
                return {"loads": not is_wrong(again.get(loader, {}))}

        if is_wrong(result):
            restored = {name: request["loadable"][name] for name in own}
            search = Search(loads, PROBES, own, restored)
            causes = search.causes({"loads": False}, {"loads": True})
            result["causes"] = causes.get("loads", [])
    return results


def is_wrong(result: Answers) -> bool:
    """Return whether a loader failed, or a parameter and a tensor do not meet."""
    return any(result.get(key) for key in ("error", "unfed", "unused", "misfit"))


def hide_torch() -> None:
    """Hide torch: importing it takes longer than all runtimes, and only their images need it."""
    hide()
    sys.modules.setdefault("torch", None)


def answer_all(folder: Path) -> Answers:
    """Ask every runtime that is installed, and run the loaders."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    results: Answers = {"unasked": {}, "answers": {}, "outcomes": []}
    try:
        add_right_tokens(request, folder)
    except Exception as error:  # without a tokenizer nothing is asked; that it is missing is known
        results["unasked"]["every runtime"] = f"tokenizer.json: {error}"
        request["runtimes"] = []
    for number, (runtime, *_) in enumerate(QUESTIONS):
        if runtime not in request["runtimes"]:
            continue
        try:
            answers, found = outcomes(folder, number, request)
        except ImportError as error:
            results["unasked"][runtime] = f"{error}"
            continue
        results["answers"][runtime] = results["answers"].get(runtime, 0) + answers
        results["outcomes"] += found
    return {**results, "loaders": loader_results(folder, request)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--end-with-parent", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.end_with_parent:
        end_with_parent(args.folder)
    hide_torch()
    with contextlib.redirect_stdout(sys.stderr):
        results = answer_all(args.folder)
    (args.folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
