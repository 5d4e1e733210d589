"""transformers' Trainer over noisy windows: the teacher's predictions beside every batch, held-out text in between."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler

from structprune.errors import UserError
from structprune.recovery.settings import LossSettings, RecoverConfig, TrainSettings
from structprune.recovery.sharded import ARGUMENTS, shard_on_cpus
from structprune.recovery.student import Lesson, masked_tokens
from structprune.recovery.teacher import Predictions

LOGGED = 100  # lines of a logger, about


def require_training() -> None:
    """Raise UserError where a library that training needs is not installed."""
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError(f"training needs {error.name}: pip install 'structprune[train]'") from error


def steps_of(tokens: int, config: RecoverConfig) -> int:
    """Optimiser steps that the tokens are enough for."""
    return tokens // (config.train.batch * config.data.length)


def passes_of(settings: TrainSettings, processes: int) -> int:
    """Forward passes of each process in a step.

    Raises:
        UserError: a step's windows cannot be dealt out evenly.
    """
    together = settings.pass_windows * processes
    if settings.batch % together:
        raise UserError(
            f"train.batch = {settings.batch} windows cannot be dealt to {processes} processes in passes of"
            f" train.pass_windows = {settings.pass_windows}: make it a multiple of {together}"
        )
    return settings.batch // together


def in_bfloat16(settings: TrainSettings, device: torch.device) -> bool:
    """Whether passes compute in bfloat16."""
    if settings.precision is not None:
        return settings.precision == "bfloat16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def make_trainer(
    model: Any,
    windows: Dataset,
    teaching: tuple[LossSettings, Any],
    held_out: Callable[[], dict[str, float]],
    arguments: Any,
    callbacks: list,
) -> Any:
    """A Trainer of a student whose forward pass is its loss (`student.learning`).

    Args:
        model: the student, or PEFT's wrapper of it.
        windows: `NoisyWindows`; learnt in their order.
        teaching: the loss, and the teacher, `predict(windows, masked, items)` -> Predictions, None where only the
            text is learnt.
        held_out: measures the student on held-out text.
        arguments: TrainingArguments. callbacks: TrainerCallbacks.
    """
    from transformers import PrinterCallback, Trainer

    loss, teacher = teaching

    class RecoveryTrainer(Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:  # the windows have an order of their own
            return SequentialSampler(windows)  # type: ignore[arg-type]

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            items = inputs.pop("index")
            predictions = predicted(teacher, self.accelerator.unwrap_model(model), inputs, items)
            progress = self.state.global_step / max(1, self.state.max_steps)
            outputs = model(**inputs, lesson=Lesson(loss, predictions, progress))
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
            figures = {f"{metric_key_prefix}_{name}": value for name, value in held_out().items()}
            self.log(figures)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
            return figures

    trainer = RecoveryTrainer(model, arguments, train_dataset=windows, eval_dataset=windows, callbacks=callbacks)
    if arguments.fsdp:
        shard_on_cpus(trainer)
    trainer.remove_callback(PrinterCallback)  # it prints every figure; the progress bar has the last ones
    trainer.model_accepts_loss_kwargs = False  # each pass is a mean, which a step's passes divide among them
    return trainer


def predicted(teacher: Any, student: Any, batch: dict[str, torch.Tensor], items: torch.Tensor) -> Predictions | None:
    """What a teacher predicts of a batch, items of `NoisyWindows`; None without a teacher."""
    if teacher is None:
        return None
    windows = batch["input_ids"], batch["noisy_ids"]  # (B, T) each
    return teacher.predict(windows, masked_tokens(student, *windows), items, batch.get("learnt"))


def training_arguments(settings: TrainSettings, folder: Path, steps: int, passes: int, facts: dict[str, Any]) -> Any:
    """TrainingArguments of a recovery.

    Args:
        folder: of checkpoints; a killed run goes on from the last one there.
        steps: optimiser steps. passes: forward passes of a step.
        facts: `seed`, `cpu` (compute there), `bf16`, `sharded` (FSDP).
    """
    from transformers import TrainingArguments

    every = max(1, -(-steps // settings.evaluations))
    values: dict[str, Any] = {
        _checkpointing(TrainingArguments): settings.checkpointing,
        "output_dir": str(folder),
        "max_steps": steps,
        "seed": facts["seed"],
        "use_cpu": facts["cpu"],
        "bf16": facts["bf16"],
        "per_device_train_batch_size": settings.pass_windows,
        "gradient_accumulation_steps": passes,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup * steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.clip,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,  # best and last; of 1 the last is deleted before the output is written
        "load_best_model_at_end": True,
        "metric_for_best_model": "goal",
        "greater_is_better": False,
        "logging_steps": max(1, steps // LOGGED),
        "report_to": list(settings.report_to) or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
    }
    if facts["sharded"]:
        values |= ARGUMENTS
    arguments = TrainingArguments(**values)
    if arguments.n_gpu > 1:  # of one process: several GPUs would make another training of it
        arguments._n_gpu = 1
    return arguments


def _checkpointing(arguments: Any) -> str:
    """The name of the argument that computes activations again, which transformers is about to change."""
    names = {field.name for field in fields(arguments)}
    return next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in names)
