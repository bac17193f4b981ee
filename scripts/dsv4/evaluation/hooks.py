"""Collect the squared inputs of a layer's routed experts, for an importance matrix.

The layer's three stacked matrices are wrapped where the model code calls them. The input of w2 is
the activation times the router's weight in jang_tools' model (2.5.50), as in DeepSeek's own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dsv4.evaluation.activations import sums_path
from dsv4.model.names import PROJECTION
from dsv4.storage.safetensors_file import PendingTensor, write_shard


class CountingMatrix:
    """A stacked matrix that sums the squares of its inputs by expert."""

    def __init__(self, matrix: Any) -> None:
        self.matrix = matrix
        self.squares = mx.zeros((matrix.num_experts, matrix.input_dims))
        self.tokens = mx.zeros((matrix.num_experts,), mx.uint32)

    def __call__(self, x: mx.array, indices: mx.array, **options: Any) -> mx.array:
        rows = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).reshape(-1, x.shape[-1])
        experts = indices.flatten()
        self.squares = self.squares.at[experts].add(mx.square(rows.astype(mx.float32)))
        self.tokens = self.tokens.at[experts].add(mx.ones(experts.shape, mx.uint32))
        mx.eval(self.squares, self.tokens)
        return self.matrix(x, indices, **options)


class LayerCollector:
    """Wrap the three expert matrices of a layer of jang_tools' model."""

    def __init__(self, layer: Any) -> None:
        switch = layer.mlp.switch_mlp
        self.watched = {w: CountingMatrix(getattr(switch, name)) for w, name in PROJECTION.items()}
        for w, name in PROJECTION.items():
            setattr(switch, name, self.watched[w])

    def write(self, folder: Path, layer: int) -> None:
        """Write the layer's sums to the pass's folder."""
        arrays = {w: ("F32", np.array(one.squares)) for w, one in self.watched.items()}
        arrays["tokens"] = ("U32", np.array(self.watched["w1"].tokens))
        planned = [
            PendingTensor(name, dtype, array.shape, lambda array=array: [array])
            for name, (dtype, array) in arrays.items()
        ]
        write_shard(sums_path(folder, layer), planned, {})
