"""What a search takes, predicted from shapes alone: operations of its parts, and bytes on disk and in memory.

Leading terms only: products of matrices, factorisations, forward passes. Shapes as in `build`; R rows are tokens here.
"""

from dataclasses import dataclass

from structprune.levels.evolve import FEW, SURVIVORS
from structprune.models.adapter import CONSUMER, Adapter, BlockView
from structprune.structured.depth import most_dropped
from structprune.structured.request import StructuredRequest

HEADS_TRIED = 3  # numbers of heads that are compared for each number of dropped blocks
RATE = 1e14  # operations a second that times are stated for: about what bf16 passes reach on an A100


@dataclass(frozen=True)
class SearchCost:
    """Floating-point operations by part (an addition and a multiplication are two), and bytes."""

    levels: float
    search: float
    refit: float
    disk: int  # of all libraries
    memory: int  # the uncut copy of the model, and the residual stream kept for measurements

    def plain(self) -> dict:
        """As plain data, with seconds at `RATE`."""
        parts = {"levels": self.levels, "search": self.search, "refit": self.refit}
        parts = {name: operations for name, operations in parts.items() if operations}
        seconds = {name: operations / RATE for name, operations in parts.items()}
        return {"operations": parts, "seconds": seconds, "rate": RATE, "disk": self.disk, "memory": self.memory}


def search_cost(adapter: Adapter, request: StructuredRequest, itemsize: int) -> SearchCost:
    """The cost of a search.

    Args:
        adapter: of the dense model; meta tensors suffice.
        itemsize: bytes of a weight in memory.
    """
    if request.config.drops_blocks:
        return _drop_cost(adapter, request)
    search, refit, text = request.config.search, request.reconstruct, request.calibration
    copies = adapter.model.layout.copies  # tokens of a row for each of its window
    rows = (text.windows + text.held_out) * text.noisy_copies * text.length * copies
    others, kinds = 2 * search.levels + search.whole, sum(len(block.kinds) for block in adapter.blocks)
    keep = 1 - request.settings.ratio
    levels = 0.0
    for block in adapter.blocks:
        forward = 2.0 * rows * sum(block[role].weight.numel() for role in block.names)
        collect = sum(_collect(block, kind, rows, refit.producers) for kind in block.kinds)
        dampings = min(3, len(refit.damping))
        solve = sum(_solve(block, kind, keep, dampings) for kind in block.kinds)
        full = sum(_solve(block, kind, 1.0, len(refit.damping)) + _eliminate(block, kind) for kind in block.kinds)
        levels += 2 * forward + collect + others * solve + full
    evolves = search.generations * search.offspring * (FEW + 1 / SURVIVORS) * (search.method != "knapsack")
    tries = kinds * others * (search.method != "evolution") + evolves
    tokens = search.sequences * text.length
    blocks = sum(block[role].weight.numel() for block in adapter.blocks for role in block.names)
    head = adapter.vocabulary * adapter.hidden_size
    # a measurement starts at the block that changed, half-way on average, and predicts half of the tokens
    measured = tries * tokens * (copies * blocks + head)
    consumers = sum(block[CONSUMER[kind]].weight.numel() for block in adapter.blocks for kind in block.kinds)
    readers = (blocks - consumers) * refit.producers
    stream = len(adapter.blocks) * tokens * copies * adapter.hidden_size * itemsize
    return SearchCost(
        levels=search.rounds * levels,
        search=search.rounds * measured,
        refit=2 * _walk(adapter, request, rows, refit.producers),  # of both plans
        disk=round(search.rounds * itemsize * (readers + consumers * keep * (others + 1 - search.whole))),
        memory=itemsize * (blocks + head * refit.head) + min(stream, request.limits.budget),
    )


def _drop_cost(adapter: Adapter, request: StructuredRequest) -> SearchCost:
    """The cost of a search for whole blocks to drop, if it tries all numbers of them.

    With each number of them a block is chosen by a forward pass for each that is left, and about three plans are
    refitted and measured: a number of heads, and both sides of it. A plan takes as much as one that drops no block.
    """
    settings, text, count = request.settings, request.calibration, len(adapter.blocks)
    most = most_dropped(request.sizes, settings)
    copies = adapter.model.layout.copies
    block = copies * sum(adapter.blocks[0][role].weight.numel() for role in adapter.blocks[0].names)
    tokens, head = request.config.search.sequences * text.length, adapter.vocabulary * adapter.hidden_size
    passes = sum((count - gone + 1) * (2 * (count - gone) * block + head) for gone in range(1, most + 1))
    plans = 1 + most * (HEADS_TRIED if settings.split == "measured" else 1)
    measured = plans * (2 * (1 - settings.ratio) * count * block + head)
    sequences = text.noisy_copies * text.length * copies
    rows = (text.windows + text.held_out) * sequences
    few = (min(settings.split_windows, text.windows) + text.held_out) * sequences
    return SearchCost(
        levels=0.0,
        search=tokens * (passes + measured) + plans * _walk(adapter, request, few, producers=False),
        refit=2 * _walk(adapter, request, rows, request.reconstruct.producers),  # of both plans
        disk=0,
        memory=0,  # a dropped block shares its tensors, and a candidate is one more pruned model
    )


def _walk(adapter: Adapter, request: StructuredRequest, rows: int, producers: bool) -> float:
    """Operations of a refit of one plan on R rows."""
    refit, keep, total = request.reconstruct, 1 - request.settings.ratio, 0.0
    for block in adapter.blocks:
        total += 4.0 * rows * sum(block[role].weight.numel() for role in block.names)  # both models run
        total += sum(_collect(block, kind, rows, producers) for kind in block.kinds)
        total += sum(_solve(block, kind, keep, len(refit.damping)) for kind in block.kinds)
    return total


def _collect(block: BlockView, kind: str, rows: int, producers: bool) -> float:
    """Operations of one consumer's products at full width, and of its readers': half a Gram matrix, and a product."""
    outputs, inputs = block[CONSUMER[kind]].weight.shape
    total = rows * (1.0 * inputs * inputs + 2.0 * inputs * outputs)
    return total + producers * 3.0 * rows * outputs * outputs


def _solve(block: BlockView, kind: str, keep: float, dampings: int) -> float:
    """Operations of a ridge at each damping: a factorisation, two triangular solves and the error."""
    outputs, inputs = block[CONSUMER[kind]].weight.shape
    width = keep * inputs
    return dampings * (width**3 / 3 + 4 * width * width * outputs)


def _eliminate(block: BlockView, kind: str) -> float:
    """Operations of ordering the units: an inverse, and its updates and the weight's until nothing is left."""
    outputs, inputs = block[CONSUMER[kind]].weight.shape
    return 1.0 * inputs**3 + 2 / 3 * inputs**3 + 1.0 * inputs * inputs * outputs
