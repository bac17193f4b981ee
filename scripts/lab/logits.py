"""Compute a model's next-token logits, with a runtime's own loader or with none.

Reads token ids as JSON from stdin ([[...], ...]) and writes one float32 .npy of shape
(prompts, vocabulary): the logits after the last token of each prompt. With --decode N the last N
tokens are fed one at a time through the cache, as in generation. With --every the logits after
every token of every prompt, (tokens, vocabulary). Runs in the runtime's Python.

    --how loader      the bundle through vMLX's loader (jang_tools inside), as vMLX serves it
    --how mlx-lm      the bundle through mlx_lm with jang_tools' model
    --how mlx-vlm     the bundle through mlx_vlm
    --how tensors     the bundle's tensors dequantized to float32, so without any label
    --how source      the FP4/FP8 source decoded to float32
    --how reference   the bundle's tensors (or the source's) in transformers' DeepseekV4ForCausalLM

    .venv/bin/python scripts/lab/logits.py --folder DIR --how loader --out FILE.npy < prompts.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import locations  # noqa: F401
import numpy as np
import turbo_kernels

from dsv4.errors import UserError, run
from dsv4.model.labels import TURBO_PARTS, has_turboquant, stored_label
from dsv4.model.load import open_bundle
from dsv4.model.names import expert_base, parse_stack
from dsv4.model.source import open_source
from dsv4.quantization import fp4, fp8
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Tensor, read_array
from dsv4.toolchain.hide_torchvision import hide


def decode_source(source: Checkpoint) -> dict[str, np.ndarray]:
    """Return the source's tensors by storage name, FP4 and FP8 decoded, floats as float32."""
    tensors = source.tensors
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".scale"):
            continue
        array = read_array(tensor)
        scale = tensors.get(name.removesuffix(".weight") + ".scale")
        if tensor.dtype in ("I8", "F8_E4M3"):
            decode = fp4.decode if tensor.dtype == "I8" else fp8.decode
            array = decode(array, read_array(scale), name)
        out[name] = as_float(tensor, array)
    return out


