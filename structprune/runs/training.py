"""One training of a pruned model against the dense one: all of `structprune recover` between its checks and the end."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from transformers import EarlyStoppingCallback

from structprune.bench.recovery_memory import recovery_memory
from structprune.checkpoint.learnt_text import LEARNT, write_learnt
from structprune.checkpoint.masked import save_masked
from structprune.checkpoint.recovered import recovered_files
from structprune.errors import UserError
from structprune.evaluation.overlap import marks
from structprune.masking.finetune import keep_zeros, mask_adapters, merge_adapters
from structprune.masking.masks import Masks
from structprune.models.adapter import Adapter
from structprune.models.fingerprint import fingerprint
from structprune.models.int8 import to_int8
from structprune.models.loading import as_dtype, load_model, source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device, streamed
from structprune.models.quiet import quiet_transformers
from structprune.models.tokenizer import load_tokenizer
from structprune.recovery.breadth import breadth_of, narrow_line
from structprune.recovery.cache import CachedTeacher, cache_bytes, write_cache
from structprune.recovery.checks import check_device
from structprune.recovery.folder import adopt, last_checkpoint
from structprune.recovery.held_out import Figures, HeldOutStudy
from structprune.recovery.lora import add_adapters, merge
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.sharded import check_sharded, is_sharded, whole_state
from structprune.recovery.student import learning
from structprune.recovery.teacher import LiveTeacher
from structprune.recovery.text import RecoveryText, read_recovery_text
from structprune.recovery.trainer import make_trainer, passes_of, steps_of, training_arguments
from structprune.recovery.watch import Watch
from structprune.recovery.windows import NoisyWindows
from structprune.runs.evaluate import Session
from structprune.runs.ghost import Ghost

INDIFFERENT: Any = {  # settings that another run of the same training may change
    "model": {"device", "allow_pickle"},
    "data": {"source"},
    "teacher": {"offload", "cache"},
    "train": {"pass_windows", "checkpointing", "report_to"},
}
REMEDY = "lower train.pass_windows or data.length, or set train.checkpointing, teacher.int8 or teacher.offload = true"


class Recovery:
    """One training: both models, the text, and what was measured.

    Args:
        ghosts: of student and teacher.
        cache: directory of the teacher's predictions; None: it predicts on the way.
    """

    def __init__(self, ghosts: tuple[Ghost, Ghost], config: RecoverConfig, cache: Path | None, session: Session):
        self.config, self._ghosts, self._cache = config, ghosts, cache
        self._track, self._place = session.track, session.workers
        place = self._place
        self.device = pick_device(config.model.device or place.device)
        check_device(config, self.device, launched=place.count > 1)
        self.sharded = is_sharded()
        if self.sharded:
            check_sharded(config.train.method, self._masks is not None, place.count)
        settings = config.train
        self.steps = steps_of(settings, config.data.length)
        tokenizer = load_tokenizer(ghosts[0].directory)
        self.text: RecoveryText = read_recovery_text(config.data, tokenizer, settings.tokens)
        self._part = (0, 1)

    def part(self, index: int, count: int) -> "Recovery":
        """The training on one of `count` equal parts of the tokens, which follow each other in one order of the text.

        Raises:
            UserError: a part is less than a step.
        """
        other, settings = copy.copy(self), self.config.train
        other.__dict__.pop("identity", None)
        other.steps, other._part = steps_of(settings, self.config.data.length) // count, (index, count)
        if other.steps == 0:
            step = settings.batch * self.config.data.length
            raise UserError(
                f"train.tokens = {settings.tokens} are shared by {count} trainings, of which each needs a step of"
                f" train.batch x data.length = {step} tokens: raise it to {count * step}, or lower those"
            )
        return other

    @cached_property
    def identity(self) -> dict:
        """What decides the training, as plain data without paths; what only decides memory or speed may change."""
        allow = self.config.model.allow_pickle
        student, teacher = (fingerprint(ghost.directory, allow) for ghost in self._ghosts)
        config = self.config.model_dump(mode="json", exclude=INDIFFERENT)
        text = {"text": self.text.digest, "cached": self._cache is not None}  # a cache has the likeliest tokens only
        text |= {"part": self._part} if self._part[1] > 1 else {}
        sharded = {"sharded": True} if self.sharded else {}  # whose checkpoints have files of their own
        return {"student": student, "teacher": teacher, **text, **sharded, "config": config}

    @property
    def source(self) -> str:
        """The name of the text, without a path."""
        source = self.config.data.source
        return Path(source).name if Path(source).suffix else source

    @cached_property
    def breadth(self) -> dict:
        """How broad the text is, with a `warning` where it is narrow, as plain data."""
        breadth = breadth_of(self.text, self.steps * self.config.train.batch)
        return breadth | {"warning": narrow_line(self.source, breadth)}

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of both models' weights in memory; weights that are trained themselves are fp32 where nothing is said."""
        ghosts, cpu = self._ghosts, self.device.type == "cpu"
        own, theirs = (torch.float32 if cpu else ghost.stored for ghost in ghosts)
        if self.config.train.method == "full":
            own = torch.float32
        return as_dtype(self.config.model.dtype) or own, as_dtype(self.config.teacher.dtype) or theirs

    def plan(self, small: DiffusionLM | None = None) -> dict:
        """What the training will take, from shapes alone, as plain data.

        Args:
            small: a meta model of the student's shapes; None: the student's own.
        """
        student, teacher = (ghost.adapter for ghost in self._ghosts)
        student = student if small is None else Adapter(small)
        data, train = self.config.data, self.config.train
        windows = self.steps * train.batch
        cached = len(self._windows()) if self._cache else 0
        return {
            "steps": self.steps,
            "tokens": windows * data.length,
            "breadth": self.breadth,
            "memory": recovery_memory(student, teacher, self.config, self.dtypes),
            "cache": cache_bytes(cached, data.length, self.config.teacher.top),
        }

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

    def _windows(self) -> NoisyWindows:
        """What all parts learn, in its order."""
        student, train = self._ghosts[0].model, self.config.train
        count = steps_of(train, self.config.data.length) * train.batch
        return NoisyWindows(
            self.text.windows, self.text.learnt, count, student.config.mask_token_id, seed=self.config.data.seed,
            edges_visible=student.edges_visible,
        )  # fmt: skip

    def _learnt_windows(self) -> Subset:
        """What this part learns; items keep their numbers, by which a cache knows them."""
        count = self.steps * self.config.train.batch
        return Subset(self._windows(), range(self._part[0] * count, (self._part[0] + 1) * count))

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

    def _bf16(self) -> bool:
        """Whether passes compute in bfloat16."""
        precision = self.config.train.precision
        if precision is not None:
            return precision == "bfloat16"
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported()

    @property
    def _masks(self) -> Masks | None:
        """The masks of a checkpoint whose zeros must stay."""
        path = self._ghosts[0].directory / "masks.safetensors"
        return Masks.load(path) if path.exists() else None

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


@torch.no_grad()
def round_to(model: DiffusionLM, dtype: torch.dtype) -> None:
    """Give all weights values that `dtype` holds, in place; their own dtype stays."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def paired(before: Figures, after: Figures) -> dict[str, dict[str, float]]:
    """Mean and standard error over windows of what changed, negative where it got better."""
    result = {}
    for name in ("kl", "nelbo"):
        change = getattr(after, name) - getattr(before, name)  # (n,)
        result[name] = {
            "mean": change.mean().item(),
            "standard_error": (change.std() / math.sqrt(len(change))).item(),
        }
    return result
