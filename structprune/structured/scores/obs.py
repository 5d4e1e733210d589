"""Greedy structured optimal brain surgeon: the exact rise of a layer's output error when a group of inputs is removed.

After the optimal brain surgeon (Hassibi, Stork 1993) and its structured forms (ZipLM, arXiv 2302.04089).
"""

import math
from itertools import islice

import torch

from structprune.config import StructuredSettings
from structprune.structured.paths import RemovalPath
from structprune.structured.units import Units

Round = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # units (n, groups), single costs (n, groups), joint cost ()


def group_costs(weight: torch.Tensor, inverse: torch.Tensor, width: int) -> torch.Tensor:
    """½ tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ) of every group g of `width` neighbouring columns.

    Args:
        weight: (O, C), C = U * width.
        inverse: (C, C) H⁻¹.
    Returns:
        (U,), NaN where [H⁻¹]_gg is singular: raising an error here would force a device sync in every round.
    """
    if width == 1:
        return 0.5 * weight.pow(2).sum(0) / inverse.diagonal()
    units = weight.shape[1] // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (U, w, w)
    columns = weight.view(-1, units, width).permute(1, 2, 0)  # (U, w, O)
    solved, failed = torch.linalg.solve_ex(blocks, columns)  # (U, w, O), (U,)
    return torch.where(failed == 0, 0.5 * (columns * solved).sum((1, 2)), torch.nan)


def remaining(removed: torch.Tensor, size: int) -> torch.Tensor:
    """The indices 0 .. size - 1 that are not in `removed` (G,), in order: (size - G,).

    Without a device sync, which selection by a boolean mask needs.
    """
    marked = torch.zeros(size, dtype=torch.int8, device=removed.device).index_fill_(0, removed, 1)  # (size,)
    return marked.argsort(stable=True)[: size - len(removed)]


def remove_columns(weight: torch.Tensor, inverse: torch.Tensor, columns: torch.Tensor):
    """Remove columns, with the best linear compensation by the remaining ones.

    Args:
        weight: (O, C). inverse: (C, C) H⁻¹. columns: (G,) indices.
    Returns:
        weight (O, C - G), inverse (C - G, C - G) and the joint cost ½ tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ), NaN where [H⁻¹]_gg is
        not positive definite, as in `group_costs`.
    """
    keep = remaining(columns, weight.shape[1])  # (C - G,)
    across = inverse[columns]  # (G, C)
    factor, failed = torch.linalg.cholesky_ex(across[:, columns])  # (G, G), ()
    update = torch.cholesky_solve(across[:, keep], factor)  # (G, C - G)
    removed = weight[:, columns]  # (O, G)
    cost = 0.5 * (removed.T * torch.cholesky_solve(removed.T, factor)).sum()  # ()
    weight = weight[:, keep] - removed @ update  # (O, C - G)
    inverse = inverse[keep][:, keep].addmm_(across[:, keep].T, update, alpha=-1)  # (C - G, C - G)
    return weight, inverse, torch.where(failed == 0, cost, torch.nan)


