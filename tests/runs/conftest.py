"""Calibration sets, checkpoints and rows of the tests of whole runs."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_calibration(tmp_path_factory):
    """`tiny_calibration(model, **settings)` -> 4 windows of 32 tokens and 2 held-out ones, at 2 noise levels."""
    from structprune.assets import text_file
    from structprune.calibration.build import load_calibration
    from structprune.config import CalibrationSettings
    from structprune.models.adapter import Adapter
    from structprune.models.tokenizer import load_tokenizer

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_file("calibration.txt").read_text(encoding="utf-8")[:60_000], encoding="utf-8")

    def make(model, **changes):
        keys = {"source": str(path), "windows": 4, "held_out": 2, "length": 32, "interval": 25} | changes
        adapter, tokenizer = Adapter(model), load_tokenizer(model.source.directory)
        return load_calibration(
            CalibrationSettings(**keys), tokenizer, mask_id=adapter.mask_id, schedule=adapter.family.schedule,
            edges_visible=model.edges_visible, vocabulary=adapter.vocabulary,
        )  # fmt: skip

    return make


@pytest.fixture
def eval_checkpoint(tiny_checkpoint):
    """`eval_checkpoint(family, seed=0, name=None)` -> a tiny checkpoint of 128 positions, its tokenizer with a BOS."""

    def make(family: str = "llada", seed: int = 0, name: str | None = None) -> Path:
        positions = "max_position_embeddings" if family == "dream" else "max_sequence_length"
        made = tiny_checkpoint(family, seed, name=name, **{positions: 128})
        path = made / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}))
        return made

    return make


@pytest.fixture
def plain_rows():
    """`plain_rows(results)` -> checkpoint -> task -> key -> numbers, without the keys of other rows."""

    def make(results) -> dict:
        return {
            label: {task: {row.key: tuple(sorted(row.parts.items())) for row in rows} for task, rows in tasks.items()}
            for label, tasks in results.rows.items()
        }

    return make
