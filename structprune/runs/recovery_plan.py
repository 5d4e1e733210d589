"""What a recovery will learn from what, and what it will take: all that is known before weights are read."""

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset
from typing_extensions import Self

from structprune.bench.block_memory import block_plan
from structprune.bench.recovery_cost import recovery_cost
from structprune.bench.recovery_memory import folder_bytes, recovery_memory
from structprune.checkpoint.output import Room, check_rooms
from structprune.errors import UserError
from structprune.files import bytes_in
from structprune.masking.masks import Masks
from structprune.models.adapter import Adapter
from structprune.models.loading import as_dtype
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device
from structprune.models.tokenizer import load_tokenizer
from structprune.recovery.blocks import row_counts
from structprune.recovery.breadth import breadth_of, narrow_line
from structprune.recovery.cache import cache_bytes
from structprune.recovery.checks import check_device
from structprune.recovery.folder import training_folder
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.sharded import check_apart, check_sharded, is_sharded
from structprune.recovery.text import RecoveryText, read_recovery_text
from structprune.recovery.trainer import steps_of
from structprune.recovery.windows import NoisyWindows, windows_of
from structprune.runs.evaluate import Session
from structprune.runs.ghost import Ghost

INDIFFERENT: Any = {  # settings that another run of the same training may change
    "model": {"device", "allow_pickle"},
    "data": {"source"},
    "teacher": {"offload", "cache"},
    "blocks": {"offload", "budget_gb"},
    "train": {"pass_windows", "checkpointing", "report_to"},
}


class RecoveryPlan:
    """The text, steps and settings of a training.

    Args:
        ghosts: of student and teacher.
        cache: directory of the teacher's predictions; None: it predicts on the way.
    """

    def __init__(self, ghosts: tuple[Ghost, Ghost], config: RecoverConfig, cache: Path | None, session: Session):
        self.config, self._ghosts, self._cache = config, ghosts, cache
        self._session, self._track, self._place = session, session.track, session.workers
        place = self._place
        self.device = pick_device(config.model.device or place.device)
        check_device(config, self.device, launched=place.count > 1)
        self.sharded = is_sharded()
        if self.sharded:
            check_sharded(config.train.method, self._masks is not None, place.count, config.data.held_out)
            check_apart(ghosts[0].model)
        self.steps = steps_of(config.train.tokens, config)
        tokenizer = load_tokenizer(ghosts[0].directory)
        self.text: RecoveryText = read_recovery_text(config.data, tokenizer, config.blocks.tokens + config.train.tokens)
        self._part = (0, 1)

    def part(self, index: int, count: int) -> Self:
        """The training on one of `count` equal parts of the tokens, which follow each other in one order of the text.

        Raises:
            UserError: a part is less than a step.
        """
        other, settings = copy.copy(self), self.config.train
        for name in ("identity", "breadth"):  # of the whole
            other.__dict__.pop(name, None)
        other.steps, other._part = steps_of(settings.tokens, self.config) // count, (index, count)
        if count > 1 and other.steps == 0:  # of one, there may be a first stage alone
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
        student, teacher = (ghost.identity(allow) for ghost in self._ghosts)
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
        """How broad the text is that this part and those before it learn, with a `warning` where it is narrow, as plain
        data."""
        learnt = (self._part[0] + 1) * self.steps * self.config.train.batch
        breadth = breadth_of(self.text, row_counts(self.config)[0] + learnt)
        keys = "blocks.tokens and train.tokens" if self.config.blocks.tokens else "train.tokens"
        return breadth | {"warning": narrow_line(self.source, breadth, keys)}

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
            "blocks": block_plan(student, teacher, self.config, self.dtypes),
            "steps": self.steps,
            "tokens": windows * data.length,
            "breadth": self.breadth,
            "memory": recovery_memory(student, teacher, self.config, self.dtypes),
            "cost": recovery_cost(student, teacher, self.config, self.steps),
            "folder": folder_bytes(student, self.config, self.dtypes[0], self.steps),
            "cache": cache_bytes(cached, data.length, self.config.teacher.top),
        }

    def check_room(self, out: Path) -> None:
        """Check that disks have room for the output, and for what the training keeps meanwhile, together.

        Raises:
            UserError: one has less.
        """
        check_rooms([Room(out, self._ghosts[0].stored_bytes), *self.rooms(out)])

    def rooms(self, out: Path, small: DiffusionLM | None = None) -> list[Room]:
        """Room for the training's folder and for the teacher's predictions, as far as they are not there yet.

        Args:
            out: of the training. small: as in `plan`.
        """
        plan, folder = self.plan(small), training_folder(out)
        remedy = "set train.method = lora" if self.config.train.method == "full" else ""
        rooms = [Room(folder, plan["folder"] - bytes_in(folder), "checkpoints of the training in", remedy)]
        if self._cache is not None:
            rooms.append(Room(self._cache, plan["cache"] - bytes_in(self._cache), "the teacher's predictions in"))
        return rooms

    def _windows(self) -> NoisyWindows:
        """What all parts learn in the second stage, in its order; the first stage learns what comes before."""
        student, train = self._ghosts[0].model, self.config.train
        first = row_counts(self.config)[0]
        numbers = range(first, first + steps_of(train.tokens, self.config) * train.batch)
        return NoisyWindows(
            self.text.windows, self.text.learnt, numbers, student.config.mask_token_id, seed=self.config.data.seed,
            edges_visible=student.edges_visible,
        )  # fmt: skip

    def _learnt_windows(self, steps: int) -> Subset:
        """What so many steps of this part learn; items keep their numbers, by which a cache knows them."""
        batch = self.config.train.batch
        first = self._part[0] * self.steps * batch
        return Subset(self._windows(), range(first, first + steps * batch))

    def _learnt_text(self, steps: int) -> torch.Tensor:
        """Which windows of the text the first stage and so many steps of this part learn, (n,) int64."""
        first, batch = row_counts(self.config)[0], self.config.train.batch
        start = first + self._part[0] * self.steps * batch
        parts = (range(first), range(start, start + steps * batch))
        windows = [windows_of(numbers, len(self.text.windows), self.config.data.seed) for numbers in parts]
        return torch.cat(windows).unique()

    @property
    def _masks(self) -> Masks | None:
        """The masks of a checkpoint whose zeros must stay."""
        path = self._ghosts[0].directory / "masks.safetensors"
        return Masks.load(path).split(self._ghosts[0].model) if path.exists() else None
