"""Run one pass: a model over one text, layer by layer.

Load a layer, run all tokens through it, write the hidden states to the disk, drop the layer. Memory
holds one layer, a second copy of one of its matrices while it is stacked, and the activations of a
portion of tokens. MTP layers are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dsv4.errors import UserError
from dsv4.evaluation import activations, layer_tensors
from dsv4.evaluation.cpu_matmul import on_cpu, using_blas
from dsv4.evaluation.hooks import LayerCollector
from dsv4.evaluation.model_code import Jang, Vlm, fill
from dsv4.model.load import block_counts, open_bundle
from dsv4.model.source import open_source
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.safetensors_file import Tensor

HEAD_TOKENS = 64  # whose logits are in memory together: 33 MB with Flash's vocabulary


@dataclass(frozen=True)
class PassSpec:
    """Settings of a pass.

    kind: "source" or "bundle". ids: the text's tokens, BOS first. work: the pass's folder. against:
    the folder of a finished pass to compare the hidden states with. wide: compute a bundle in
    float32. keep: keep the hidden states of every layer. collect: sum the squares of the experts'
    inputs, and compute no logits. portion: tokens that go through a layer together.
    """

    folder: str
    kind: str
    ids: list[int]
    work: str
    against: str = ""
    wide: bool = False
    keep: bool = False
    collect: bool = False
    portion: int = 2048


Tell = Callable[[dict[str, Any]], None]


class PassRunner:
    """Run a pass: opened checkpoint, model code, and the record of its progress."""

    def __init__(self, job: PassSpec, kind_of_code: type[Jang | Vlm], tell: Tell) -> None:
        self.job, self.tell, self.work = job, tell, Path(job.work)
        opening = open_source if job.kind == "source" else open_bundle
        self.checkpoint: Checkpoint = opening(Path(job.folder))
        self.layers = block_counts(self.checkpoint)["layers"]
        self.code = kind_of_code(self.checkpoint.config)
        self.ids = mx.array([job.ids])
        self.portions = activations.portions(len(job.ids), job.portion)
        self.record = activations.read_record(self.work)

    def run(self) -> None:
        """Continue where the record ends.

        Raises UserError for a layer that does not load, and for NaN or infinity.
        """
        ends = layer_tensors.end_tensors(self.checkpoint)
        each = [layer_tensors.layer_tensors(self.checkpoint, n) for n in range(self.layers)]
        sizes = [sum(t.nbytes for t in some.values()) for some in (ends, *each)]
        done = self.record.layers
        self.tell({"total": sum(sizes), "read": sum(sizes[1 : done + 1])})
        if done < 0:
            self.embed(ends)
        with using_blas(on_cpu() and (self.job.kind == "source" or self.job.wide)):
            for number in range(max(done, 0), self.layers):
                self.layer(number, each[number])
                self.tell({"read": sizes[number + 1], "layer": number, "error": self.last_error()})
        if not self.job.collect and not (self.work / activations.LOGITS).is_file():
            self.logits(ends)
        self.tell({"read": sizes[0]})

    def last_error(self) -> float | None:
        return self.record.errors[-1] if self.record.errors else None

    def module(self, module: Any, found: dict[str, Tensor], prefix: str, where: str) -> Any:
        """Fill a module of the model code; only stacked experts are evaluated."""
        if self.job.kind == "source":
            arrays, labels = layer_tensors.from_source(found), None
        else:
            arrays = layer_tensors.from_bundle(found, self.job.wide)
            labels = self.checkpoint.config.get("quantization") or {}
        fill(module, self.code, arrays, prefix, labels, f"{self.checkpoint.folder}: {where}")
        return module

    def ends(self, found: dict[str, Tensor]) -> Any:
        return self.module(self.code.ends(), found, self.code.around, "embedding, norm, head")

    def embed(self, found: dict[str, Tensor]) -> None:
        """Compute the hidden states before the first layer."""
        ends = self.ends(found)
        self.keep(0, (self.code.embed(ends, self.ids[:, some]) for some in self.portions))

    def layer(self, number: int, found: dict[str, Tensor]) -> None:
        """Run one layer over all tokens."""
        began = time.monotonic()
        prefix = self.code.inside.format(number)
        layer = self.module(self.code.layer(number), found, prefix, f"layer {number}")
        mx.eval(layer.parameters())
        self.record.reading += time.monotonic() - began
        collector = LayerCollector(layer) if self.job.collect else None
        self.keep(number + 1, self.through(layer, number), collector)
        del layer
        mx.clear_cache()

    def through(self, layer: Any, number: int) -> Iterator[mx.array]:
        """Yield the hidden states after a layer, portion by portion."""
        before = activations.read_rows(activations.states_path(self.work, number))
        cache = self.code.cache(layer)
        dtype = getattr(mx, self.record.dtype)
        for some in self.portions:
            hidden = mx.array(before[some])[None].astype(dtype)
            try:
                after = self.code.forward(layer, hidden, cache, self.ids[:, some])
            except UserError as stop:
                where = f"{self.checkpoint.folder}: layer {number}: {stop.parts[0]}"
                raise UserError(where, *stop.parts[1:]) from stop
            yield after

    def keep(
        self, layers: int, found: Iterator[mx.array], collector: LayerCollector | None = None
    ) -> None:
        """Write hidden states, compare them, then update the record."""
        began = time.monotonic()
        target, sums = activations.states_path(self.work, layers), np.zeros(2)
        config = self.checkpoint.config
        shape = (len(self.job.ids), config["hc_mult"], config["hidden_size"])
        activations.write_rows(target, shape, self.report_portions(found, layers, sums))
        if collector:
            collector.write(self.work, layers - 1)
        if self.job.against:
            self.record.errors.append(float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0)
        self.record.layers = layers
        self.record.computing += time.monotonic() - began
        activations.write_record(self.work, self.record)
        if not self.job.keep and layers:
            activations.states_path(self.work, layers - 1).unlink(missing_ok=True)

    def report_portions(
        self, found: Iterator[mx.array], layers: int, sums: np.ndarray
    ) -> Iterator[np.ndarray]:
        """Yield portions as float32; add their squared distance to the other pass's to `sums`."""
        other = None
        if self.job.against:
            other = activations.read_rows(activations.states_path(Path(self.job.against), layers))
        for some, hidden in zip(self.portions, found, strict=True):
            self.record.dtype = str(hidden.dtype).removeprefix("mlx.core.")
            values = np.array(hidden[0].astype(mx.float32))
            self.check_finite(values, f"hidden states after {layers} layers")
            if other is not None:
                sums += activations.squared_sums(values, other[some])
            yield values

    def logits(self, found: dict[str, Tensor]) -> None:
        """Write the logits after every token, HEAD_TOKENS at a time."""
        began = time.monotonic()
        head = self.code.head(self.ends(found))
        activations.write_rows(
            self.work / activations.LOGITS,
            (len(self.job.ids), self.checkpoint.config["vocab_size"]),
            self.heads(head),
        )
        self.record.computing += time.monotonic() - began
        activations.write_record(self.work, self.record)

    def heads(self, head: Callable[[mx.array], mx.array]) -> Iterator[np.ndarray]:
        last = activations.read_rows(activations.states_path(self.work, self.layers))
        dtype = getattr(mx, self.record.dtype)
        for some in activations.portions(len(last), HEAD_TOKENS):
            values = np.array(head(mx.array(last[some])[None].astype(dtype))[0])
            self.check_finite(values, "logits")
            yield values

    def check_finite(self, values: np.ndarray, name: str) -> None:
        """Raise UserError for a NaN or an infinity."""
        if not np.isfinite(values).all():
            raise UserError(f"{self.checkpoint.folder}: {name}", "a NaN or an infinity", "numbers",
                            "make verify says what is wrong with it")  # fmt: skip
