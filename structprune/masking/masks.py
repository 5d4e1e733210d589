"""Which weights are kept, one bit each, in memory and as masks.safetensors."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from structprune.errors import UserError, nearest
from structprune.files import first_line
from structprune.models.joined import joined_names
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.tensor_files import write_tensors

FORMAT = "structprune-masks-1"
WRAPPED = re.compile(r"^(?:(?:module|_orig_mod)\.)*(?:base_model\.model\.)?(?:_orig_mod\.)?")  # DDP, compile, PEFT
INSIDE = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save\.[^.]+|_orig_mod|_checkpoint_wrapped_module)(?=\.)"
)


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """One bit per weight, the first of eight columns in the lowest bit, unused bits zero.

    (O, C) bool -> (O, ceil(C / 8)) uint8 on the same device.
    """
    bits = F.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8))  # (O, 8 * ceil(C / 8))
    packed = bits[:, 0::8].clone()  # (O, ceil(C / 8))
    for bit in range(1, 8):
        packed |= bits[:, bit::8] << bit
    return packed


def unpack_bits(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack_bits`: (O, ceil(C / 8)) uint8 -> (O, C) bool, C = `columns`."""
    bit = 2 ** torch.arange(8, dtype=torch.uint8, device=packed.device)  # (8,)
    return (packed[..., None] & bit).flatten(1)[:, :columns] != 0  # (O, C)


def plain_name(name: str) -> str:
    """A weight's name in the bare model: without what PEFT, DDP, torch.compile or a checkpointing wrapper add."""
    return INSIDE.sub("", WRAPPED.sub("", name))


