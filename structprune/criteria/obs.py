"""Greedy structured optimal brain surgeon: the exact rise of a layer's output error when a group of inputs goes.

After the optimal brain surgeon (Hassibi, Stork 1993) and its structured forms (ZipLM, arXiv 2302.04089).
"""

import torch

from structprune.criteria.paths import RemovalPath


def group_costs(weight: torch.Tensor, inverse: torch.Tensor, width: int) -> torch.Tensor:
    """½ tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ) of every group g of `width` neighbouring columns.

    Args:
        weight: (O, C), C = U * width.
        inverse: (C, C) H⁻¹.
    Returns:
        (U,).
    """
    if width == 1:
        return 0.5 * weight.pow(2).sum(0) / inverse.diagonal()
    units = weight.shape[1] // width
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (U, w, w)
    columns = weight.view(-1, units, width).permute(1, 2, 0)  # (U, w, O)
    return 0.5 * (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


def remove_columns(weight: torch.Tensor, inverse: torch.Tensor, gone: torch.Tensor):
    """Remove columns with the best linear compensation by those left.

    Args:
        weight: (O, C). inverse: (C, C) H⁻¹. gone: (G,) column indices.
    Returns:
        weight (O, C - G), inverse (C - G, C - G) and the joint cost ½ tr(W_g ([H⁻¹]_gg)⁻¹ W_gᵀ).
    """
    keep = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)  # (C,)
    keep[gone] = False
    across = inverse[gone]  # (G, C)
    factor = torch.linalg.cholesky(across[:, gone])  # (G, G)
    update = torch.cholesky_solve(across[:, keep], factor)  # (G, C - G)
    removed = weight[:, gone]  # (O, G)
    cost = 0.5 * (removed.T * torch.cholesky_solve(removed.T, factor)).sum()  # ()
    weight = weight[:, keep] - removed @ update  # (O, C - G)
    inverse = inverse[keep][:, keep].addmm_(across[:, keep].T, update, alpha=-1)  # (C - G, C - G)
    return weight, inverse, cost


def damped_inverse(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """(G + λI)⁻¹ in fp64, λ relative to the mean diagonal: (C, C) -> (C, C)."""
    damped = gram.to(torch.float64, copy=True)  # (C, C)
    scale = damped.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)  # ()
    damped.diagonal().add_(damping * scale)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def obs_path(
    weight: torch.Tensor, gram: torch.Tensor, groups: list[list[int]], damping: float = 0.01, rounds: int | None = None
) -> RemovalPath:
    """Remove units greedily, re-scored after every round, until one step is left.

    Args:
        weight: (O, C) of the consumer. gram: (C, C) mean of x̃ x̃ᵀ over its rows.
        groups: unit indices per group; a step takes one unit of each, C is divided evenly over all units.
        damping: λ relative to the mean diagonal of `gram`.
        rounds: steps go in this many rounds; None: one step each. Within a round the joint cost is shared out in
            proportion to the single costs.
    Returns:
        The path; the last step's cost is infinite, so that nothing prefers an empty block.
    """
    units = sum(len(group) for group in groups)
    width = weight.shape[1] // units
    inverse = damped_inverse(gram, damping)  # (C, C)
    weight, left = weight.double(), list(range(units))
    member = {unit: number for number, group in enumerate(groups) for unit in group}
    total = len(groups[0])
    size = max(1, total // rounds) if rounds else 1
    steps: list[tuple[int, ...]] = []
    costs: list[float] = []
    while len(steps) < total - 1:
        single = group_costs(weight, inverse, width).tolist()
        count = min(size, total - 1 - len(steps))
        queues = [[] for _ in groups]
        for position in sorted(range(len(left)), key=single.__getitem__):
            if len(queues[member[left[position]]]) < count:
                queues[member[left[position]]].append(position)
        chosen = list(zip(*queues, strict=True))  # count steps of positions in `left`
        places = torch.tensor([place for step in chosen for place in step], device=weight.device)  # (count * groups,)
        gone = (places[:, None] * width + torch.arange(width, device=weight.device)).flatten()  # (G,)
        weight, inverse, joint = remove_columns(weight, inverse, gone)
        shares = [sum(single[place] for place in step) for step in chosen]
        costs += [float(joint) * share / max(sum(shares), 1e-300) for share in shares]
        steps += [tuple(left[place] for place in step) for step in chosen]
        dropped = set(places.tolist())
        left = [unit for place, unit in enumerate(left) if place not in dropped]
    last = tuple(sorted(left, key=member.__getitem__))
    return RemovalPath((*steps, last), torch.tensor([*costs, float("inf")], dtype=torch.float64))