def as_float(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """Return BF16 and F16 as float32, everything else unchanged."""
    if tensor.dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if tensor.dtype == "F16" else array


def decode_bundle(bundle: Checkpoint) -> dict[str, np.ndarray]:
    """Return the bundle's tensors by storage name, dequantized by their shapes, not their labels.

    FP4 bytes are decoded as FP4, whatever their label. Raises UserError for scales without a weight
    that MLX could dequantize.
    """
    import mlx.core as mx

    tensors, out = bundle.tensors, {}
    for name, tensor in tensors.items():
        base, _, part = name.rpartition(".")
        label = stored_label(tensors, base, bundle.config)
        if part == "tq_packed":
            turbo = {part: read_array(tensors[f"{base}.{part}"]) for part in TURBO_PARTS}
            out.update(decode_turbo(base, turbo))
        if part in TURBO_PARTS:
            continue
        if part in ("scales", "biases") and label is None:
            raise UserError(f"{bundle.folder}: {name}", "no whole module", "one", "run requantize")
        if label is None:
            out[name] = as_float(tensor, read_array(tensor))
        elif part == "weight":
            parts = [read_array(tensors[f"{base}.{p}"]) for p in parts_of(label)]
            floats = (p if p.dtype == np.uint8 else p.astype(np.float32) for p in parts)
            packed = mx.array(read_array(tensor))
            decoded = mx.dequantize(packed, *map(mx.array, floats), **label)
            out[name] = np.array(decoded.astype(mx.float32))
    return out


def decode_turbo(base: str, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decode a stack of experts, or one, in TurboQuant: float32 by storage name."""
    values = turbo_kernels.decode(parts)
    stack = parse_stack(f"{base}.tq_packed")
    if stack is None:
        return {f"{base}.weight": values}
    names = [expert_base("layers", stack[0], e, stack[1]) for e in range(len(values))]
    return {f"{name}.weight": one for name, one in zip(names, values, strict=True)}


def parts_of(label: dict) -> tuple[str, ...]:
    """Return the names of the tensors beside a weight; FP4 and FP8 have scales only."""
    return ("scales", "biases") if label["mode"] == "affine" else ("scales",)


def plain_model(config: dict, weights: dict[str, np.ndarray]):
    """Return jang_tools' model with these float32 weights, one for every parameter."""
    import mlx.core as mx
    from jang_tools.dsv4 import mlx_model
    from mlx.utils import tree_flatten

    model = mlx_model.Model(mlx_model.ModelArgs.from_dict(config))
    named = model.sanitize({name: mx.array(array) for name, array in weights.items()})
    parameters = dict(tree_flatten(model.parameters()))
    if odd := set(named) ^ set(parameters):
        raise UserError(
            f"{sorted(odd)[0]}", "no match", "a tensor for every parameter", "see names.py"
        )
    # Not strict: jang 2.5.9 declares attn_sink in a shape that no checkpoint has, and ignores it.
    model.load_weights(list(named.items()), strict=False)
    return model


class MlxModel:
    """Prefill and cached decoding with an MLX model. logits: a function of (ids, cache)."""

    def __init__(self, model, logits) -> None:
        self.model, self.logits = model, logits

    def rows(self, ids: list[int], decode: int) -> np.ndarray:
        """Return logits (n, vocabulary); the last row is after all of `ids`.

        The last `decode` tokens are fed one at a time. With none, n is the number of tokens (but
        jang 2.5.50 gives the last row only); else it is 1.
        """
        import mlx.core as mx

        # A cache also for plain prefill: without one mlx-vlm 0.7.10 lets every position see all
        # compressed blocks, later ones included.
        cache = self.model.make_cache()
        first = len(ids) - decode
        found = self.logits(mx.array([ids[:first]]), cache)
        for token in ids[first:]:
            found = self.logits(mx.array([[token]]), cache)
        return np.array(found[0].astype(mx.float32))


def loader(folder: Path) -> MlxModel:
    from vmlx_engine.loaders.load_jangtq_dsv4 import load_jangtq_dsv4_model

    if has_turboquant(open_bundle(folder).tensors):
        turbo_kernels.stand_in()
    model, _ = load_jangtq_dsv4_model(folder)
    return MlxModel(model, lambda ids, cache: model(ids, cache=cache))


def mlx_lm(folder: Path) -> MlxModel:
    import jang_tools.dsv4.mlx_register  # noqa: F401
    from mlx_lm import load

    model = load(str(folder))[0]
    return MlxModel(model, lambda ids, cache: model(ids, cache=cache))


def mlx_vlm(folder: Path) -> MlxModel:
    hide()
    from mlx_vlm import load

    model = load(str(folder))[0].language_model
    return MlxModel(model, lambda ids, cache: model(ids, cache=cache).logits)


def decode_folder(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return config and float32 tensors of a source or of a bundle."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization" in config:
        opened = open_bundle(folder)
        return opened.config, decode_bundle(opened)
    opened = open_source(folder)
    return opened.config, decode_source(opened)


def tensors(folder: Path) -> MlxModel:
    model = plain_model(*decode_folder(folder))
    return MlxModel(model, lambda ids, cache: model(ids, cache=cache))


class Reference:
    """transformers' DeepseekV4ForCausalLM on the same tensors, float32."""

    def __init__(self, folder: Path) -> None:
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        config, weights = decode_folder(folder)
        dropped = ("quantization", "quantization_config", "expert_dtype", "rope_parameters")
        plain = {key: value for key, value in config.items() if key not in dropped}
        named = {
            name: torch.from_numpy(np.array(array, order="C"))
            for name, array in weights.items()
            if not name.startswith("mtp.")
        }
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / "config.json").write_text(json.dumps(plain))
            save_file(named, Path(work) / "model.safetensors")
            self.model, info = AutoModelForCausalLM.from_pretrained(
                work, dtype=torch.float32, output_loading_info=True
            )
        odd = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if odd:
            raise UserError(
                f"{folder}", f"no match for {odd[0]} in transformers", "every key", "see it"
            )
        self.model.eval()

    def rows(self, ids: list[int], decode: int) -> np.ndarray:
        """Return logits (n, vocabulary) as MlxModel.rows does."""
        import torch

        first = len(ids) - decode
        with torch.no_grad():
            out = self.model(torch.tensor([ids[:first]]), use_cache=True)
            for token in ids[first:]:
                past = out.past_key_values
                out = self.model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
        return out.logits[0].numpy()


HOW = {
    "loader": loader,
    "mlx-lm": mlx_lm,
    "mlx-vlm": mlx_vlm,
    "tensors": tensors,
    "source": tensors,
    "reference": Reference,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="source or bundle")
    parser.add_argument("--how", choices=HOW, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--decode", type=int, default=0, help="tokens fed one at a time")
    parser.add_argument("--every", action="store_true", help="after every token, not the last only")
    args = parser.parse_args()
    prompts = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        model = HOW[args.how](args.folder)
        rows = [model.rows(ids, args.decode) for ids in prompts]
    np.save(args.out, np.concatenate(rows if args.every else [row[-1:] for row in rows]))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
