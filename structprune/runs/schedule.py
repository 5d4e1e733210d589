"""Which ratios a dense model is pruned at and trained back, and what of it cannot be met."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from structprune.config import Config
from structprune.errors import UserError
from structprune.recovery.settings import RecoverConfig
from structprune.structured.plan import Plan

READING = ("device", "mask_id", "block_size", "allow_pickle")  # of `model`: how both parts of a run read checkpoints
TEXT = ("source", "subset", "split", "column")


@dataclass(frozen=True)
class Schedule:
    """How a dense model is pruned and trained back.

    Attributes:
        config: of every pruning.
        recovery: of every training. Where it does not set `data.source`, the calibration text is learnt. With
            `gradual`, `train.tokens` are those of all trainings together.
        ratios: removed shares of the dense model; none: what `config` says.
        gradual: every ratio is pruned from the recovered model of the ratio before, not from the dense one.
        plan: apply this one instead of scoring.
        levels: directory for the levels of a search.
    """

    config: Config = field(default_factory=Config)
    recovery: RecoverConfig = field(default_factory=RecoverConfig)
    ratios: tuple[float, ...] = ()
    gradual: bool = False
    plan: Plan | None = None
    levels: Path | None = None

    @property
    def parts(self) -> int:
        """Trainings that share the tokens."""
        return len(self.ratios) if self.gradual else 1

    def outputs(self, out: Path) -> dict[float | None, Path]:
        """Ratio (None: what the configuration says) -> the directory of its recovered model, in rising order."""
        if len(self.ratios) < 2:
            return {next(iter(self.ratios), None): out}
        return {ratio: out / f"ratio-{ratio}" for ratio in sorted(self.ratios)}

    def at(self, ratio: float | None) -> Config:
        """The configuration of the pruning at a ratio."""
        if ratio is None:
            return self.config
        name = "structured" if self.config.method == "structured" else "masking"
        section = getattr(self.config, name).model_copy(update={"ratio": ratio})
        return self.config.model_copy(update={name: section})

    def completed(self) -> "Schedule":
        """Itself, checked, with what the recovery takes over from the pruning.

        Raises:
            UserError: choices that contradict each other, or no text to learn.
        """
        self._check()
        source, data, model = self.config.calibration, self.recovery.data, self.recovery.model
        text = {}
        if "source" not in data.model_fields_set:
            if source.replays:
                raise UserError(
                    f"calibration.source = {source.source} is a saved calibration, which has no text to train on: set"
                    " the recovery's data.source (--recover-set data.source=notes.txt)"
                )
            text = {name: getattr(source, name) for name in TEXT if name not in data.model_fields_set}
        reading = {name: getattr(self.config.model, name) for name in READING if name not in model.model_fields_set}
        sections = {"data": data.model_copy(update=text), "model": model.model_copy(update=reading)}
        return replace(self, recovery=self.recovery.model_copy(update=sections))

    def _check(self) -> None:
        """Raise UserError for choices that contradict each other."""
        ratios, method, split = self.ratios, self.config.method, self.config.structured.split
        if len(set(ratios)) < len(ratios):
            raise UserError(f"ratios {', '.join(map(str, ratios))} have one twice: give each once")
        if self.gradual and method != "structured":
            raise UserError(f"a gradual schedule removes heads and channels: leave out --gradual, or method = {method}")
        if ratios and (self.plan is not None or method != "structured" and len(ratios) > 1):
            other = "a plan says what goes" if self.plan is not None else f"method = {method} takes one ratio at a time"
            raise UserError(f"{other}: leave out the ratios {', '.join(map(str, ratios))}")
        if not self.gradual:
            return
        if len(ratios) < 2:
            raise UserError(
                "a gradual schedule goes through several ratios, such as --ratio 0.3,0.5: give them, or leave out"
                " --gradual"
            )
        if tokens := self.recovery.blocks.tokens:
            raise UserError(
                f"blocks.tokens = {tokens} is a first stage of one training, and the trainings of a gradual schedule"
                " share their text: leave out --gradual or blocks.tokens"
            )
        if self.levels is not None:
            raise UserError(
                f"levels in '{self.levels}' are of one model, and every ratio of a gradual schedule prunes another:"
                " leave out --levels"
            )
        if min(ratios) == 0:
            raise UserError("a gradual schedule removes something at every ratio: leave out ratio 0")
        if isinstance(split, int) and split > 0:
            raise UserError(
                f"structured.split = {split} would take as many heads at every ratio of a gradual schedule: set it to"
                " measured, equal, by-cost or joint, or to 0 for channels only"
            )


def relative_ratio(ratio: float, removed: float) -> float:
    """The share of what is left that goes, so that in all `ratio` of the dense model does.

    Args:
        removed: what is gone already, a share of the dense model. More than `ratio`, since units are whole: 0.
    """
    return max(0.0, 1 - (1 - ratio) / (1 - removed))
