"""Masks from scores: exact ratios and N:M groups. Pure functions; a mask is true where the weight stays."""

import torch

from structprune.errors import UserError
from structprune.models.adapter import BlockView


def parse_nm(text: str) -> tuple[int, int]:
    """ "2:4" -> (2, 4): N of every M neighbouring inputs go.

    Raises:
        UserError: not 0 < N < M.
    """
    removed, group = (int(part) for part in text.split(":"))
    if not 0 < removed < group:
        raise UserError(f"masking.nm = {text} removes {removed} of every {group}: give N:M with 0 < N < M, such as 2:4")
    return removed, group


def check_pattern(blocks: list[BlockView], nm: str) -> None:
    """Raise UserError where M of `nm`, such as "2:4", does not divide the inputs of a projection."""
    _, group = parse_nm(nm)
    for block in blocks:
        for role, name in block.names.items():
            width = block[role].in_features
            if width % group:
                raise UserError(
                    f"masking.nm = {nm} needs inputs in groups of {group}, but {name} has {width} inputs: choose an M"
                    " that divides it"
                )


def row_mask(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """Removes the lowest `int(C * ratio)` of every row, exactly: (O, C) -> (O, C) bool."""
    count = int(score.shape[1] * ratio)
    lowest = torch.topk(score, count, dim=1, largest=False, sorted=False).indices  # (O, count)
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, lowest, False)


def pooled_mask(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """Removes what is at most the value at sorted index `int(n * ratio)` of all n entries, none at ratio 0.

    Without ties that is one entry more than the ratio, as in SparseGPT: (O, C) -> (O, C) bool.
    """
    if ratio == 0:
        return torch.ones_like(score, dtype=torch.bool)
    count = int(score.numel() * ratio) + 1
    lowest = torch.topk(score.flatten(), count, largest=False, sorted=False).values  # (count,); faster than kthvalue
    return score > lowest.max()


def group_mask(score: torch.Tensor, removed: int, group: int) -> torch.Tensor:
    """Removes the `removed` lowest of every `group` neighbouring columns, of equal scores the first.

    (O, C) -> (O, C) bool, C a multiple of `group`.
    """
    split = score.unflatten(1, (-1, group))  # (O, C / M, M)
    if group <= 16:  # counting who is lower is faster than sorting so few
        split = split.movedim(-1, 0).contiguous()  # (M, O, C / M)
        ranks = [_lower(split, index) for index in range(group)]  # M x (O, C / M)
        return torch.stack([rank >= removed for rank in ranks], dim=-1).flatten(1)
    order = torch.sort(split, dim=-1, stable=True).indices[..., :removed]  # (O, C / M, N)
    return torch.ones_like(split, dtype=torch.bool).scatter_(-1, order, False).flatten(1)


def _lower(split: torch.Tensor, index: int) -> torch.Tensor:
    """How many of each group's entries go before entry `index`: (M, ...) -> (...)."""
    before = (split[:index] <= split[index]).sum(0)  # (...)
    return before + (split[index + 1 :] < split[index]).sum(0)
