"""Verify any DeepSeek-V4 MLX bundle: report every fault with its reason and its repair.

Level 1, headers and JSON, takes seconds: index and shards, every tensor's counterpart, every
module's triple, the labels of all runtimes, stop tokens, chat template, encoding. It also runs the
toolchain's own loaders on the headers to see that every parameter would receive a tensor that fits,
and asks its runtimes what tokens, parsers and defaults the documents lead them to.
Level 2, every number, is as fast as the disk: each weight is decoded and compared with the FP4/FP8
source; without a source, it finds NaN, Inf and experts of zeros. It computes SHA-256 of every file.

--json writes the complete result, for report.py and other programs.
Exit 0: every check passed; 1: a fault, or a check that could not be made.

    .venv/bin/python scripts/verify.py --bundle DIR [--source DIR] [--level 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys

from dsv4.errors import run
from dsv4.settings import add_setting, available_cores, parse_path
from dsv4.storage.atomic import write_json
from dsv4.text import print_escaped
from dsv4.toolchain.python_env import default_python
from dsv4.verification.verify import (
    VerifyOptions,
    describe_checks,
    verification_json,
    verify,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "BUNDLE", required=True)
    add_setting(parser, "SOURCE", if_there=True, help="the FP4/FP8 source to compare with")
    add_setting(parser, "IMATRIX", help="the imatrix that the quantizer used (.dat)")
    add_setting(
        parser, "LEVEL", default=2, metavar="{1,2}", help="1: headers and JSON, 2: every number"
    )
    add_setting(
        parser, "TOOLCHAIN_PYTHON", option="--python", default=default_python(), help="toolchain"
    )
    parser.add_argument(
        "--without-loader",
        action="store_true",
        help="do not run the toolchain (level 1 is then incomplete)",
    )
    parser.add_argument("--hashes", action="store_true", help="SHA-256 of all files at level 1 too")
    add_setting(parser, "JOBS", default=available_cores(), help="threads of level 2")
    parser.add_argument("--json", type=parse_path, help="write the complete result to this file")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    options = VerifyOptions(
        args.bundle,
        args.source,
        args.level,
        args.python,
        args.without_loader,
        args.imatrix,
        args.jobs,
        args.hashes,
    )
    done = verify(options)
    print_escaped(describe_checks(options, done), flush=True)
    print_escaped(done.findings.text(), file=sys.stderr, flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.json, verification_json(options, done))
    if done.passed:
        not_run = ", but the loaders were not run" if args.without_loader else ""
        print(f"passed: everything that was asked for was checked and holds{not_run}")
        return 0
    names = ", ".join(finding.name for finding in done.findings.errors)
    print(f"\nFAILED: {names or 'nothing could be checked'}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(run(main))
