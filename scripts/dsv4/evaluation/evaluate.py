"""Evaluate bundles against their source: plan and run the passes, compute the metrics."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.evaluation import activations, comparability, driver
from dsv4.evaluation.divergence import compare
from dsv4.evaluation.driver import PassSettings, WorkerProcess
from dsv4.model.load import config_count, open_bundle
from dsv4.model.source import open_source
from dsv4.storage.atomic import format_bytes
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.locks import locked
from dsv4.text import escape_line, print_escaped

VERSION = 1  # of the result's form


@dataclass(frozen=True)
class EvalRequest:
    """Bundles to evaluate, devices, and the first tokens of a text.

    wide: compute bundles in float32, not in the dtype of their tensors.
    """

    source: Path
    bundles: list[Path]
    text: Path
    tokens: int
    devices: list[str]
    wide: bool


@dataclass(frozen=True)
class Pass:
    """A planned pass: checkpoint, device, job and folder."""

    checkpoint: Checkpoint
    device: str
    job: dict[str, Any]
    folder: Path


def evaluate(asked: EvalRequest, settings: PassSettings) -> dict[str, Any]:
    """Run the unfinished passes and compare. Returns the result, ready for JSON.

    The source is computed once, in float32, on the first device. Raises UserError for what cannot
    be compared, and for a pass that stops.
    """
    source = open_source(asked.source)
    comparability.check_counts(source)
    bundles = [open_bundle(folder) for folder in asked.bundles]
    for bundle in bundles:
        comparability.check_pair(bundle, source)
    ids = comparability.tokens_of(source, asked.text, asked.tokens)
    layers = config_count(source.config, "num_hidden_layers", asked.source)
    driver.prepare(settings.work)
    with locked(settings.work):
        reference, turns = plan_passes(source, bundles, ids, asked, settings)
        driver.remove_other_passes(settings.work, [turn.folder for turn in (reference, *turns)])
        heads = 1 + len(turns)
        driver.check_space(settings.work, source.config, len(ids), layers + 1, heads)
        peak = run_passes([reference, *turns], settings)
        return {
            "version": VERSION,
            "source": f"{asked.source}",
            "text": {
                "file": asked.text.name,
                "sha256": text_digest(asked.text),
                "tokens": len(ids),
            },
            "runtime": settings.runtime,
            "versions": dict(settings.versions),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "peak_memory": peak,
            "passes": [timing(turn) for turn in (reference, *turns)],
            "bundles": [pass_metrics(turn, reference, ids) for turn in turns],
        }


def plan_passes(
    source: Checkpoint,
    bundles: list[Checkpoint],
    ids: list[int],
    asked: EvalRequest,
    settings: PassSettings,
) -> tuple[Pass, list[Pass]]:
    """Return the pass over the source, and one for each bundle on each device."""
    job: dict[str, Any] = {"folder": f"{source.folder.resolve()}", "kind": "source", "ids": ids}
    job["keep"] = True
    reference = make_pass(source, settings, asked.devices[0], job)
    turns = []
    for bundle in bundles:
        own = {"folder": f"{bundle.folder.resolve()}", "kind": "bundle", "ids": ids}
        own |= {"wide": asked.wide, "against": f"{reference.folder.resolve()}"}
        turns += [make_pass(bundle, settings, device, own) for device in asked.devices]
    return reference, turns


def make_pass(
    checkpoint: Checkpoint, settings: PassSettings, device: str, job: dict[str, Any]
) -> Pass:
    folder = driver.folder_of(checkpoint, settings, device, job)
    return Pass(checkpoint, device, {**job, "work": f"{folder.resolve()}"}, folder)


def run_passes(turns: list[Pass], settings: PassSettings) -> int:
    """Run the passes without logits; return the peak memory of MLX in bytes."""
    peak = 0
    with ExitStack() as stack:
        engines: dict[str, WorkerProcess] = {}
        for turn in turns:
            if driver.is_complete(turn.folder):
                continue
            if turn.device not in engines:
                engine = WorkerProcess(settings, turn.device)
                engines[turn.device] = stack.enter_context(engine)
            name = f"{pass_name(turn)} on {turn.device}"
            peak = max(peak, engines[turn.device].run(turn.job, name))
    return peak


def pass_name(turn: Pass) -> str:
    """Return a name for tables: one line of 60 characters at most, without `|`."""
    return escape_line(turn.checkpoint.folder.resolve().name, 60).replace("|", "¦")


def timing(turn: Pass) -> dict[str, Any]:
    """Return the seconds of a pass, and their ratio to reading its files."""
    record = activations.read_record(turn.folder)
    return {
        "folder": pass_name(turn),
        "device": turn.device,
        "reading_seconds": round(record.reading, 3),
        "computing_seconds": round(record.computing, 3),
        "to_reading": round((record.reading + record.computing) / max(record.reading, 1e-9), 2),
    }


def pass_metrics(turn: Pass, reference: Pass, ids: list[int]) -> dict[str, Any]:
    """Return the metrics of one bundle on one device; KL in nats per token."""
    found = compare(turn.folder, reference.folder, ids)
    record = activations.read_record(turn.folder)
    return {
        "bundle": f"{turn.checkpoint.folder}",
        "name": pass_name(turn),
        "device": turn.device,
        "computed_in": record.dtype,
        "perplexity": perplexity(found.bundle),
        "source_perplexity": perplexity(found.source),
        "kl_mean": float(found.kl.mean()),
        "kl_median": float(np.median(found.kl)),
        "kl_99": float(np.quantile(found.kl, 0.99)),
        "same_next_token": float(found.same.mean()),
        "error_by_layer": record.errors,
        "kl_by_token": [float(kl) for kl in found.kl],
    }


def perplexity(losses: np.ndarray) -> float:
    """The exponential of the mean; 1e300 where that is beyond a float's range."""
    return math.exp(min(float(losses.mean()), 690.0))