@dataclass(frozen=True, eq=False)
class Masks:
    """Kept weights of a masked model, packed.

    Attributes:
        packed: state-dict name of the weight -> (O, ceil(C / 8)) uint8, see `pack_bits`.
        shapes: the same names -> (O, C).
    Raises:
        UserError: a packed tensor does not have the shape, dtype or unused bits that its (O, C) implies.
    """

    packed: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, int]]

    def __post_init__(self) -> None:
        for name in sorted(self.packed.keys() ^ self.shapes.keys()):
            raise UserError(f"'{name}' has a mask or a shape, but not both: make the masks anew")
        for name, (rows, columns) in self.shapes.items():
            bits, expected = self.packed[name], (rows, -(-columns // 8))
            if bits.dtype != torch.uint8 or tuple(bits.shape) != expected:
                got = f"{tuple(bits.shape)} {str(bits.dtype).removeprefix('torch.')}"
                raise UserError(
                    f"the mask of '{name}' is {got}, not {expected} uint8 as {rows} x {columns} weights need"
                )
            if columns % 8 and bool((bits[:, -1] >> columns % 8).any()):
                raise UserError(f"the mask of '{name}' has bits beyond its {columns} columns: make the masks anew")

    @classmethod
    def of(cls, model: nn.Module) -> "Masks":
        """The zeros that the weights of a model's nn.Linear have, on CPU; weights without a zero get no mask.

        Raises:
            UserError: a weight is not in memory whole.
        """
        packed, shapes = {}, {}
        for name, linear in _linears(model):
            weight = linear.weight.detach()  # (O, C)
            if not weight.is_floating_point():  # quantised: its zero is not a removed weight
                continue
            _check_whole(name, weight)
            if not bool((weight == 0).any()):
                continue
            packed[name] = pack_bits(weight != 0).cpu()
            shapes[name] = (weight.shape[0], weight.shape[1])
        return cls(packed, shapes)

    def kept(self, name: str) -> torch.Tensor:
        """(O, C) bool, True where the weight is kept.

        Raises:
            UserError: no mask of that name.
        """
        self._check_name(name)
        return unpack_bits(self.packed[name], self.shapes[name][1])

    def sparsity(self, name: str | None = None) -> float:
        """Removed weights over all weights, of one tensor or of all masked ones (0 where there are none).

        Raises:
            UserError: no mask of that name.
        """
        if name is not None:
            self._check_name(name)
        chosen = list(self.packed) if name is None else [name]
        total = sum(math.prod(self.shapes[key]) for key in chosen)
        ones = sum(int(np.unpackbits(self.packed[key].cpu().numpy()).sum()) for key in chosen)
        return (total - ones) / total if total else 0.0

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all: a uint8 tensor per weight, its `OxC` in the metadata.

        Raises:
            UserError: the file cannot be written.
        """
        metadata = {"format": FORMAT} | {name: f"{rows}x{columns}" for name, (rows, columns) in self.shapes.items()}
        write_tensors(path, self.packed, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Masks":
        """Read a mask file, onto CPU.

        Raises:
            UserError: the file is missing, unreadable, not a mask file, or a mask does not fit its weight's shape.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"no mask file at '{path}': give the masks.safetensors of a masked checkpoint")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                names = list(file.keys()) if metadata.pop("format", None) == FORMAT else None
                packed = {name: file.get_tensor(name) for name in names or ()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({first_line(error)})") from error
        if names is None:
            raise UserError(f"{path} is not a mask file of format '{FORMAT}': give the masks.safetensors of a run")
        shapes = {}
        for name, text in metadata.items():
            match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
            if not match:
                raise UserError(f"{path}: metadata '{name}' is '{text}', not a shape such as 4096x12288")
            shapes[name] = (int(match[1]), int(match[2]))
        try:
            return cls(packed, shapes)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def split(self, model: nn.Module) -> "Masks":
        """Under the names of a model, plain or wrapped, that has apart what files join (`Family.joined`)."""
        bare = next((module for module in model.modules() if isinstance(module, DiffusionLM)), None)
        packed, shapes = dict(self.packed), dict(self.shapes)
        for name, parts in (joined_names(bare) if bare else {}).items():
            if name not in packed or len(packed[name]) != sum(parts.values()):
                continue
            rows, (_, columns) = packed.pop(name).split(list(parts.values())), shapes.pop(name)
            packed |= dict(zip(parts, rows))
            shapes |= {part: (count, columns) for part, count in parts.items()}
        return Masks(packed, shapes)

    def joined(self, model: DiffusionLM) -> "Masks":
        """The inverse of `split`: as in files of the family's own layout. A part without a mask is kept whole."""
        packed, shapes = dict(self.packed), dict(self.shapes)
        for name, parts in joined_names(model).items():
            columns = next((self.shapes[part][1] for part in parts if part in self.shapes), None)
            if columns is None:
                continue
            whole = [
                packed.pop(part) if part in packed else pack_bits(torch.ones(count, columns, dtype=torch.bool))
                for part, count in parts.items()
            ]
            packed[name] = torch.cat(whole)  # (O, ceil(C / 8))
            shapes = {key: shape for key, shape in shapes.items() if key not in parts}
            shapes[name] = (len(packed[name]), columns)
        return Masks(packed, shapes)

    def find(self, model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The weights of a model, plain or wrapped, that each mask is for, with their full names.

        They are several where PEFT's `modules_to_save` trains a copy.

        Raises:
            UserError: a weight is missing, has another shape, or is not in memory whole.
        """
        known: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for full, weight in model.named_parameters(remove_duplicate=False):
            known.setdefault(plain_name(full), []).append((full, weight))
        matches = {}
        for name, shape in self.split(model).shapes.items():
            matches[name] = known.get(plain_name(name), [])
            if not matches[name]:
                hint = nearest(name, list(known))
                raise UserError(f"the model has no weight '{name}', which the masks name{hint}: use this model's own")
            for full, weight in matches[name]:
                if tuple(weight.shape) != tuple(shape):
                    raise UserError(f"'{full}' has shape {tuple(weight.shape)}, but its mask is for {tuple(shape)}")
                _check_whole(full, weight)
        return matches

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the removed weights of `model` to exactly 0, in place; nothing is changed when anything is wrong.

        Raises:
            UserError: a weight is missing, has another shape, or is not in memory whole.
        """
        packed = self.split(model).packed
        for name, weights in self.find(model).items():
            for _, weight in weights:
                keep = unpack_bits(packed[name].to(weight.device), weight.shape[1])  # (O, C)
                weight.masked_fill_(~keep, 0)  # a product would leave -0 and NaN

    def _check_name(self, name: str) -> None:
        if name not in self.packed:
            raise UserError(f"no mask of '{name}'{nearest(name, list(self.packed))}")


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of the bare model with the names of their weights: no adapter's, and no trained copy's."""
    modules = dict(model.named_modules())
    adapted = {name for name, module in modules.items() if "base_layer" in module._modules}
    linears = []
    for name, module in modules.items():
        path = name.split(".")
        owners = [(".".join(path[:end]), path[end]) for end in range(len(path))]
        added = any(owner in adapted and child != "base_layer" for owner, child in owners)
        if isinstance(module, nn.Linear) and not added and "modules_to_save" not in path:
            linears.append((plain_name(f"{name}.weight"), module))
    return linears


def _check_whole(name: str, weight: torch.Tensor) -> None:
    if weight.is_meta or hasattr(weight, "device_mesh"):
        how = "is offloaded (meta)" if weight.is_meta else "is sharded (DTensor)"
        raise UserError(f"'{name}' {how}: masks need whole weights in memory")
