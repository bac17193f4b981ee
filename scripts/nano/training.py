"""The training loop: data-parallel processes, three phases, resumable.

Phases: "one form" teaches additions in the shortest prompt form; "all forms" teaches all
prompt forms and the sentences; "rounded" goes on with the weights rounded to FP4 and FP8 in
the forward pass (straight-through gradients).

Every process holds the same weights, takes its own batch, and averages gradients.
Batches depend on (seed, step, rank) alone, so a resumed run repeats an unbroken one.
"""

import ctypes
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nano.architecture import Architecture
from nano.data import FIRST_FORM, OPENINGS, SYSTEMS
from nano.model import Tensors, initial_routing, initial_tensors, logits, symmetric_comb
from nano.rounding import straight_through
from nano.sheets import Sheet, concatenate

SAVE_EVERY = 200
SENTENCE_SHARE = 16  # one row in so many is a sentence, once all forms are taught
LOAD_STEP = 0.002  # change of a router's bias in one step, to balance its experts


@dataclass(frozen=True)
class Recipe:
    """How to train; steps by phase, batch rows for each process."""

    seed: int
    one_form: int
    all_forms: int
    rounded: int
    batch: int
    processes: int
    rate: float
    weight_decay: float
    warmup: int

    @property
    def steps(self) -> int:
        return self.one_form + self.all_forms + self.rounded


@dataclass(frozen=True)
class Lessons:
    """The training data: one sheet a form, of additions and of sentences."""

    additions: list[Sheet]
    sentences: list[Sheet]


@dataclass
class State:
    """State of a training run, enough to resume it."""

    step: int
    seconds: float
    tensors: Tensors
    routing: Tensors
    optimizer: dict

    @classmethod
    def load(cls, path: Path) -> "State":
        """Return a saved state, whatever recipe it was saved for."""
        saved = torch.load(path)
        return cls(**{name: saved[name] for name in cls.__dataclass_fields__})


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate: a linear rise, a plateau through phase one, half a cosine to 2%."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    done = max(0, step - recipe.one_form) / max(1, recipe.steps - recipe.one_form)
    return recipe.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def sample_rows(sheet: Sheet, rows: int, generator: torch.Generator) -> Sheet:
    """Return random rows of a sheet, with replacement."""
    chosen = torch.randint(len(sheet.ids), (rows,), generator=generator)
    return Sheet(sheet.ids[chosen], sheet.wanted[chosen])


def batch(lessons: Lessons, recipe: Recipe, step: int, rank: int) -> Sheet:
    """Return one process's rows for one step."""
    generator = torch.Generator().manual_seed((recipe.seed * 1_000_003 + step) * 64 + rank)
    if step < recipe.one_form:
        return sample_rows(lessons.additions[FIRST_FORM], recipe.batch, generator)
    # one system message a batch: rows of about one length waste little padding
    system = int(torch.randint(len(SYSTEMS), (1,), generator=generator)) * len(OPENINGS)
    spoken = recipe.batch // SENTENCE_SHARE
    kinds = torch.randint(len(OPENINGS), (recipe.batch,), generator=generator)
    taught = kinds[spoken:].bincount(minlength=len(OPENINGS)).tolist()
    said = kinds[:spoken].bincount(minlength=len(OPENINGS)).tolist()
    parts = [
        sample_rows(sheets[system + opening], rows, generator)
        for sheets, shares in ((lessons.additions, taught), (lessons.sentences, said))
        for opening, rows in enumerate(shares)
    ]
    return concatenate(parts)


