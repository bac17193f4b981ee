"""The model code of a runtime, taken apart: embedding, one layer with its mask and cache, head.

Both classes do what their model's own __call__ does, one layer at a time, over tokens that come in
portions as in serving; the caches carry the layer from one portion to the next. Read beside
jang_tools.dsv4.mlx_model (2.5.50) and mlx_vlm.models.deepseek_v4.language (0.7.10).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from dsv4.errors import UserError
from dsv4.evaluation.cpu_matmul import matmul
from dsv4.model.configs import known_fields
from dsv4.model.labels import MXFP4, MXFP8
from dsv4.toolchain.hide_torchvision import hide

Label = dict[str, Any]


class Jang:
    """jang_tools' model, which vMLX serves. With the caches of long contexts, as vMLX sets them."""

    inside = "model.layers.{}."
    around = ""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from jang_tools.dsv4 import mlx_model
        from mlx_lm.models.base import create_attention_mask

        self.code, self.mask = mlx_model, create_attention_mask
        self.args = mlx_model.ModelArgs.from_dict(known_fields(dict(config)))

    def ends(self) -> nn.Module:
        """The model without a layer."""
        return self.code.Model(replace(self.args, num_hidden_layers=0))

    def layer(self, number: int) -> nn.Module:
        return self.code.DeepseekV4DecoderLayer(self.args, number)

    def sanitize(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        return self.code.Model.sanitize(SimpleNamespace(args=self.args), arrays)

    def aliases(self, path: str) -> tuple[str, ...]:
        """The names under which a module's label is looked up."""
        return (path,)

    def cache(self, layer: nn.Module) -> Any:
        alone = SimpleNamespace(args=self.args, model=SimpleNamespace(layers=[layer]))
        return self.code.Model.make_cache(alone)[0]

    def embed(self, ends: nn.Module, ids: mx.array) -> mx.array:
        """(1, tokens) → (1, tokens, hc_mult, hidden)."""
        return mx.tile(ends.model.embed(ids)[..., None, :], (1, 1, self.args.hc_mult, 1))

    def forward(self, layer: nn.Module, hidden: mx.array, cache: Any, ids: mx.array) -> mx.array:
        window = self.args.sliding_window
        mask = self.mask(hidden[:, :, 0, :], cache, window_size=window, return_array=True)
        return layer(hidden, mask=mask, cache=cache, input_ids=ids)

    def head(self, ends: nn.Module) -> Callable[[mx.array], mx.array]:
        """A function from hidden states to logits float32; the product in float32, as theirs."""
        head = ends.lm_head
        if isinstance(head, nn.QuantizedLinear):
            parts = head.weight, head.scales, head.get("biases")
            form = {"group_size": head.group_size, "bits": head.bits, "mode": head.mode}
            weight = mx.dequantize(*parts, **form)
        else:
            weight = head.weight
        weight = weight.astype(mx.float32)

        def logits(hidden: mx.array) -> mx.array:
            reduced = ends.model.norm(ends.model._hc_head_reduce(hidden))
            return matmul(reduced.astype(mx.float32), weight)

        return logits


class Vlm:
    """mlx-vlm's model."""

    inside = "language_model.model.layers.{}."
    around = "language_model."

    def __init__(self, config: Mapping[str, Any]) -> None:
        hide()
        from mlx_vlm.models.base import create_attention_mask
        from mlx_vlm.models.deepseek_v4 import deepseek_v4, language

        self.code, self.outer, self.mask = language, deepseek_v4.Model, create_attention_mask
        self.args = language.ModelConfig.from_dict(known_fields(dict(config)))

    def ends(self) -> nn.Module:
        """The model without a layer."""
        return self.code.LanguageModel(replace(self.args, num_hidden_layers=0))

    def layer(self, number: int) -> nn.Module:
        return self.code.DeepseekV4Block(self.args, number)

    def sanitize(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        named = self.code.LanguageModel.sanitize(SimpleNamespace(args=self.args), arrays)
        return {f"{self.around}{name}": array for name, array in named.items()}

    def aliases(self, path: str) -> tuple[str, ...]:
        """The names under which a module's label is looked up."""
        return (path, path.removeprefix(self.around), *self.outer.quantization_path_aliases(path))

    def cache(self, layer: nn.Module) -> Any:
        alone = SimpleNamespace(args=self.args, layers=[layer])
        return self.code.LanguageModel.make_cache(alone)[0]

    def embed(self, ends: nn.Module, ids: mx.array) -> mx.array:
        """(1, tokens) → (1, tokens, hc_mult, hidden)."""
        return mx.tile(ends.model.embed_tokens(ids)[..., None, :], (1, 1, self.args.hc_mult, 1))

    def forward(self, layer: nn.Module, hidden: mx.array, cache: Any, ids: mx.array) -> mx.array:
        first = cache[0] if hasattr(cache, "caches") else cache
        window = self.args.sliding_window
        mask = self.mask(hidden[:, :, 0, :], first, window_size=window, return_array=True)
        return layer(hidden, mask, cache, ids, causal=True)

    def head(self, ends: nn.Module) -> Callable[[mx.array], mx.array]:
        """A function from hidden states to logits float32."""
        return lambda hidden: ends.logits_from_hidden(hidden).astype(mx.float32)


RUNTIMES = {"jang": Jang, "vlm": Vlm}


def fill(
    module: nn.Module,
    runtime: Jang | Vlm,
    arrays: dict[str, mx.array],
    prefix: str,
    labels: Mapping[str, Any] | None,
    where: str,
) -> None:
    """Give a module its tensors, quantized as `labels` say, a source's as its bytes do (None).

    prefix: what module paths of the whole model have before the module's own. Stacked experts are
    read one matrix after another, so that they do not lie in memory twice.
    Raises UserError when label and tensors do not fit, or a parameter gets none.
    """
    named = {n.removeprefix(prefix): a for n, a in runtime.sanitize(arrays).items()}
    arrays.clear()

    def label(path: str, part: nn.Module) -> Label | bool:
        if f"{path}.scales" not in named or not hasattr(part, "to_quantized"):
            return False
        if labels is None:
            weight, scales = named[f"{path}.weight"], named[f"{path}.scales"]
            return dict({4: MXFP4, 8: MXFP8}[weight.shape[-1] // scales.shape[-1]])
        names = runtime.aliases(f"{prefix}{path}")
        own = next((labels[name] for name in names if isinstance(labels.get(name), dict)), labels)
        return {"mode": "affine"} | {k: own[k] for k in MXFP4 if k in own}

    try:
        nn.quantize(module, class_predicate=label)
        module.load_weights(list(named.items()), strict=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(where, said, "tensors that fit the labels in config.json, and one for each "
                   "parameter", "make verify says what is wrong with it") from error  # fmt: skip
    for name in [name for name in named if ".switch_mlp." in name]:
        mx.eval(named.pop(name))
