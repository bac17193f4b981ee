"""Turn verify.json into one HTML page that can be put beside a published bundle.

The page is self-contained: no script, font or picture from elsewhere. It shows the verdict, the
checks and their counts, a chart of the routed experts' error by layer and projection, sizes, the
source's revision, the toolchain's versions, and the SHA-256 of every verified file.

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
    parser.add_argument("--json", type=parse_path, required=True, help="verify's result")
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
