"""Let the toolchain's own loaders load a bundle's headers, and say what each parameter would get.

Runs in the toolchain's Python, on a folder with the bundle's JSON and with shards that have the
right headers and only holes behind them. Nothing is replayed by imitation: mlx_lm's `load_model`
and jang_tools' `load_jangtq_model`, or mlx-vlm's `load_model` for a layout that these two do not
load, run themselves, build the module tree (MLX arrays are lazy, so
no memory is taken), rename and stack, look the labels up and swap modules in. Only the last step,
`load_weights`, is replaced: it compares what was handed over with what the modules compute with.

Writes one JSON object to --out: loader → {"error"} or {"parameters", "unfed", "unused", "misfit"}.
Nothing is removed, wherever standard input comes from: only verify, which makes the folder, asks
for that.

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
    """Raised in place of `load_weights`: the model as built, and the tensors meant for it."""

    def __init__(self, model: Any, weights: Any) -> None:
        super().__init__()
        self.model, self.weights = model, weights


def dtype_kind(array: Any) -> str:
    """'float', 'packed' (uint32), 'byte' (uint8: MXFP4's exponents) or 'integer'."""
    name = str(array.dtype).rpartition(".")[2]
    named = {"uint32": "packed", "uint8": "byte"}
    return named.get(name, "float" if "float" in name else "integer")


def is_ignored(name: str) -> bool:
    """jang 2.5.9 declares attn_sink in a shape that no checkpoint has, and never reads it."""
    return name.endswith(".attn_sink")


def compare_parameters(model: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Parameters that get nothing, tensors that lead nowhere, and pairs that do not fit."""
    from mlx.utils import tree_flatten

    parameters = dict(tree_flatten(model.parameters()))
    misfit = []
    for name in sorted(set(parameters) & set(weights)):
        wanted, given = parameters[name], weights[name]
        same = wanted.shape == given.shape or is_ignored(name)
        if not same or dtype_kind(wanted) != dtype_kind(given):
            shown = [f"{dtype_kind(a)} {list(a.shape)}" for a in (given, wanted)]
            misfit.append([name, *shown])
    return {
        "parameters": len(parameters),
        "unfed": sorted(set(parameters) - set(weights)),
        "unused": sorted(set(weights) - set(parameters)),
        "misfit": misfit,
    }


def replay_loader(load: Callable[[], Any]) -> dict[str, Any]:
    """Run a loader up to the point where it hands its tensors over."""
    try:
        load()
    except BuiltModel as handed:
        return compare_parameters(handed.model, dict(handed.weights))
    except Exception as error:  # whatever a loader raises is the answer
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": "it never called load_weights"}


def loaders(folder: Path, runtime: str) -> dict[str, Callable[[], Any]]:
    """mlx_lm's loader, which looks labels up, and jang_tools', which may edit them before; or
    mlx-vlm's."""
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


def answers(folder: Path, runtime: str) -> dict[str, dict[str, Any]]:
    """Loader → what came of it. For good, `load_weights` hands over and loads nothing."""
    import mlx.nn as nn

    def hand_over(self: Any, weights: Any, strict: bool = True) -> None:
        raise BuiltModel(self, weights)

    nn.Module.load_weights = hand_over
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
    found = answers(args.folder, args.runtime)
    args.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
