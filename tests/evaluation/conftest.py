"""Result stores of one task of eight items, two in a chunk."""

import pytest

from structprune.evaluation.result_files import ResultStore
from structprune.evaluation.results import Window

SETTINGS = {"seed": 0, "tasks": ["notes"], "checkpoints": {"dense": "abc", "pruned": "def"}}
ITEMS = {"dense": {"notes": [str(index) for index in range(8)]}}


def windows(chunk, value=1.0):
    """Chunk n holds items 2n and 2n + 1."""
    return [Window("notes", str(2 * chunk + index), value + index, 3.0, 2, 4, 4) for index in range(2)]


@pytest.fixture
def settings() -> dict:
    """Of a run over two checkpoints."""
    return SETTINGS


@pytest.fixture
def fill():
    """`fill(store, chunks, value=1.0)` adds chunks to a store, whose items have the NELBOs `value` and `value` + 1."""

    def add(store: ResultStore, chunks, value: float = 1.0) -> None:
        for chunk in chunks:
            store.add("dense", "notes", chunk, windows(chunk, value))

    return add


@pytest.fixture
def finish():
    """`finish(store, summarise=...)` -> its results, by default the number of items as their summary."""

    def count(result) -> dict:
        return {"items": len(result["dense"]["notes"])}

    return lambda store, summarise=count: store.finish(ITEMS, summarise)
