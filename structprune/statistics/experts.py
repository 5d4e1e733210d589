"""What every expert of a mixture adds to the residual stream, over the tokens that it sees."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from structprune.models.adapter import BlockView
from structprune.models.encode import encode_rows
from structprune.models.experts_structprune import role_of, tokens_by_expert
from structprune.models.transfer import send
from structprune.statistics.rows import scan_rows
from structprune.statistics.scan import Scan


@torch.inference_mode()
def expert_shares(scan: Scan, arm: str) -> dict[int, torch.Tensor]:
    """Σ_t (ω g ‖y‖)² of every expert: its output y at each token t that it sees, times the token's share g of it.

    Args:
        arm: whose rows are read, and weighted by ω.
    Returns:
        Block -> (E,) fp64 on CPU, of blocks with experts.
    """
    adapter, rows = scan.adapter, scan_rows(scan, arm)
    mixtures = [block for block in adapter.blocks if block.mixture]
    sums = {block.index: torch.zeros(len(block.expert_parts), dtype=torch.float64, device=adapter.device)
            for block in mixtures}  # fmt: skip
    batch = scan.sequences(rows.copies)
    for start in scan.track(range(0, len(rows.ids), batch), f"experts ({arm})"):
        part = slice(start, start + batch)
        weight = rows.part(part, adapter.device)  # (b, T)

        def add(index: int, expert: int, output: torch.Tensor, weight=weight) -> None:
            power = output.float().pow(2).sum(-1)  # (b * T,), 0 at tokens that it does not see
            sums[index][expert] += (power if weight is None else power * weight.flatten().pow(2)).sum()

        with watch_outputs(mixtures, add):
            encode_rows(adapter.model, send(rows.ids[part], adapter.device))
    scan.workers.add_up(*sums.values())
    return {index: total.cpu() for index, total in sums.items()}


@contextmanager
def watch_outputs(mixtures: list[BlockView], visit: Callable) -> Iterator[None]:
    """While open, `visit(block, expert, output)` sees what each expert adds to every token of a pass, (b * T, C)."""
    # block -> weights (n, k), and tokens and places (m,) of each expert
    routes: dict[int, tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def route(index: int, experts: int):
        def note(module: nn.Module, args: tuple, output: tuple) -> None:
            routes[index] = output[0], tokens_by_expert(output[1], experts)

        return note

    def down(index: int, expert: int):
        def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            weights, seen = routes[index]
            tokens, place = seen[expert]  # (m,) each
            whole = output.new_zeros(len(weights), output.shape[-1], dtype=torch.float32)  # (n, C)
            whole[tokens] = output.float() * weights[tokens, place, None]  # (m, C)
            visit(index, expert, whole)

        return note

    with ExitStack() as stack:
        for block in mixtures:
            hook = block.module.part("router").register_forward_hook(route(block.index, len(block.expert_parts)))
            stack.callback(hook.remove)
            for number, part in enumerate(block.expert_parts):
                linear = block[role_of("down", part)]
                stack.callback(linear.register_forward_hook(down(block.index, number)).remove)
        yield
