"""What llama.cpp's forms of few bits leave of the same synthetic experts, as RMS error.

For who comes from GGUF files: ds4's small ones hold experts as IQ2_XXS and Q2_K. ggml quantizes
(`ggml_quantize_chunk` of the library in pywhispercpp's wheel, ggml 0.13.1) and gguf decodes.
Each form is made without an imatrix, where ggml can do that, and with one in which all columns
count the same. ggml weighs each weight by its size besides.

Neither package is needed elsewhere, so they go to a folder of their own:

    .venv/bin/python -m pip install --no-deps --target build/llama gguf==0.19.0 pywhispercpp==1.5.1
    PYTHONPATH=build/llama .venv/bin/python scripts/lab/llama_forms.py

Takes a minute; prints a Markdown table. Exit status: 0 done; 1 failed.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import rooms  # noqa: F401
from on_weights import COLUMNS, OUT, expert

from dsv4.stop import Stop, run
from dsv4.weights.synthetic import RULES

FORMS = ("IQ2_XXS", "Q2_K", "Q3_K", "Q4_K")
NEED_IMATRIX = ("IQ2_XXS",)
LIBRARY = "libggml-base.so"


def library() -> ctypes.CDLL:
    """ggml's quantizers. Raises Stop when the packages are not there."""
    try:
        found = [p for p in metadata.files("pywhispercpp") or () if p.name.startswith(LIBRARY)]
    except metadata.PackageNotFoundError:
        found = []
    if not found:
        raise Stop(LIBRARY, "no package that has it", "pywhispercpp's wheel for Linux",
                   "install gguf and pywhispercpp as the head of this script says")  # fmt: skip
    ggml = ctypes.CDLL(str(Path(found[0].locate())))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,  # form, weights, blocks
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,  # first, rows, columns
    ]  # fmt: skip
    return ggml


def rms(ggml: ctypes.CDLL, form: str, values: np.ndarray, imatrix: np.ndarray | None) -> float:
    """The RMS error of float32 (OUT, COLUMNS), relative to the RMS of the weights."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[form]
    weights, nbytes = GGML_QUANT_SIZES[kind]
    blocks = np.zeros((OUT, COLUMNS // weights * nbytes), np.uint8)
    ggml.ggml_quantize_init(int(kind))
    columns = None if imatrix is None else imatrix.ctypes.data
    written = ggml.ggml_quantize_chunk(
        int(kind), values.ctypes.data, blocks.ctypes.data, 0, OUT, COLUMNS, columns
    )
    if written != blocks.nbytes:
        raise Stop(form, f"{written:,} bytes", f"{blocks.nbytes:,}", "take the versions above")
    return float(np.sqrt(((dequantize(blocks, kind) - values) ** 2).sum() / (values**2).sum()))


def bits(form: str) -> float:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[form]]
    return 8 * nbytes / weights


def main() -> int:
    """Measure all forms for both rules of FP4 scales. Returns 0."""
    ggml, even = library(), np.ones(COLUMNS, np.float32)
    print("| form | bits a weight | RMS, " + " | RMS, ".join(RULES) + " | with an even imatrix |")
    print("|---|---|---|---|---|")
    for form in FORMS:
        cells = []
        for imatrix in (None, even):
            for rule in RULES:
                if imatrix is None and form in NEED_IMATRIX:
                    cells.append("–")
                    continue
                values = np.ascontiguousarray(expert("normal", rule)[2].reshape(OUT, COLUMNS))
                cells.append(f"{rms(ggml, form, values, imatrix):.1%}")
        print(f"| {form} | {bits(form):.3g} | {cells[0]} | {cells[1]} | {', '.join(cells[2:])} |")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
