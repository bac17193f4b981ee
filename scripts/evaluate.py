"""Measure how far a bundle is from its source: run both over one text, layer by layer.

One layer is in memory at a time, so the real model can be measured where it cannot be served: load
a layer, run all tokens through it, keep the hidden states, drop the layer. Reports both
perplexities, the KL divergence of the bundle's next-token distributions from the source's, the
share of tokens with the same most likely successor, and the relative error of the hidden states
after every layer, which shows a fault of one layer.

The model code is the pinned runtime's: jang_tools', which vMLX serves, or mlx-vlm's. The source is
computed losslessly in float32; a bundle in the dtype of its tensors, as it is served, or with
--float32 in float32, so that only its weights differ. MTP layers are left out.

Reads source and bundles once each, and the first --tokens tokens of a text, BOS included: by
default the one in dsv4/evaluation. Writes NAME.json, NAME.md and NAME.html for --out NAME, and
hidden states and logits to --work while it runs: 8 GB for Flash with one bundle and 2,048 tokens. A
killed run resumes at the layer where it stopped.

Memory: one layer (3.7 GB of Flash's source, 4.3 GB of the bundle), and briefly twice as much. Time:
reading all files, and the arithmetic: on a CPU in float32 by NumPy's BLAS, else by MLX's kernels.

    .venv/bin/python scripts/evaluate.py --source DIR --bundle DIR [DIR ...] --out build/evaluate
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dsv4.errors import run
from dsv4.evaluation import driver, evaluate
from dsv4.evaluation.comparability import EVALUATION
from dsv4.evaluation.evaluation_page import page
from dsv4.settings import add_setting
from dsv4.storage.atomic import write_bytes, write_json
from dsv4.text import print_escaped


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_setting(parser, "SOURCE", required=True, help="the FP4/FP8 source")
    add_setting(parser, "BUNDLE", required=True, nargs="+", help="one or more")
    add_setting(parser, "BUNDLES", help="instead of --bundle: several, separated by blanks")
    add_setting(parser, "TEXT", default=EVALUATION, help="UTF-8")
    add_setting(parser, "TOKENS", default=2048, help="of the text, at most")
    add_setting(parser, "DEVICE", choices=("cpu", "gpu", "both"), help="default: gpu, if any")
    add_setting(parser, "RUNTIME", choices=("jang", "vlm"), default="jang")
    add_setting(parser, "FLOAT32", help="compute bundles in float32")
    add_setting(parser, "TOOLCHAIN_PYTHON", option="--python", default=driver.PYTHON)
    parser.add_argument("--work", type=Path, help="for hidden states; default: OUT.work")
    parser.add_argument("--out", type=Path, default=Path("build/evaluate"), help="without a suffix")
    return parser.parse_args()


def main() -> int:
    """Evaluate, print the tables, write them. Returns 0."""
    args = parse_arguments()
    work = args.work or args.out.with_name(f"{args.out.name}.work")
    settings = driver.settings_for(args.python, args.runtime, work)
    devices = driver.devices_from_args(args.device, settings)
    asked = evaluate.EvalRequest(
        args.source, args.bundles or args.bundle, args.text, args.tokens, devices, args.float32
    )
    result = evaluate.evaluate(asked, settings)
    evaluate.print_result(result)
    write_json(args.out.with_name(f"{args.out.name}.json"), result)
    write_bytes(args.out.with_name(f"{args.out.name}.md"), evaluate.tables(result).encode())
    html = args.out.with_name(f"{args.out.name}.html")
    write_bytes(html, page(result).encode())
    driver.remove_intermediates(work)
    print_escaped(html)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
