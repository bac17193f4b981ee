"""The `quantization` labels in config.json: which module is stored how, under every name in use.

Each runtime looks a module's label up under names of its own and falls back to the top level when
it finds none, without a word. So the experts' label stands under all of them:

| who                     | name                                                        |
|-------------------------|-------------------------------------------------------------|
| mlx_lm, vMLX 1.3.97     | model.layers.N.mlp.switch_mlp.{gate,up,down}_proj           |
| mlx-vlm                 | language_model.model.layers.N.ffn.switch_mlp.…              |
| vMLX 1.6.81             | layers.N.ffn.experts.E.wK, mtp.M.ffn.experts.E.wK (storage) |
"""

from __future__ import annotations

from typing import Any

from dsv4.names import PROJECTION, parse_expert, switch_paths

DEFAULT = {"group_size": 32, "bits": 8, "mode": "affine"}
EXPERT = {"group_size": 32, "bits": 4, "mode": "affine"}


def quantization(bases: list[str], expert: dict[str, Any] = EXPERT) -> dict[str, Any]:
    """The whole `quantization` value for a bundle whose routed experts are stored as `expert` says.

    `bases` are the storage names of all routed-expert matrices, as `expert_bases` gives them. MTP
    experts get their storage name only: no runtime builds modules for them.
    """
    layers = {parsed[1] for base in bases if (parsed := parse_expert(f"{base}.weight")) and
              parsed[0] == "layers"}  # fmt: skip
    labels: dict[str, Any] = dict(DEFAULT)
    for which in (0, 1):
        for layer in sorted(layers):
            for matrix in PROJECTION:
                labels[switch_paths(layer, matrix)[which]] = dict(expert)
    labels.update({base: dict(expert) for base in bases})
    return labels
