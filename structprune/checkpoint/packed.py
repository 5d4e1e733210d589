"""A written checkpoint whose masked weights are packed as compressed-tensors unpacks them (`bitmask`).

Only files change: each shard is written again with parts in place of weights, read back, and takes the old one's place.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from structprune.checkpoint.bitmask import ANY, PAIRS, PARTS, STRUCTURES, in_pairs, pack, packed_bytes, unpack
from structprune.checkpoint.export import auto_map
from structprune.checkpoint.output import write_json
from structprune.errors import UserError
from structprune.masking.masks import Masks
from structprune.models.adapter import Adapter
from structprune.models.checkpoint_files import read_json, shard_names
from structprune.models.configuration_structprune import LayoutConfig
from structprune.models.modeling_structprune import DiffusionLM

FORMAT = "compressed-tensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Packing:
    """What is packed, and how.

    Attributes:
        layout: one of `bitmask.STRUCTURES`.
        kept: name of a weight -> how many of its values are stored.
        masks: of these weights, and maybe of others.
    """

    layout: str
    kept: dict[str, int]
    masks: Masks

    def saved_bytes(self, itemsize: int) -> int:
        """How many bytes fewer the weights take, where a value takes `itemsize`."""
        return sum(_saved(self.masks.shapes[name], kept, itemsize, self.layout) for name, kept in self.kept.items())

    @property
    def settings(self) -> dict:
        """The entry `quantization_config` of config.json."""
        targets = [name.removesuffix(".weight") for name in self.kept]
        sparsity = {"format": self.layout, "targets": targets, "sparsity_structure": STRUCTURES[self.layout]}
        return {"quant_method": FORMAT, "sparsity_config": sparsity}


def _saved(shape: tuple[int, int], kept: int, itemsize: int, layout: str) -> int:
    return math.prod(shape) * itemsize - packed_bytes(shape, kept, itemsize, layout)


def choose_packing(masks: Masks, model: DiffusionLM, itemsize: int) -> Packing:
    """How the masked projections of a model are packed: in pairs where all masks are 2:4, and those that gain by it.

    Args:
        masks: from the model's directory. model: may be on the meta device.
        itemsize: bytes of a value as it is written.
    Raises:
        UserError: masks of another model, a family whose code refuses no release, or no weight that becomes smaller.
    """
    adapter, state, masks = Adapter(model), model.state_dict(), masks.split(model)
    if not auto_map(adapter.family) or not isinstance(model.config, LayoutConfig):
        reason = f"files that define family '{adapter.family.name}' and refuse releases that would misread it"
        raise UserError(f"--format {FORMAT} needs {reason}: leave it out")
    for name, shape in sorted(masks.shapes.items()):
        if name not in state or tuple(state[name].shape) != shape:
            there = tuple(state[name].shape) if name in state else "not there"
            difference = f"{name} is {there}, not {shape}"
            raise UserError(f"masks.safetensors is not of this checkpoint ({difference}): mask it anew")
    names = [f"{module}.weight" for block in adapter.blocks for module in block.names.values()]
    keeps = ((name, masks.kept(name)) for name in names if name in masks.shapes)
    counts = {name: (int(keep.sum()), in_pairs(keep)) for name, keep in keeps}
    layout = PAIRS if all(pairs for _, pairs in counts.values()) else ANY
    sizes = {name: _saved(masks.shapes[name], count, itemsize, layout) for name, (count, _) in counts.items()}
    chosen = {name: count for name, (count, _) in counts.items() if sizes[name] > 0}
    if not chosen:
        reason = "the masks remove too few weights for packed ones to be smaller"
        raise UserError(f"--format {FORMAT}: {reason}: leave it out, or mask at a higher ratio")
    return Packing(layout, chosen, masks)


def check_zeros(model: DiffusionLM, masks: Masks) -> None:
    """Raise UserError where a weight that its mask removes is not zero."""
    state = model.state_dict()
    for name in sorted(masks.shapes):
        if count := int((state[name][~masks.kept(name)] != 0).sum()):
            remedy = "set them to zero with Masks.apply, and train with keep_zeros"
            raise UserError(f"{name} has {count:,} weights other than 0 that masks.safetensors removes: {remedy}")


def pack_directory(draft: Path, packing: Packing) -> int:
    """Pack the weights of a written checkpoint, and name them in its config.json; returns the bytes of all tensors.

    Raises:
        RuntimeError: what was packed is not, bit by bit, what was there (with +0 for -0).
    """
    places: dict[str, str] = {}
    total = 0
    for shard in shard_names(draft):
        path, packed = draft / shard, draft / f"packed-{shard}"
        state = dict(_packed(path, packing))
        save_file(state, packed, metadata={"format": "pt"})
        places |= dict.fromkeys(state, shard)
        total += sum(tensor.nbytes for tensor in state.values())
        del state
        _compare(path, packed)
        os.replace(packed, path)
    if (draft / INDEX).exists():
        write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    write_json(draft / "config.json", read_json(draft / "config.json") | {"quantization_config": packing.settings})
    return total


def _packed(path: Path, packing: Packing) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a shard, with parts in place of what is packed."""
    with safe_open(path, framework="pt") as shard:
        for name in sorted(shard.keys()):
            tensor = shard.get_tensor(name)
            if name in packing.kept:
                for part, value in pack(tensor, packing.layout).items():
                    yield f"{name.removesuffix('weight')}{part}", value
            else:
                yield name, tensor


def _compare(path: Path, packed: Path) -> None:
    """Raise RuntimeError unless every tensor of a shard is the same in a packed one."""
    with safe_open(path, framework="pt") as one, safe_open(packed, framework="pt") as other:
        present = set(other.keys())
        for name in sorted(one.keys()):
            before = one.get_tensor(name)
            if name in present:
                same = _same(before, other.get_tensor(name))
            else:
                places = {part: f"{name.removesuffix('weight')}{part}" for part in PARTS}
                parts = {part: other.get_tensor(place) for part, place in places.items() if place in present}
                same = _unpacks_to(parts, before)
            if not same:
                raise RuntimeError(f"{name} is not the same once packed: please report this")


def _unpacks_to(parts: dict[str, torch.Tensor], weight: torch.Tensor) -> bool:
    """Whether parts are those of a weight (O, C), whose -0 is +0 there."""
    try:
        return _same(weight.masked_fill(weight == 0, 0), unpack(parts))
    except (KeyError, ValueError):  # parts that are missing, or contradict each other
        return False


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
