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
import contextlib
from pathlib import Path

from dsv4.making.metadata import check_json, differences, patched
from dsv4.model.opening import open_bundle, read_config
from dsv4.model.roles import place_of
from dsv4.stop import run
from dsv4.storage import locks
from dsv4.storage.durable import write_json


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="record where it was downloaded from")
    parser.add_argument("--dry-run", action="store_true", help="say what would change")
    args = parser.parse_args()
    place_of(args.bundle, args.source)
    read_config(args.bundle)
    with contextlib.nullcontext() if args.dry_run else locks.held(args.bundle):
        wanted = patched(open_bundle(args.bundle), args.source)
        for line in differences(args.bundle, wanted):
            print(f"{'would set' if args.dry_run else 'set'} {line}")
        for name, content in wanted.items():
            check_json(name, content)
            if not args.dry_run:
                write_json(args.bundle / name, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
