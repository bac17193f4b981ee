"""Run the toolchain's own loaders on a bundle's headers, and report what each parameter receives.

Runs in the toolchain's Python, on a folder with the bundle's JSON and sparse shards with the right
headers. The real loaders run: mlx_lm's `load_model` and jang_tools' `load_jangtq_model`, or
mlx-vlm's `load_model` for bundles that these two do not load. They build the module tree (MLX
arrays are lazy, so no memory is allocated), rename and stack tensors, look labels up and replace
modules. Only the last step, `load_weights`, is replaced: it compares the tensors that it receives
with the parameters of the modules.

Writes one JSON object to --out: loader → {"error"} or {"parameters", "unfed", "unused", "misfit"}.
Removes no file, unless run with --end-with-parent, as verify does with its temporary folder.

    PYTHONPATH=scripts .venv/bin/python -m dsv4.verification.checks.loader_replay --folder DIR
    --out FILE.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv4.model.naming_schemes import MLX_LM, MLX_VLM
from dsv4.toolchain.child_process import end_with_parent
from dsv4.toolchain.hide_torchvision import hide


class BuiltModel(Exception):
    """Raised in place of `load_weights`: the model as built, and the tensors for it."""

    def __init__(self, model: Any, weights: Any) -> None:
        super().__init__()
        self.model, self.weights = model, weights


def dtype_kind(array: Any) -> str:
    """Return 'float', 'packed' (uint32), 'byte' (uint8: MXFP4's exponents) or 'integer'."""
    name = str(array.dtype).rpartition(".")[2]
    named = {"uint32": "packed", "uint8": "byte"}
    return named.get(name, "float" if "float" in name else "integer")


def compare_parameters(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return parameters without a tensor, tensors without a parameter, and pairs that misfit."""
    from mlx.utils import tree_flatten

    parameters = dict(tree_flatten(model.parameters()))
    misfit = []
    for name in sorted(set(parameters) & set(weights)):
        pair = weights[name], parameters[name]
        same = pair[0].shape == pair[1].shape
        # jang 2.5.9 declares attn_sink in a shape that no checkpoint has, and never reads it.
        same |= name.endswith(".attn_sink")
        if not same or dtype_kind(pair[0]) != dtype_kind(pair[1]):
            misfit.append([name, *(f"{dtype_kind(a)} {list(a.shape)}" for a in pair)])
    return {
        "parameters": len(parameters),
        "unfed": sorted(set(parameters) - set(weights)),
        "unused": sorted(set(weights) - set(parameters)),
        "misfit": misfit,
    }


def replay_loader(load: Callable[[], Any]) -> dict[str, Any]:
    """Run a loader until it calls `load_weights`, and compare; {"error"} if it fails before."""
    try:
        load()
    except BuiltModel as built:
        return compare_parameters(built.model, dict(built.weights))
    except Exception as error:  # whatever a loader raises is the result
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "it never called load_weights"}


def loaders(folder: Path, runtime: str) -> dict[str, Callable[[], Any]]:
    """Return name → loader: mlx_lm's, and jang_tools' if it edits labels first; or mlx-vlm's."""
    if runtime == MLX_VLM:
        hide()
        from mlx_vlm import utils

        return {"mlx-vlm": lambda: utils.load_model(folder, lazy=True)}
    import jang_tools.dsv4
    from jang_tools import load_jangtq
    from mlx_lm.utils import load_model

    del jang_tools  # importing it registers the model with mlx_lm
    found: dict[str, Callable[[], Any]] = {
        "mlx_lm": lambda: load_model(folder, lazy=True, strict=False)
    }
    if hasattr(load_jangtq, "_patch_quant_config_inplace"):
        found["jang_tools"] = lambda: load_jangtq.load_jangtq_model(folder)
    return found


def replay_loaders(folder: Path, runtime: str) -> dict[str, dict[str, Any]]:
    """Return loader → its result. Replaces `load_weights` for the rest of the process."""
    import mlx.nn as nn

    def raise_built_model(self: Any, weights: Any, strict: bool = True) -> None:
        raise BuiltModel(self, weights)

    nn.Module.load_weights = raise_built_model
    with contextlib.redirect_stdout(sys.stderr):
        return {name: replay_loader(load) for name, load in loaders(folder, runtime).items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runtime", choices=(MLX_LM, MLX_VLM), default=MLX_LM)
    parser.add_argument("--end-with-parent", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.end_with_parent:
        end_with_parent(args.folder.parent)
    results = replay_loaders(args.folder, args.runtime)
    args.out.write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
