"""Write the metadata that runtimes need into the bundle's JSON files.

Each runtime reads other files (found by experiment), so all are told:

| file                   | what                                                | for              |
|------------------------|-----------------------------------------------------|------------------|
| config.json            | quantization labels under every name in use         | all              |
| config.json            | eos_token_id: end of sentence and <｜User｜>        | vMLX 1.3.97      |
| generation_config.json | the same list                                       | mlx_lm, mlx-vlm  |
| tokenizer_config.json  | bos_token, eos_token; a chat_template if none is    | vMLX 1.3.97      |
| jang_config.json       | quantization.group_size 32 (else 64 is assumed)     | vMLX 1.6.81      |
| jang_config.json       | source_model, source: repo, commit, files' hashes   | readers          |

The converter writes the source's local path into source_model; a bundle that may be published names
the repository and commit instead, as download recorded them, or says that they were not recorded.
Ids come from the bundle's tokenizer, labels from the tensors as they lie on disk. Idempotent; each
file is replaced whole. Takes seconds. --dry-run says what would change.

    .venv/bin/python scripts/patch.py --bundle DIR [--source DIR] [--dry-run]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from dsv4.chat import BOS, EOS, TEMPLATE, token_ids
from dsv4.checkpoint import Checkpoint, expert_bases, open_bundle, read_json
from dsv4.durable import write_json
from dsv4.labels import GROUP_SIZE, expert_label, quantization
from dsv4.origin import provenance
from dsv4.stop import Stop, run

UNRECORDED = "not recorded"


def patched(bundle: Checkpoint, source: Path | None = None) -> dict[str, dict[str, Any]]:
    """File name → content that it should have, for the four JSON files."""
    folder = bundle.folder
    return {
        "config.json": config(bundle, expert_label(bundle)),
        "generation_config.json": generation_config(folder),
        "tokenizer_config.json": tokenizer_config(folder),
        "jang_config.json": jang_config(folder, source),
    }


def config(bundle: Checkpoint, expert: dict[str, Any] | None) -> dict[str, Any]:
    """config.json with the stop tokens, and labels of experts that are stored as `expert` says.

    None: the labels stay as they are.
    """
    content = copy.deepcopy(bundle.config)
    if expert is not None:
        content.pop("quantization_config", None)
        content["quantization"] = quantization(expert_bases(bundle), expert)
    content["eos_token_id"] = token_ids(bundle.folder)
    return content


def generation_config(folder: Path) -> dict[str, Any]:
    eos = token_ids(folder)
    path = folder / "generation_config.json"
    content = read_json(path) if path.is_file() else {"bos_token_id": token_ids(folder, (BOS,))[0]}
    return {**content, "eos_token_id": eos}


def tokenizer_config(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "tokenizer_config.json")
    for key, token in (("bos_token", BOS), ("eos_token", EOS)):
        if not content.get(key):
            content[key] = token
    if not content.get("chat_template"):
        content["chat_template"] = TEMPLATE
    return content


def jang_config(folder: Path, source: Path | None) -> dict[str, Any]:
    """With groups of 32, and the source's origin in place of a local path.

    Without a source that is there, an origin that was recorded earlier stays.
    """
    path = folder / "jang_config.json"
    content = read_json(path) if path.is_file() else {"weight_format": "affine"}
    quantized = content.get("quantization")
    quantized = quantized if isinstance(quantized, dict) else {}
    content = {**content, "quantization": {**quantized, "group_size": GROUP_SIZE}}
    origin = content.pop("source", None)
    if source is not None and source.is_dir():
        origin = provenance(source)
    if not isinstance(origin, dict):
        return {**content, "source_model": UNRECORDED}
    named = f"{origin.get('repo')}@{origin.get('commit')}"
    return {**content, "source_model": named, "source": origin}


def differences(folder: Path, wanted: dict[str, dict[str, Any]]) -> list[str]:
    """`file: key` for every top-level key that would change."""
    out = []
    for name, content in wanted.items():
        path = folder / name
        before = read_json(path) if path.is_file() else {}
        keys = [k for k in {**before, **content} if before.get(k) != content.get(k)]
        out += [f"{name}: {key}" for key in keys]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="record where it was downloaded from")
    parser.add_argument("--dry-run", action="store_true", help="say what would change")
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    wanted = patched(bundle, args.source)
    for line in differences(args.bundle, wanted):
        print(f"{'would set' if args.dry_run else 'set'} {line}")
    if not args.dry_run:
        for name, content in wanted.items():
            check_json(name, content)
            write_json(args.bundle / name, content)
    return 0


def check_json(name: str, content: dict[str, Any]) -> None:
    """Raise Stop when the content does not survive JSON (NaN from a broken config, say)."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise Stop(name, str(error), "plain JSON", "restore the file") from error


if __name__ == "__main__":
    raise SystemExit(run(main))
