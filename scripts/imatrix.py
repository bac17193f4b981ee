"""Make an importance matrix from the source: the mean square of each input column of each expert.

Runs the source losslessly over a calibration text, one layer at a time, as evaluate does, and
collects the inputs of every routed expert's three matrices. QUANTIZER=affine4g32 and others weigh
their error by it (IMATRIX=FILE). For w2 the input includes the router's weight, which DeepSeek's
own code multiplies before w2.

The text of dsv4/evaluation has 70 kB, 19,586 of DeepSeek's tokens, of prose, code, mathematics and
other languages; --text takes another. Experts without any token are printed. Their columns have
equal importance, as have those of MTP layers, which are not run.

Writes the imatrix (.dat, llama.cpp's old format), and FILE.json with the number of tokens of each
expert; hidden states to --work while it runs. A killed run resumes at the layer where it
stopped. Reads the source once.

    .venv/bin/python scripts/imatrix.py --source DIR --out build/imatrix.dat
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4.errors import run
from dsv4.evaluation import driver, importance
from dsv4.evaluation.comparability import CALIBRATION
from dsv4.settings import add_setting
from dsv4.storage.atomic import write_json
from dsv4.text import print_escaped


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True, help="the FP4/FP8 source")
    add_setting(parser, "TEXT", default=CALIBRATION, help="UTF-8")
    add_setting(parser, "TOKENS", help="of the text, at most; default: all")
    add_setting(parser, "DEVICE", choices=("cpu", "gpu"), help="default: gpu, if any")
    add_setting(parser, "TOOLCHAIN_PYTHON", option="--python", default=driver.PYTHON)
    parser.add_argument("--work", type=Path, help="for hidden states; default: OUT.work")
    parser.add_argument("--out", type=Path, default=Path("build/imatrix.dat"))
    args = parser.parse_args()
    work = args.work or args.out.with_name(f"{args.out.name}.work")
    settings = driver.settings_for(args.python, "jang", work)
    (device,) = driver.devices_from_args(args.device, settings)
    result = importance.collect(args.source, args.text, args.tokens, device, settings, args.out)
    write_json(args.out.with_name(f"{args.out.name}.json"), result)
    print_escaped(importance.describe_result(result))
    driver.remove_intermediates(work)
    print_escaped(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
