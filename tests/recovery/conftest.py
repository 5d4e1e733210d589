"""A dense tiny checkpoint, and one that lost channels of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from structprune.checkpoint.save import save_pruned
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.recovery.settings import RecoverConfig
from structprune.structured.plan import identity_plan
from structprune.structured.surgery import apply_plan


@pytest.fixture
def pair(tiny_checkpoint, tmp_path):
    """`pair(family)` -> directories of a dense model, and of one that lost half of its channels."""

    def make(family: str = "llada") -> tuple[Path, Path]:
        dense = tiny_checkpoint(family)
        model = load_model(dense, device="cpu")
        plan = identity_plan(Adapter(model))
        half = replace(plan, blocks=tuple(replace(each, channels=each.channels[::2]) for each in plan.blocks))
        return dense, save_pruned(apply_plan(model, half), tmp_path / f"{family}-small")

    return make


@pytest.fixture
def recover_config(text_path):
    """`recover_config(**changes)` -> a training of a moment; `train__method="lora"` changes train.method."""

    def make(**changes) -> RecoverConfig:
        values = {
            "model.device": "cpu", "data.source": str(text_path), "data.length": 16, "data.held_out": 6,
            "data.noise": 2, "train.method": "full", "train.tokens": 16 * 8 * 12, "train.batch": 8,
            "train.pass_windows": 4, "train.learning_rate": 2e-3, "train.evaluations": 3,
        }  # fmt: skip
        return RecoverConfig.load(overrides=values | {key.replace("__", "."): each for key, each in changes.items()})

    return make
