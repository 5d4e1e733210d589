"""Predicted costs of a search, term by term on a tiny model."""

from dataclasses import replace

import pytest

from structprune.config import Config
from structprune.levels.cost import RATE, search_cost
from structprune.models.adapter import Adapter
from structprune.runs.resolve import resolve_structured

BASE = {
    "search.enabled": True, "search.method": "knapsack", "search.rounds": 1, "search.levels": 1, "search.whole": False,
    "search.sequences": 4, "calibration.windows": 5, "calibration.held_out": 3, "calibration.length": 10,
    "calibration.copies": 1, "structured.ratio": 0.5, "reconstruct.damping": [0.1], "model.device": "cpu",
    "reconstruct.producers": False,
}  # fmt: skip
HIDDEN, WIDTH, BLOCKS = 32, 48, 3
LINEARS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDTH  # of a block


def cost(tiny_model, **changes):
    model = tiny_model()
    request = resolve_structured(Config.load(overrides=BASE | changes), model)
    return search_cost(Adapter(model), request, 4), request


def test_the_parts_of_a_search(tiny_model):
    result, _ = cost(tiny_model)
    rows, forward = 80, 2 * 80 * LINEARS
    collect = sum(rows * (size**2 + 2 * size * HIDDEN) for size in (HIDDEN, WIDTH))
    sizes = {keep: [keep * HIDDEN, keep * WIDTH] for keep in (0.5, 1)}
    solves = {keep: sum(size**3 / 3 + 4 * size**2 * HIDDEN for size in sizes[keep]) for keep in sizes}
    order = sum(5 / 3 * size**3 + size**2 * HIDDEN for size in (HIDDEN, WIDTH))
    assert result.levels == pytest.approx(BLOCKS * (2 * forward + collect + 2 * solves[0.5] + solves[1] + order))
    assert result.refit == pytest.approx(2 * BLOCKS * (2 * forward + collect + solves[0.5]))
    assert result.search == pytest.approx(6 * 2 * 40 * (BLOCKS * LINEARS + 2048 * HIDDEN))
    # the plan's level and one on each side, half as wide; the uncut blocks, and the stream of 40 tokens
    assert result.disk == 4 * BLOCKS * 3 * HIDDEN * (HIDDEN + WIDTH) / 2
    assert result.memory == 4 * (BLOCKS * LINEARS + BLOCKS * 40 * HIDDEN)
    assert result.plain()["seconds"]["search"] == result.search / RATE


def test_what_makes_a_search_longer(tiny_model):
    base, request = cost(tiny_model)
    whole, _ = cost(tiny_model, **{"search.whole": True})
    assert whole.search == pytest.approx(1.5 * base.search) and whole.disk == base.disk  # nothing of it is stored
    evolving, _ = cost(tiny_model, **{"search.method": "evolution", "search.generations": 3, "search.offspring": 8})
    assert evolving.search == pytest.approx(base.search / 12 * 3 * 8 * 0.5)
    two, _ = cost(tiny_model, **{"search.rounds": 2})
    assert (two.levels, two.search, two.disk) == (2 * base.levels, 2 * base.search, 2 * base.disk)
    assert two.refit == base.refit
    full, _ = cost(tiny_model, **{"reconstruct.producers": True, "reconstruct.head": True})
    assert full.disk - base.disk == 4 * BLOCKS * (3 * HIDDEN * HIDDEN + 2 * HIDDEN * WIDTH)
    assert full.memory - base.memory == 4 * 2048 * HIDDEN and full.levels > base.levels
    limited = replace(request, resources=replace(request.resources, budget=100))
    assert search_cost(Adapter(tiny_model()), limited, 4).memory == 4 * BLOCKS * LINEARS + 100
