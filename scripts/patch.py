"""Write the metadata that runtimes need into the bundle's JSON files.

Each runtime reads other files (found by experiment), so all of them are written:

| file                   | what                                                | for              |
|------------------------|-----------------------------------------------------|------------------|
| config.json            | quantization labels under every name in use         | all              |
| config.json            | eos_token_id: end of sentence and <｜User｜>        | vMLX 1.3.97      |
| generation_config.json | the same list                                       | mlx_lm, mlx-vlm  |
| tokenizer_config.json  | bos_token, eos_token; chat_template                 | vMLX 1.3.97      |
| chat_template.jinja    | the same template                                   | mlx-vlm, mlx_lm  |
| jang_config.json       | quantization.group_size 32 (else 64 is assumed)     | vMLX 1.6.81      |
| jang_config.json       | source_model, source: repo, commit, files' hashes   | readers          |

Upstream's converter puts chat.sampling_defaults into jang_config.json: answers of 300 tokens, and
another temperature than generation_config.json's. Limits of answers and sampling settings that the
source does not have are removed wherever a runtime reads them (dsv4/model/defaults.py); other keys
stay. The converter also writes the source's local path into source_model. It becomes the repository
and commit that download recorded, or a note that they were not recorded.

The template makes the prompts of encoding/encoding_dsv4.py, with the efforts of that file's
release; a template of another maker stays. Ids come from the bundle's tokenizer, labels from the
tensors on disk. Idempotent; each file is replaced atomically. Takes seconds. --dry-run prints what
would change.

    .venv/bin/python scripts/patch.py --bundle DIR [--source DIR] [--dry-run]
"""

from __future__ import annotations

import argparse
import contextlib

from dsv4.conversion.runtime_documents import (
    changed_keys,
    chat_templates,
    check_json,
    patched_documents,
)
from dsv4.errors import run
from dsv4.model.chat_template import CHAT_TEMPLATE, RELEASES
from dsv4.model.folder_roles import bundle_path
from dsv4.model.load import open_bundle, read_config
from dsv4.settings import add_setting
from dsv4.storage import limits, locks
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.text import escape_line, print_escaped


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "BUNDLE", required=True)
    add_setting(parser, "SOURCE", help="record where it was downloaded from")
    add_setting(parser, "RELEASE", choices=("", *RELEASES[:2]), default="",
                help="the conversation's release, if encoding/ does not tell it")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what would change")
    args = parser.parse_args()
    bundle_path(args.bundle, args.source)
    read_config(args.bundle)
    with contextlib.nullcontext() if args.dry_run else locks.locked(args.bundle):
        wanted = patched_documents(open_bundle(args.bundle), args.source, args.release)
        template, text = (
            args.bundle / CHAT_TEMPLATE,
            chat_templates(args.bundle, args.release)[0].encode(),
        )
        changes = changed_keys(args.bundle, wanted)
        if not template.is_file() or limits.read_bounded(template) != text:
            changes.append(CHAT_TEMPLATE)
        for line in changes:
            print_escaped(f"{'would set' if args.dry_run else 'set'} {escape_line(line)}")
        for name, content in wanted.items():
            check_json(name, content)
            if not args.dry_run:
                write_json(args.bundle / name, content)
        if not args.dry_run:
            write_bytes(template, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