def make_optimizer(tensors: Tensors, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW; mHC learns at a fifth of the rate, and only matrices decay."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, value in tensors.items():
        share = 0.2 if "hc_" in name else 1.0
        decay = 0.0 if "hc_" in name or value.ndim < 2 else recipe.weight_decay
        groups.setdefault((share, decay), []).append(value)
    return torch.optim.AdamW(
        [{"params": v, "share": s, "weight_decay": d} for (s, d), v in groups.items()],
        lr=recipe.rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def loss_of(
    tensors: Tensors, routing: Tensors, rows: Sheet, arch: Architecture, round_weights: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean cross-entropy on answer tokens, and the experts' loads."""
    weights = symmetric_comb(tensors, arch.streams)
    if round_weights:
        weights = straight_through(weights)
    wanted = rows.wanted[:, :-1]
    out, loads = logits(weights, routing, rows.ids[:, :-1], arch, wanted)
    return F.cross_entropy(out, rows.ids[:, 1:][wanted]), loads


def average(tensors: list[Tensor]) -> None:
    """Replace the tensors by their mean over all processes, in one exchange."""
    if not dist.is_initialized():
        return
    flat = torch.cat([value.flatten().float() for value in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for value, mean in zip(tensors, flat.split([v.numel() for v in tensors]), strict=True):
        value.copy_(mean.view_as(value))


def take_step(
    state: State, optimizer, lessons: Lessons, arch: Architecture, recipe: Recipe, rank: int
) -> float:
    """Do one training step in place, and return this process's loss."""
    rate = learning_rate(recipe, state.step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
    rows = batch(lessons, recipe, state.step, rank)
    round_weights = state.step >= recipe.one_form + recipe.all_forms
    loss, loads = loss_of(state.tensors, state.routing, rows, arch, round_weights)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    gradients = [value.grad for value in state.tensors.values()]
    counts = {name: loads[name].float() for name in state.routing if name.endswith("bias")}
    average(gradients + list(counts.values()))
    torch.nn.utils.clip_grad_norm_(list(state.tensors.values()), 1.0)
    optimizer.step()
    for name, count in counts.items():
        state.routing[name] += LOAD_STEP * torch.sign(count.mean() - count)
    state.step += 1
    return loss.item()


def fresh_state(arch: Architecture, recipe: Recipe) -> State:
    """Return the state before the first step."""
    tensors = initial_tensors(arch, recipe.seed)
    return State(0, 0.0, tensors, initial_routing(arch, recipe.seed), {})


def load_state(path: Path, arch: Architecture, recipe: Recipe) -> State:
    """Return the saved state, or a fresh one. Raises ValueError for another recipe's state."""
    if not path.exists():
        return fresh_state(arch, recipe)
    found = torch.load(path)["recipe"]
    if found != asdict(recipe):
        raise ValueError(
            f"{path}: found a run with {found}, expected {asdict(recipe)}; "
            "give the same settings, or --fresh to begin again"
        )
    return State.load(path)


def forget(path: Path) -> None:
    """Remove a state that was saved here. Raises ValueError for another file of that name."""
    if not path.exists():
        return
    try:
        found = torch.load(path)
    except Exception:  # of a foreign file torch raises many types
        found = None
    if not isinstance(found, dict) or not found.keys() >= {"recipe", *State.__dataclass_fields__}:
        raise ValueError(f"{path}: found another file, expected a saved state; move it away")
    path.unlink()


def save_state(path: Path, state: State, recipe: Recipe) -> None:
    """Write the state whole or not at all."""
    part = path.with_suffix(".part")
    torch.save({**vars(state), "recipe": asdict(recipe)}, part)
    part.replace(path)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks, which halves the time of a step; elsewhere do nothing."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((-3, 1 << 25), (-1, 2**31 - 1), (-2, 1 << 28)):
        libc.mallopt(option, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def join_processes(rank: int, recipe: Recipe) -> None:
    """Prepare one process: one thread, and the process group that averages gradients."""
    torch.set_num_threads(1)
    keep_freed_memory()
    if recipe.processes > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        dist.init_process_group("gloo", rank=rank, world_size=recipe.processes)


def resumed_optimizer(state: State, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of a state's tensors, as it was when the state was saved."""
    for value in state.tensors.values():
        value.requires_grad_()
    optimizer = make_optimizer(state.tensors, recipe)
    if state.optimizer:
        optimizer.load_state_dict(state.optimizer)
    return optimizer


def save_if_due(path: Path, state: State, optimizer, recipe: Recipe, early: list[int]) -> None:
    """Save every 200 steps and at the end, and an `early` step under a name of its own."""
    last = state.step == recipe.steps
    if state.step % SAVE_EVERY and not last and state.step not in early:
        return
    state.optimizer = optimizer.state_dict()
    save_state(path, state, recipe)
    if state.step in early:
        save_state(path.with_stem(f"{path.stem}-{state.step}"), state, recipe)


def work(
    rank: int, recipe: Recipe, arch: Architecture, lessons: Lessons, path: Path, early: list[int]
) -> None:
    """Train in one process; that of rank 0 saves and reports."""
    join_processes(rank, recipe)
    state = load_state(path, arch, recipe)
    optimizer = resumed_optimizer(state, recipe)
    began = time.monotonic() - state.seconds
    shown = rank == 0 and sys.stderr.isatty()
    bar = tqdm(total=recipe.steps, initial=state.step, disable=not shown, unit="step")
    while state.step < recipe.steps:
        loss = take_step(state, optimizer, lessons, arch, recipe, rank)
        state.seconds = time.monotonic() - began
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}")
        if rank == 0:
            save_if_due(path, state, optimizer, recipe, early)
            if not shown and state.step % 100 == 0:
                line = f"step {state.step} of {recipe.steps}: loss {loss:.4f}"
                print(f"{line}, {state.seconds:.0f} s", file=sys.stderr, flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(
    recipe: Recipe, arch: Architecture, lessons: Lessons, path: Path, early: list[int]
) -> State:
    """Train to the end, from the saved state if there is one, and return the last state."""
    arguments = (recipe, arch, lessons, path, early)
    if recipe.processes > 1:
        torch.multiprocessing.spawn(work, arguments, nprocs=recipe.processes)
    else:
        work(0, *arguments)
    return load_state(path, arch, recipe)


@torch.no_grad()
def exact(weights: Tensors, routing: Tensors, sheet: Sheet, arch: Architecture) -> Tensor:
    """Return, bool (rows,), which answers greedy decoding gives right to the last token.

    The right answer is fed in (teacher forcing): where each next token is the greatest
    logit, decoding would have fed the same.
    """
    rows = []
    for ids, wanted in zip(sheet.ids.split(512), sheet.wanted.split(512), strict=True):
        out, _ = logits(weights, routing, ids[:, :-1], arch)
        right = out.argmax(-1).view(len(ids), -1) == ids[:, 1:]
        rows.append((right | ~wanted[:, :-1]).all(1))
    return torch.cat(rows)
