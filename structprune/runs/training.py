"""One training of a pruned model against the dense one: all of `structprune recover` between its checks and the end."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structprune.checkpoint.learnt_text import LEARNT, write_learnt
from structprune.checkpoint.masked import save_masked
from structprune.checkpoint.recovered import recovered_files
from structprune.errors import UserError, lacks_memory
from structprune.evaluation.overlap import marks
from structprune.masking.finetune import keep_zeros, mask_adapters, merge_adapters
from structprune.models.adapter import Adapter
from structprune.models.denormals import flushed_denormals
from structprune.models.int8 import to_int8
from structprune.models.loading import load_model, source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device, streamed
from structprune.models.quiet import quiet_transformers
from structprune.progress import Track, watched
from structprune.recovery.blocks import (
    BlockStage,
    block_rows,
    block_tokens,
    finished_blocks,
    load_blocks,
    remaining_blocks,
    row_counts,
    stream_ends,
)
from structprune.recovery.cache import CachedTeacher, write_cache
from structprune.recovery.folder import adopt, last_checkpoint, state_of
from structprune.recovery.held_out import Figures, HeldOutStudy, paired
from structprune.recovery.lora import add_adapters, merge
from structprune.recovery.sharded import whole_state
from structprune.recovery.student import learn_all, learning, round_to
from structprune.recovery.teacher import LiveTeacher
from structprune.recovery.trainer import in_bfloat16, make_trainer, passes_of, training_arguments
from structprune.recovery.watch import Halt, Patience, Watch, ending
from structprune.runs.recovery_plan import RecoveryPlan

REMEDY = "lower train.pass_windows or data.length, or set train.checkpointing, teacher.int8 or teacher.offload = true"
BLOCK_REMEDY = "lower train.pass_windows or data.length, or set teacher.int8 or blocks.offload = true"


class Recovery(RecoveryPlan):
    """One training: both models, and what was measured. Arguments as `RecoveryPlan`."""

    def run(self, folder: Path) -> dict:
        """Train, going on from what the folder holds; returns the report of it.

        Raises:
            UserError: the device's memory is not enough.
        """
        try:
            with flushed_denormals():
                return self._run(folder)
        except (RuntimeError, MemoryError) as error:
            if not lacks_memory(error):
                raise
            raise UserError(f"the training does not fit the memory of {self.device}: {REMEDY}") from error

    def _run(self, folder: Path) -> dict:
        start = time.perf_counter()
        self.blocks: dict | None = None  # of the first stage
        self.learnt = {"seconds": 0.0, "steps": 0, "resumed_at": 0, "tokens": 0}
        self.history: list[dict] = []
        self.student = self._load(0, self.config.blocks.offload)
        study, before = self._measure_and_train(folder)
        after, goal, self.kept = self._rounded(study), self.config.loss.goal, "trained"
        if self.blocks and self.steps and goal(self.blocks["held_out"]) <= goal(after.means()):
            del self.student  # the first stage left better weights
            self.student = self._load(0, self.config.blocks.offload)
            load_blocks(folder, Adapter(self.student))
            after, self.kept = self._rounded(study), "blocks"
        if not goal(after.means()) < goal(before.means()):
            self.kept = "input"
        return self._report((study, before, after), time.perf_counter() - start)

    def _load(self, index: int, offload: bool) -> DiffusionLM:
        """The student (0) or the teacher (1)."""
        settings, device = self.config.model, torch.device("cpu") if offload else self.device
        source, dtype = self._ghosts[index].source, self.dtypes[index]
        if index == 1 and self.config.teacher.int8:  # whole in host memory only, in no wider a dtype than it is stored
            model = load_model(source, "auto", "cpu", **settings.reading)
            return to_int8(model, dtype).to(device)  # type: ignore[arg-type]
        return load_model(source, dtype, device, **settings.reading)

    def _measure_and_train(self, folder: Path) -> tuple[HeldOutStudy, Figures]:
        """The held-out text, and the student's figures on it before it was trained."""
        config, offload = self.config, self.config.teacher.offload
        self._pause()
        dense = self._load(1, offload or config.blocks.offload)
        self._pause()
        with self._computing(dense):
            study = HeldOutStudy(dense, self.text, config.data.noise, config.data.seed, self._place)
        self._pause()
        before = self._measure(study)
        self._pause()
        if block_tokens(config):
            self._train_blocks(folder, dense, study)
        if not self.steps:
            return study, before
        for model in [self.student] if offload else [self.student, dense]:
            nn.Module.to(model, self.device)
        with self._computing(dense):
            teacher = self._teacher(dense)
            if isinstance(teacher, LiveTeacher):
                self._train(folder, teacher, study)
        if not isinstance(teacher, LiveTeacher):
            del dense  # what it predicts is on disk, or not asked for
            self._train(folder, teacher, study)
        return study, before

    def _pause(self) -> None:
        """End the run, between its phases, where a signal came to any process."""
        if (reason := ending(self._session.watch, self._place)) is not None:
            raise reason

    def _computing(self, model: DiffusionLM) -> AbstractContextManager:
        """While open, a model computes on the run's device, also from host memory."""
        return streamed(model, None if compute_device(model).type == self.device.type else self.device)

    def _rounded(self, study: HeldOutStudy) -> Figures:
        """Round the student to the dtype it is written in, and measure that."""
        round_to(self.student, self._ghosts[0].stored)
        return self._measure(study)

    def _measure(self, study: HeldOutStudy) -> Figures:
        """The student's figures on the held-out text."""
        with self._computing(self.student):
            return study.measure(self.student)

    def _train_blocks(self, folder: Path, dense: DiffusionLM, study: HeldOutStudy) -> None:
        """Train the student block by block, going on from what the folder holds; one process does it for all."""
        start, (student, teacher) = time.perf_counter(), (ghost.adapter for ghost in self._ghosts)
        earlier = self._place.from_first(lambda: finished_blocks(folder))

        def complete() -> None:
            remaining = remaining_blocks(self._ghosts[0].directory, student, teacher)
            rows = block_rows(self.text, self.student, self.config)
            stage = BlockStage((self.student, dense), remaining, rows, self.config, self.device)
            try:
                stage.complete(folder, self._masks, self._between)
            except (RuntimeError, MemoryError) as error:
                if not lacks_memory(error):
                    raise
                raise UserError(f"a block does not fit the memory of {self.device}: {BLOCK_REMEDY}") from error

        self._place.first(complete)
        layers = load_blocks(folder, Adapter(self.student))
        self.blocks = {
            "tokens": block_tokens(self.config), "seconds": time.perf_counter() - start, "resumed_at": earlier,
            "held_out": self._measure(study).means(), "layers": layers,
        }  # fmt: skip

    @property
    def _between(self) -> Track:
        """Progress over items that are kept one by one; behind any of them a signal may end the run."""
        return watched(self._track, self._session.watch)

    def _teacher(self, dense: DiffusionLM) -> LiveTeacher | CachedTeacher | None:
        """What predicts beside the student; a cache is completed first."""
        if self.config.loss.kl == 0:
            return None
        if self._cache is None:
            return LiveTeacher(dense, self._stream_ends(), bool(self.config.loss.causal))
        identity = {key: self.identity[key] for key in ("teacher", "text")}
        identity |= {"seed": self.config.data.seed, "top": self.config.teacher.top, "dtype": str(dense.dtype)}
        identity |= {"int8": True} if self.config.teacher.int8 else {}
        identity |= {"first": first} if (first := row_counts(self.config)[0]) else {}  # number of the first window
        cache, top = self._cache, self.config.teacher.top
        self._place.first(lambda: write_cache(cache, identity, dense, self._windows(), top, self._between))
        return CachedTeacher(cache, self.device)

    def _stream_ends(self) -> list[int]:
        """The dense blocks whose streams are learnt in the second stage."""
        if self.config.loss.streams == 0:
            return []
        student, teacher = (ghost.adapter for ghost in self._ghosts)
        return stream_ends(remaining_blocks(self._ghosts[0].directory, student, teacher), len(teacher.blocks))

    def _train(self, folder: Path, teacher: LiveTeacher | CachedTeacher | None, study: HeldOutStudy) -> None:
        """Train the student in place; at the end it has its best weights, merged."""
        config, settings, seed = self.config, self.config.train, self.config.data.seed
        student = self.student
        torch.manual_seed(seed)
        lora = settings.method == "lora"
        if lora:
            student.requires_grad_(False)
        else:
            learn_all(student)
        model = add_adapters(student, settings, seed) if lora else student
        facts = {"seed": seed % 2**32, "cpu": self.device.type == "cpu", "bf16": in_bfloat16(settings, self.device)}
        facts["sharded"] = self.sharded
        arguments = training_arguments(settings, folder, self.steps, passes_of(settings, self._place.count), facts)
        checkpoint, arguments.max_steps = self._going_on(folder)
        watch, halt = Watch(self.steps, config, self._track), Halt(self._session.watch, self._place)
        callbacks = [watch, halt] if settings.patience is None else [watch, halt, Patience(settings.patience)]
        with quiet_transformers(), self._masked(model, lora), learning(student):
            trainer = make_trainer(
                model,
                self._learnt_windows(arguments.max_steps),
                (config.loss, teacher),
                lambda: watch.note(study.measure(student)),
                arguments,
                callbacks,
            )
            start = time.perf_counter()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            halt.end()
            steps = trainer.state.global_step
            self.learnt = {
                "seconds": time.perf_counter() - start, "steps": steps, "resumed_at": watch.first,
                "tokens": steps * settings.batch * config.data.length,
            }  # fmt: skip
            self.history = watch.history(trainer.state.log_history)
        if lora:
            self._merge(model)
        if self.sharded:
            whole = whole_state(student)
            student = self.student = self._load(0, False)
            student.load_state_dict(whole, assign=True)
        student.requires_grad_(False)
        student.eval()

    def _going_on(self, folder: Path) -> tuple[Path | None, int]:
        """The checkpoint that all processes go on from, and the step that the training ends with, which is that
        checkpoint's own where patience had ended."""
        settings, checkpoint, end = self.config.train, None, self.steps
        if self._place.main:  # it removes what a kill left unfinished
            checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            adopt(checkpoint, settings.pass_windows)
            state = state_of(checkpoint)
            if settings.patience is not None and Patience(settings.patience).ended(state["log_history"]):
                end = state["global_step"]
        return self._place.gather((checkpoint, end))[0]

    @contextmanager
    def _masked(self, model: Any, lora: bool) -> Iterator[None]:
        """While open, removed weights stay zero."""
        with ExitStack() as stack:
            if (masks := self._masks) is not None:
                stack.enter_context(mask_adapters(model, masks) if lora else keep_zeros(model, masks))
            yield

    def _merge(self, model: Any) -> None:
        if (masks := self._masks) is not None:
            with quiet_transformers():
                merge_adapters(model, masks)
        else:
            merge(model, self.student)

    def _report(self, measured: tuple[HeldOutStudy, Figures, Figures], seconds: float) -> dict:
        study, before, after = measured
        student, teacher = self._ghosts
        return {
            "student": student.name,
            "teacher": teacher.name,
            "text": self.source,
            "windows": len(self.text.windows),
            "breadth": self.breadth,
            "tokens": block_tokens(self.config) + self.learnt["tokens"],
            "blocks": self.blocks,
            "learnt": self.learnt,
            "held_out_windows": len(self.text.held_out),
            "config": self.config.model_dump(mode="json", exclude={"data": {"source"}, "teacher": {"cache"}}),
            "teacher_figures": study.teacher.means(),
            "before": before.means(),
            "after": after.means(),
            "change": paired(before, after),
            "kept": self.kept,
            "history": self.history,
            "seconds": seconds,
        }

    def save(self, directory: Path, report: dict, overwrite: bool) -> Path:
        """Write the student in the layout of its input, with the report of this and of earlier runs."""
        source = source_of(self.student).directory
        changed = list(dict(self.student.named_parameters())) if self.kept != "input" else []
        files = recovered_files(source, report)
        if self.kept != "input":
            windows = self._learnt_text(0 if self.kept == "blocks" else int(self.learnt["steps"]))  # (n,)
            learnt = None if self.text.learnt is None else self.text.learnt[windows]  # (n, T)
            files[LEARNT] = partial(write_learnt, runs=marks(self.text.windows[windows], learnt), source=source)
        return save_masked(self.student, directory, changed=changed, files=files, overwrite=overwrite)
