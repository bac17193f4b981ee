"""Run the toolchain's own loaders on a bundle's headers, and report what each parameter receives.

Runs in the toolchain's Python, on a folder with the bundle's JSON and sparse shards with the right
headers. The real loaders run: mlx_lm's and mlx-vlm's `load_model`, jang_tools' `load_jangtq_model`
if it edits labels first, and vMLX's. They build the module tree (MLX arrays are lazy, so no memory
is allocated), rename and stack tensors, look labels up and replace modules. Only the last step,
`load_weights`, is replaced: it compares the tensors that it receives with the parameters of the
modules. A result is {"error"} or {"parameters", "unfed", "unused", "misfit"}.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv4.model.naming_schemes import MLX_LM, MLX_VLM, VMLX
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


def loaders(folder: Path, runtimes: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Return name → loader of these runtimes, for those that are installed."""
    found: dict[str, Callable[[], Any]] = {}
    if MLX_LM in runtimes and all(map(importlib.util.find_spec, ("mlx_lm", "jang_tools"))):
        import jang_tools.dsv4
        from jang_tools import load_jangtq
        from mlx_lm.utils import load_model

        del jang_tools  # importing it registers the model with mlx_lm
        found["mlx_lm"] = lambda: load_model(folder, lazy=True, strict=False)
        if hasattr(load_jangtq, "_patch_quant_config_inplace"):
            found["jang_tools"] = lambda: load_jangtq.load_jangtq_model(folder)
    if VMLX in runtimes and importlib.util.find_spec("vmlx_engine"):
        found |= vmlx_loader(folder)
    if MLX_VLM in runtimes and has_model("mlx_vlm"):
        hide()
        from mlx_vlm import utils

        found["mlx-vlm"] = lambda: utils.load_model(folder, lazy=True)
    return found


def vmlx_loader(folder: Path) -> dict[str, Callable[[], Any]]:
    """Return vMLX's loader; {} where it takes mlx_lm's, and for 1.3.97, which takes jang_tools'.

    Two of its steps are left out. One runs the bundle's encoding file. The other writes shards anew
    whose tensors are not aligned, and notes into the user's cache folder.
    """
    from vmlx_engine.loaders import load_jangtq_dsv4

    if not hasattr(load_jangtq_dsv4, "ensure_dsv4_encoding_available"):
        return {}
    from vmlx_engine import model_bundle_integrity
    from vmlx_engine.utils.jang_loader import is_jang_model

    if not is_jang_model(folder):
        return {}
    load_jangtq_dsv4.ensure_dsv4_encoding_available = lambda model: None
    model_bundle_integrity.prepare_model_bundle_for_load = lambda model, **_: (f"{model}", {})
    return {"vMLX": lambda: load_jangtq_dsv4.load_jangtq_dsv4_model(str(folder))}


def has_model(package: str) -> bool:
    """Return whether a package is installed and has DeepSeek-V4."""
    installed = importlib.util.find_spec(package) is not None
    return installed and importlib.util.find_spec(f"{package}.models.deepseek_v4") is not None


def replay_loaders(
    folder: Path, runtimes: Sequence[str], names: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return loader → its result, for all loaders of the runtimes or those with these names.

    Replaces `load_weights` for the rest of the process.
    """
    import mlx.nn as nn

    def raise_built_model(self: Any, weights: Any, strict: bool = True) -> None:
        raise BuiltModel(self, weights)

    nn.Module.load_weights = raise_built_model
    with contextlib.redirect_stdout(sys.stderr):
        found = loaders(folder, runtimes)
        wanted = [name for name in found if not names or name in names]
        return {name: replay_loader(found[name]) for name in wanted}
