"""A dense tiny checkpoint, and one that lost channels of it."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from structprune.checkpoint.save import save_pruned
from structprune.config import Config
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.recovery.settings import RecoverConfig
from structprune.runs import training
from structprune.runs.schedule import Schedule
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
def whole_checkpoint():
    """`whole_checkpoint(folder, *missing)`: a checkpoint of step 4, with the files that a training goes on from but for
    some."""

    def make(folder: Path, *missing: str) -> None:
        place = folder / "checkpoint-4"
        place.mkdir(parents=True, exist_ok=True)
        save_file({"weight": torch.ones(1)}, place / "model.safetensors")
        (place / "trainer_state.json").write_text('{"global_step": 4}')
        for name in {"optimizer.pt", "scheduler.pt", "rng_state.pth"} - {*missing}:
            (place / name).write_bytes(b"x")

    return make


class Killed(BaseException):
    """What stands for a kill."""


@pytest.fixture
def dying_at(monkeypatch):
    """`dying_at(step)` -> a context in which a training is killed after that step."""

    @contextmanager
    def die(step: int):
        class Mortal(training.Watch):
            def on_step_end(self, args, state, control, **kwargs):
                super().on_step_end(args, state, control, **kwargs)
                if state.global_step == step:
                    raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(training, "Watch", Mortal)
            yield

    return die


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


@pytest.fixture
def schedule(text_path, recover_config):
    """`schedule(*ratios, steps=4, gradual=False, **keys of the pruning)` -> a run of a moment."""

    def make(*ratios, steps=4, gradual=False, recovery=None, plan=None, levels=None, **keys) -> Schedule:
        values = {
            "calibration.source": str(text_path), "calibration.windows": 3, "calibration.held_out": 2,
            "calibration.length": 16, "calibration.interval": 25, "model.device": "cpu",
            "reconstruct.enabled": False,  # so that there is something to learn in a moment
        }  # fmt: skip
        values |= {} if "method" in keys else {"structured.split": "equal"}
        values |= {key.replace("__", "."): each for key, each in keys.items()}
        changes = {"train__tokens": 16 * 8 * steps, "train__learning_rate": 3e-3, "train__evaluations": 2} | (
            recovery or {}
        )
        return Schedule(Config.load(overrides=values), recover_config(**changes), ratios, gradual, plan, levels)

    return make