def text_digest(text: Path) -> str:
    return hashlib.sha256(text.read_bytes()).hexdigest()


def tables(result: dict[str, Any]) -> str:
    """Markdown: a row for each bundle and device; then a line for each layer."""
    bundles = result["bundles"]
    return "\n".join([*summary(result), "", *by_layer(bundles), "", *time_table(result)]) + "\n"


def summary(result: dict[str, Any]) -> Iterator[str]:
    """Against the source, over all tokens."""
    yield ("| bundle | on | in | perplexity (source) | KL mean | median | 99% | same next token "
           "| error at the end |")  # fmt: skip
    yield "|---|---|---|---|---|---|---|---|---|"
    for b in result["bundles"]:
        yield (f"| {b['name']} | {b['device']} | {b['computed_in']} | {b['perplexity']:.4f} "
               f"({b['source_perplexity']:.4f}) | {b['kl_mean']:.2e} | {b['kl_median']:.2e} "
               f"| {b['kl_99']:.2e} | {b['same_next_token']:.2%} "
               f"| {b['error_by_layer'][-1]:.2e} |")  # fmt: skip


def by_layer(bundles: list[dict[str, Any]]) -> Iterator[str]:
    """The relative error of the hidden states after the embedding and after each layer."""
    yield "| error after | " + " | ".join(f"{b['name']} on {b['device']}" for b in bundles) + " |"
    yield "|---|" + "---|" * len(bundles)
    for n, errors in enumerate(zip(*(b["error_by_layer"] for b in bundles), strict=True)):
        name = f"layer {n - 1}" if n else "embedding"
        yield f"| {name} | " + " | ".join(f"{error:.2e}" for error in errors) + " |"


def time_table(result: dict[str, Any]) -> Iterator[str]:
    """What it cost: as a ratio to reading the files."""
    for one in result["passes"]:
        yield (f"{one['folder']} on {one['device']}: {one['to_reading']:.1f} × the time of reading "
               "its files")  # fmt: skip
    if result["peak_memory"]:
        yield f"most memory that MLX took: {format_bytes(result['peak_memory'])}"


def print_result(result: dict[str, Any]) -> None:
    print_escaped(tables(result).rstrip())