def damped_inverse(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """(G + λI)⁻¹ in fp64, λ relative to the mean diagonal: (C, C) -> (C, C).

    Raises:
        torch.linalg.LinAlgError: G + λI is not positive definite; checking takes one device sync per layer.
    """
    damped = gram.to(torch.float64, copy=True)  # (C, C)
    # inputs that are always 0 get a λ that can be inverted, and cost next to nothing
    scale = damped.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)  # ()
    damped.diagonal().add_(damping * scale)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def obs_path(
    weight: torch.Tensor, gram: torch.Tensor, groups: list[list[int]], damping: float = 0.01, rounds: int | None = None
) -> RemovalPath:
    """Remove units greedily, re-scored after every round, until one step is left.

    Args:
        weight: (O, C) of the consumer. gram: (C, C) mean of x̃ x̃ᵀ over its rows.
        groups: unit indices per group; a step removes one unit of each, and all units have equally many columns.
        damping: λ relative to the mean diagonal of `gram`.
        rounds: steps are removed in this many rounds; None: one step per round. A round's joint cost is divided in
            proportion to the single costs.
    Returns:
        The path; the last step's cost is infinite, so that no allocation empties a block.
    Raises:
        torch.linalg.LinAlgError: a part of the inverse is not positive definite.
    """
    units = sum(len(group) for group in groups)
    group_of = {unit: number for number, group in enumerate(groups) for unit in group}
    member = torch.tensor([group_of[unit] for unit in range(units)], device=weight.device)  # (U,)
    size = max(1, len(groups[0]) // rounds) if rounds else 1
    removed, rest = eliminate(weight.double(), gram, damping, member, len(groups), size)
    steps, costs = _shared_costs(removed)
    last = tuple(sorted(rest.tolist(), key=group_of.__getitem__))
    return RemovalPath((*steps, last), torch.tensor([*costs, float("inf")], dtype=torch.float64))


def eliminate(
    weight: torch.Tensor, gram: torch.Tensor, damping: float, member: torch.Tensor, groups: int, size: int
) -> tuple[list[Round], torch.Tensor]:
    """The greedy loop: rounds of `size` steps until one step is left, without a device sync.

    Args:
        weight: (O, C) fp64. gram: (C, C). member: (U,) each unit's group of `groups`, equally many in each.
    Returns:
        Per round the removed units (n, groups), their single costs (n, groups) and the joint cost (); and the remaining
        units (groups,).
    """
    units, device = len(member), weight.device
    width, total = weight.shape[1] // units, units // groups
    inverse = damped_inverse(gram, damping)  # (C, C); not passed as an argument, which some Pythons keep alive
    rest = torch.arange(units, device=device)  # (U,)
    rounds: list[Round] = []
    for first in range(0, total - 1, size):
        single = group_costs(weight, inverse, width)  # (U,)
        chosen = cheapest(single, member[rest], groups, min(size, total - 1 - first))  # (n, groups)
        places = chosen.flatten()  # (n * groups,)
        columns = (places[:, None] * width + torch.arange(width, device=device)).flatten()  # (G,)
        weight, inverse, joint = remove_columns(weight, inverse, columns)
        rounds.append((rest[chosen], single[chosen], joint))
        rest = rest[remaining(places, len(rest))]  # (U,)
    return rounds, rest


def cheapest(single: torch.Tensor, member: torch.Tensor, groups: int, count: int) -> torch.Tensor:
    """Positions of the `count` cheapest units of every group, cheapest first, of equal ones the first.

    Args:
        single: (U,) costs. member: (U,) each unit's group of `groups`, equally many in each.
    Returns:
        (count, groups).
    """
    order = single.argsort(stable=True)  # (U,)
    order = order[member[order].argsort(stable=True)]  # (U,), by group and within it by cost
    return order.view(groups, -1)[:, :count].T


def _shared_costs(rounds: list[Round]) -> tuple[list[tuple[int, ...]], list[float]]:
    """Steps, and every round's joint cost divided among its steps in proportion to their single costs."""
    if not rounds:
        return [], []
    units, singles, joints = zip(*rounds)
    costs = []
    read = iter(torch.cat(singles).tolist())  # one transfer, and one for the joint costs
    for part, joint in zip(singles, torch.stack(joints).tolist()):
        shares = [sum(step) for step in islice(read, len(part))]
        costs += [joint * share / max(sum(shares), 1e-300) for share in shares]
    if any(math.isnan(cost) for cost in costs):
        raise torch.linalg.LinAlgError("obs: a part of the inverse Hessian is not positive definite: raise the damping")
    return [tuple(step) for step in torch.cat(units).tolist()], costs


def path(units: Units, gram: torch.Tensor, settings: StructuredSettings) -> RemovalPath:
    """`obs_path` of one block and kind; channels go in rounds, attention units one by one."""
    rounds = settings.rounds if units.kind == "channels" else None
    return obs_path(units.weight.to(gram.device), gram, units.groups, settings.damping, rounds)
