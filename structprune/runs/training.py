"""One training of a pruned model against the dense one: all of `structprune recover` between its checks and the end."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback

from structprune.checkpoint.learnt_text import LEARNT, write_learnt
from structprune.checkpoint.masked import save_masked
from structprune.checkpoint.recovered import recovered_files
from structprune.errors import UserError
from structprune.evaluation.overlap import marks
from structprune.masking.finetune import keep_zeros, mask_adapters, merge_adapters
from structprune.models.int8 import to_int8
from structprune.models.loading import load_model, source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import streamed
from structprune.models.quiet import quiet_transformers
from structprune.recovery.cache import CachedTeacher, write_cache
from structprune.recovery.folder import adopt, last_checkpoint
from structprune.recovery.held_out import Figures, HeldOutStudy, paired
from structprune.recovery.lora import add_adapters, merge
from structprune.recovery.sharded import whole_state
from structprune.recovery.student import learning, round_to
from structprune.recovery.teacher import LiveTeacher
from structprune.recovery.trainer import make_trainer, passes_of, training_arguments
from structprune.recovery.watch import Watch
from structprune.runs.recovery_plan import RecoveryPlan

REMEDY = "lower train.pass_windows or data.length, or set train.checkpointing, teacher.int8 or teacher.offload = true"


class Recovery(RecoveryPlan):
    """One training: both models, and what was measured. Arguments as `RecoveryPlan`."""

    def run(self, folder: Path) -> dict:
        """Train, going on from what the folder holds; returns the report of it."""
        start = time.perf_counter()
        self.student = self._load(0, self.device)
        try:
            study, before = self._measure_and_train(folder)
        except torch.OutOfMemoryError as error:
            raise UserError(f"the training does not fit the memory of {self.device}: {REMEDY}") from error
        round_to(self.student, self._ghosts[0].stored)  # so that what is measured is what is written
        after = study.measure(self.student)
        goal = self.config.loss.goal
        self.kept = "trained" if goal(after.means()) < goal(before.means()) else "input"
        return self._report((study, before, after), time.perf_counter() - start)

    def _load(self, index: int, device: torch.device) -> DiffusionLM:
        """The student (0) or the teacher (1)."""
        settings = self.config.model
        directory, dtype = self._ghosts[index].directory, self.dtypes[index]
        if index == 1 and self.config.teacher.int8:  # whole in host memory only, in no wider a dtype than it is stored
            model = load_model(directory, "auto", "cpu", settings.mask_id, settings.allow_pickle)
            return to_int8(model, dtype).to(device)  # type: ignore[arg-type]
        return load_model(directory, dtype, device, settings.mask_id, settings.allow_pickle)

    def _measure_and_train(self, folder: Path) -> tuple[HeldOutStudy, Figures]:
        """The held-out text, and the student's figures on it before it was trained."""
        config, offload = self.config, self.config.teacher.offload
        dense = self._load(1, torch.device("cpu") if offload else self.device)
        with streamed(dense, self.device if offload else None):
            study = HeldOutStudy(dense, self.text, config.data.noise, config.data.seed, self._place)
            before = study.measure(self.student)
            teacher = self._teacher(dense)
            if isinstance(teacher, LiveTeacher):
                self._train(folder, teacher, study)
        if not isinstance(teacher, LiveTeacher):
            del dense  # what it predicts is on disk, or not asked for
            self._train(folder, teacher, study)
        return study, before

    def _teacher(self, dense: DiffusionLM) -> LiveTeacher | CachedTeacher | None:
        """What predicts beside the student; a cache is completed first."""
        if self.config.loss.kl == 0:
            return None
        if self._cache is None:
            return LiveTeacher(dense)
        identity = {key: self.identity[key] for key in ("teacher", "text")}
        identity |= {"seed": self.config.data.seed, "top": self.config.teacher.top, "dtype": str(dense.dtype)}
        identity |= {"int8": True} if self.config.teacher.int8 else {}
        cache, top = self._cache, self.config.teacher.top
        self._place.first(lambda: write_cache(cache, identity, dense, self._windows(), top, self._track))
        return CachedTeacher(cache, self.device)

    def _train(self, folder: Path, teacher: LiveTeacher | CachedTeacher | None, study: HeldOutStudy) -> None:
        """Train the student in place; at the end it has its best weights, merged."""
        config, settings, seed = self.config, self.config.train, self.config.data.seed
        student = self.student
        torch.manual_seed(seed)
        lora = settings.method == "lora"
        student.requires_grad_(not lora)
        model = add_adapters(student, settings, seed) if lora else student
        facts = {"seed": seed % 2**32, "cpu": self.device.type == "cpu", "bf16": self._bf16(), "sharded": self.sharded}
        arguments = training_arguments(settings, folder, self.steps, passes_of(settings, self._place.count), facts)
        watch = Watch(self.steps, config, self._track)
        callbacks = [watch] if settings.patience is None else [watch, EarlyStoppingCallback(settings.patience)]
        with quiet_transformers(), self._masked(model, lora), learning(student):
            trainer = make_trainer(
                model,
                self._learnt_windows(),
                (config.loss, teacher),
                lambda: watch.note(study.measure(student)),
                arguments,
                callbacks,
            )
            start, checkpoint = time.perf_counter(), last_checkpoint(folder) if self._place.main else None
            if checkpoint is not None:
                adopt(checkpoint, settings.pass_windows)
            checkpoint = self._place.gather(checkpoint)[0]  # the first process removes what a kill left unfinished
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self.learnt = {
                "seconds": time.perf_counter() - start, "steps": trainer.state.global_step, "resumed_at": watch.first,
            }  # fmt: skip
            self.history = watch.history(trainer.state.log_history)
        if lora:
            self._merge(model)
        if self.sharded:
            whole = whole_state(student)
            student = self.student = self._load(0, self.device)
            student.load_state_dict(whole, assign=True)
        student.requires_grad_(False)
        student.eval()

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
            "tokens": self.learnt["steps"] * self.config.train.batch * self.config.data.length,
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
        changed = list(dict(self.student.named_parameters())) if self.kept == "trained" else []
        files = recovered_files(source, report)
        if self.kept == "trained":
            files[LEARNT] = partial(write_learnt, runs=marks(self.text.windows, self.text.learnt), source=source)
        return save_masked(self.student, directory, changed=changed, files=files, overwrite=overwrite)
