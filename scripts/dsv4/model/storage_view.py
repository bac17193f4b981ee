"""View a bundle of any naming scheme under storage names.

Nothing is copied. A stacked expert is some bytes of the stack, and a split matrix is its blocks one
after the other. `Tensor.disk` has the name on disk, so code that reads a view needs storage names
only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsv4.model.naming_schemes import STORAGE, RecognizedScheme, recognize_scheme
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.limits import MATRICES
from dsv4.storage.safetensors_file import Tensor

SHARED = "tq_bits"  # one number for all experts of a stack


@dataclass(frozen=True)
class StorageView(Checkpoint):
    """A checkpoint's tensors under storage names.

    odd: name on disk → reason, for tensors whose shape does not fit their place in the scheme, or
    that share it with another.
    """

    recognized: RecognizedScheme
    tensors: dict[str, Tensor] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)

    def name_on_disk(self, name: str) -> str:
        """Return the name on disk of a tensor of the view, or the scheme's name for it."""
        tensor = self.tensors.get(name)
        if tensor is not None:
            return tensor.disk or name
        return self.recognized.scheme.runtime_name(name) or name


def build_view(checkpoint: Checkpoint) -> StorageView:
    """Return the view of a checkpoint by the scheme that has most of its names."""
    tensors = checkpoint.tensors
    recognized = recognize_scheme(tensors)
    view = StorageView(
        checkpoint.folder, checkpoint.config, checkpoint.weight_map, checkpoint.shards, recognized
    )
    if recognized.scheme is STORAGE:
        view.tensors.update(tensors)
    else:
        translate(tensors, view)
    return view


def translate(tensors: Mapping[str, Tensor], view: StorageView) -> None:
    """Add every tensor whose name the scheme has to the view."""
    blocks: dict[str, dict[int, Tensor]] = {}
    shared = []
    left_out = set(view.recognized.unknown).union(*view.recognized.others.values())
    for name, tensor in tensors.items():
        place = None if name in left_out else view.recognized.scheme.locate(name)
        if place is None:
            continue
        if place.block is not None:
            blocks.setdefault(place.name, {})[place.block] = tensor
        elif place.stacked and name.endswith(SHARED):
            shared.append((place.name, tensor))
        elif place.stacked:
            split_stack(place.name, tensor, view)
        else:
            add_tensor(view, replace(flatten_groups(tensor), name=place.name, disk=name))
    for name, pieces in blocks.items():
        add_tensor(view, join_blocks(name, pieces, view))
    for name, tensor in shared:
        expert = 0
        while (one := name.replace(".E.", f".{expert}.")).replace(SHARED, "tq_packed") in (
            view.tensors
        ):
            add_tensor(view, replace(tensor, name=one, disk=tensor.name))
            expert += 1


def add_tensor(view: StorageView, tensor: Tensor | None) -> None:
    """Add one tensor to the view, unless its place is taken; then note it as odd."""
    if tensor is None:
        return
    if tensor.name in view.tensors:
        view.odd[tensor.disk] = f"also {view.tensors[tensor.name].disk or tensor.name}"
    view.tensors.setdefault(tensor.name, tensor)


def flatten_groups(tensor: Tensor) -> Tensor:
    """Return a matrix of three axes, rows in groups, as one of two."""
    if len(tensor.shape) != 3:
        return tensor
    first, second, last = tensor.shape
    return replace(tensor, shape=(first * second, last))


def split_stack(name: str, tensor: Tensor, view: StorageView) -> None:
    """Add each expert of a stack to the view."""
    experts = tensor.shape[0] if len(tensor.shape) > 1 else 0
    if not 0 < experts <= MATRICES - len(view.tensors):
        view.odd[tensor.name] = f"shape {list(tensor.shape)}, no stack of experts"
        return
    size = tensor.nbytes // experts
    for expert in range(experts):
        one = name.replace(".E.", f".{expert}.")
        at = f"{tensor.name}[{expert}]"
        add_tensor(view, replace(tensor, name=one, shape=tensor.shape[1:], nbytes=size,
                          offset=tensor.offset + expert * size, disk=at))  # fmt: skip


def join_blocks(name: str, pieces: dict[int, Tensor], view: StorageView) -> Tensor | None:
    """Return the blocks of a split matrix as one tensor, or None if they do not fit each other."""
    ordered = [pieces[number] for number in sorted(pieces)]
    first = ordered[0]
    kinds = {(piece.dtype, piece.shape[1:]) for piece in ordered}
    if sorted(pieces) != list(range(len(pieces))) or len(kinds) > 1 or len(first.shape) != 2:
        view.odd[first.name] = f"{len(pieces)} blocks of rows that do not make one matrix"
        return None
    rows, nbytes = sum(p.shape[0] for p in ordered), sum(p.nbytes for p in ordered)
    last = ordered[-1].name.split(".")[-2]
    return replace(first, name=name, shape=(rows, first.shape[1]), nbytes=nbytes,
                   disk=f"{first.name} to .{last}", pieces=tuple(ordered))  # fmt: skip
