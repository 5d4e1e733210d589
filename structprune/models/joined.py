"""Weights that a family's own files hold in one, row below row, and its models have apart (`Family.joined`)."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from structprune.errors import UserError
from structprune.models.families import family_of
from structprune.models.headers import TensorHeader
from structprune.models.modeling_structprune import DiffusionLM

Stored = TypeVar("Stored", TensorHeader, torch.Tensor)


def joined_names(model: DiffusionLM) -> dict[str, dict[str, int]]:
    """Name of a weight in official files -> the model's own names of its parts, and rows of each, from the top.

    Empty of most families. Biases are joined as weights are.
    """
    family = family_of(model.config)
    names: dict[str, dict[str, int]] = {}
    for index, block in enumerate(model.blocks):
        prefix = f"{family.blocks}.{index}"
        for path, roles in family.joined.items():
            linears = {f"{prefix}.{block.roles[role]}": block.part(role) for role in roles if role in block.roles}
            for kind in ("weight", "bias"):
                # of an adapter around a linear too, whose weight has another name
                if linears and all(getattr(linear, kind, None) is not None for linear in linears.values()):
                    rows = {f"{part}.{kind}": linear.out_features for part, linear in linears.items()}
                    names[f"{prefix}.{path}.{kind}"] = rows
    return names


def split_stored(model: DiffusionLM, stored: Mapping[str, Stored], where: Path | str) -> dict[str, Stored]:
    """Headers or tensors of files under the model's own names, whether the files join weights or not.

    Rows lie one behind the other in a file, so that the header of a part names its place there.

    Raises:
        UserError: a joined weight has other rows than its parts take.
    """
    result: dict[str, Any] = dict(stored)
    for name, parts in joined_names(model).items():
        if name not in result:
            continue
        whole, rows = result.pop(name), sum(parts.values())
        if not whole.shape or whole.shape[0] != rows:
            asked = f"config.json asks for {rows} rows, {' + '.join(map(str, parts.values()))} of what it joins"
            raise UserError(f"{where}: {name} is {tuple(whole.shape)}, but {asked}")
        start = 0
        for part, count in parts.items():
            result[part] = _rows(whole, start, start + count)
            start += count
    return result


def _rows(whole: TensorHeader | torch.Tensor, start: int, stop: int) -> TensorHeader | torch.Tensor:
    if isinstance(whole, torch.Tensor):
        return whole[start:stop].clone()  # so that parts can be written to, and freed, one by one
    first, row = whole.span[0], (whole.span[1] - whole.span[0]) // whole.shape[0]
    return replace(whole, shape=(stop - start, *whole.shape[1:]), span=(first + start * row, first + stop * row))


def join_state(model: DiffusionLM, state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Names in official files -> the tensors that lie there row below row; most are one."""
    names = joined_names(model)
    owners = {part: name for name, parts in names.items() for part in parts}
    result = {owners.get(name, name): (tensor,) for name, tensor in state.items()}
    return result | {name: tuple(state[part] for part in parts) for name, parts in names.items()}
