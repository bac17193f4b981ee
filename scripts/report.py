"""Turn verify.json into one HTML page that can be put beside a published bundle.

The page needs nothing else: no script, no font, no picture from elsewhere. It shows the verdict,
what was checked and how much of it, the routed experts' error by layer and projection as a drawing,
sizes, the source's revision, the toolchain's versions, and the SHA-256 of every file that the
verdict is about.

    .venv/bin/python scripts/report.py --json build/KEY/verify.json --out build/KEY/verify.html
"""

from __future__ import annotations

import argparse

from dsv4.errors import UserError, run
from dsv4.settings import parse_path
from dsv4.storage.atomic import write_bytes
from dsv4.text import print_escaped
from dsv4.verification.report.schema import read_result
from dsv4.verification.report.verify_page import page


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=parse_path, required=True, help="what verify wrote")
    parser.add_argument("--out", type=parse_path, required=True, help="the page")
    args = parser.parse_args()
    if not args.json.is_file():
        raise UserError(f"{args.json}", "no such file", "verify's result", "make verify")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(args.out, page(read_result(args.json)).encode())
    print_escaped(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
