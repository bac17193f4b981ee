"""A bundle of any layout as if it had storage names: each source tensor's counterpart by its name.

Nothing is copied. A stacked expert is some bytes of the stack, a split matrix the blocks one after
the other; a tensor of the view says in `disk` what it is on disk. So whoever judges a bundle knows
storage names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsv4.model.layouts import STORAGE, RecognizedScheme, recognize_layout
from dsv4.storage.checkpoint import Checkpoint
from dsv4.storage.limits import MATRICES
from dsv4.storage.safetensors_file import Tensor

SHARED = "tq_bits"  # one number for all experts of a stack


@dataclass(frozen=True)
class StorageView(Checkpoint):
    """A checkpoint's tensors under storage names, and how they were found.

    odd: tensors on disk that have a place in the layout and not its shape, or share it with
    another; why.
    """

    recognised: RecognizedScheme
    tensors: dict[str, Tensor] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)

    def name_on_disk(self, name: str) -> str:
        """What a tensor of the view is on disk, or what the layout would call it."""
        tensor = self.tensors.get(name)
        if tensor is not None:
            return tensor.disk or name
        return self.recognised.layout.runtime_name(name) or name


def build_view(checkpoint: Checkpoint) -> StorageView:
    """The view of a checkpoint by the layout that knows most of its names."""
    tensors = checkpoint.tensors
    recognised = recognize_layout(tensors)
    view = StorageView(
        checkpoint.folder, checkpoint.config, checkpoint.weight_map, checkpoint.shards, recognised
    )
    if recognised.layout is STORAGE:
        view.tensors.update(tensors)
    else:
        translate(tensors, view)
    return view


def translate(tensors: Mapping[str, Tensor], view: StorageView) -> None:
    """Put every tensor that the layout knows where it belongs."""
    blocks: dict[str, dict[int, Tensor]] = {}
    shared = []
    left_out = set(view.recognised.unknown).union(*view.recognised.others.values())
    for name, tensor in tensors.items():
        place = None if name in left_out else view.recognised.layout.locate(name)
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
    """Add one tensor to the view, unless its place is taken."""
    if tensor is None:
        return
    if tensor.name in view.tensors:
        view.odd[tensor.disk] = f"also {view.tensors[tensor.name].disk or tensor.name}"
    view.tensors.setdefault(tensor.name, tensor)


def flatten_groups(tensor: Tensor) -> Tensor:
    """Three axes as two: rows in groups are rows."""
    if len(tensor.shape) != 3:
        return tensor
    first, second, last = tensor.shape
    return replace(tensor, shape=(first * second, last))


def split_stack(name: str, tensor: Tensor, view: StorageView) -> None:
    """Each expert's part of a stack."""
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
    """The blocks of a split matrix as one tensor, when they fit each other."""
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
