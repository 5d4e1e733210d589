"""What a training shows while it runs, and remembers: progress with the time left, the held-out figures, the end of
patience with them, and the end that a signal asks for."""

import math
from collections.abc import Callable, Iterator
from time import perf_counter

from transformers import TrainerCallback

from structprune.errors import Interrupted
from structprune.progress import Track
from structprune.recovery.held_out import Figures
from structprune.recovery.settings import RecoverConfig
from structprune.workers import Workers


class Watch(TrainerCallback):
    """A callback of the Trainer.

    Args:
        steps: of the whole training.
    """

    def __init__(self, steps: int, config: RecoverConfig, track: Track):
        self._shown: list[dict[str, float]] = []
        self._steps, self._track, self._goal = steps, track, config.loss.goal
        self._tokens = config.train.batch * config.data.length  # of a step
        self.first = self._done = 0  # the step that this run goes on from, and the last one
        self._start = perf_counter()
        self._bar: Iterator | None = None

    def note(self, figures: Figures) -> dict[str, float]:
        """Show held-out figures; returns them for the Trainer, which keeps the best checkpoint by one of them."""
        means = figures.means()
        means["goal"] = self._goal(means)
        self._shown.append(means)
        return means

    def history(self, log: list[dict]) -> list[dict]:
        """The held-out figures of the Trainer's log, which a killed run keeps, by tokens learnt."""
        return [
            {"tokens": entry["step"] * self._tokens}
            | {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            for entry in log
            if "eval_kl" in entry
        ]

    def on_train_begin(self, args, state, control, **_):
        self.first = self._done = state.global_step
        self._start = perf_counter()
        self._bar = iter(self._track(range(self._steps), self._title))
        for _step in range(state.global_step + 1):  # those of an earlier run, and the first one, which begins
            next(self._bar, None)
        self._shown = self.history(state.log_history)

    def on_step_end(self, args, state, control, **_):
        if state.global_step >= self._steps:  # the Trainer saves then, but measures at its own steps only
            control.should_evaluate = True
        self._done = state.global_step
        if self._bar is not None:
            next(self._bar, None)

    def on_train_end(self, args, state, control, **_):
        if self._bar is not None:
            next(self._bar, None)
            self._bar = None

    def _title(self) -> str:
        """The speed of this run, and the last held-out figures; the best are those whose weights are kept."""
        parts = ["learning"]
        if self._done > self.first:
            speed = (self._done - self.first) * self._tokens / max(perf_counter() - self._start, 1e-9)
            parts.append(f"{speed:,.0f} tokens/s")
        if self._shown:
            last, best = self._shown[-1], min(each["goal"] for each in self._shown)
            parts.append(f"held-out loss {last['goal']:.3f} (best {best:.3f})")
            parts.append(f"divergence {last['kl']:.3f}, NELBO {last['nelbo']:.3f}")
        return ", ".join(parts)


class Patience(TrainerCallback):
    """Ends a training after so many evaluations without a gain, as transformers' EarlyStoppingCallback does, which
    counts from 0 again in a run that goes on.

    Args:
        evaluations: without a gain.
    """

    def __init__(self, evaluations: int):
        self._evaluations = evaluations

    def ended(self, log: list[dict]) -> bool:
        """Whether it ended with the last evaluation of the Trainer's log, which a killed run keeps."""
        best, waited = math.inf, 0
        for number, goal in enumerate(entry["eval_goal"] for entry in log if "eval_goal" in entry):
            waited = 0 if number == 0 or goal < best else waited + 1
            best = min(best, goal)  # of a goal that is no number too
        return waited >= self._evaluations

    def on_evaluate(self, args, state, control, **_):
        if self.ended(state.log_history):
            control.should_training_stop = True


def ending(watch: Callable[[], None], workers: Workers) -> Interrupted | None:
    """What `watch` ends this process with, or else the first one that it ends; all processes ask together.

    Args:
        watch: raises `Interrupted`, and nothing else, where a run is to end.
    """
    own = None
    try:
        watch()
    except Interrupted as error:
        own = error
    reasons = workers.gather(own)
    return own or next(filter(None, reasons), None)


class Halt(TrainerCallback):
    """Ends a training with a checkpoint after the step under way, where `watch` ends any of the processes.

    Args:
        watch: as in `ending`. workers: the processes that share the training.
    """

    def __init__(self, watch: Callable[[], None], workers: Workers):
        self._watch, self._workers = watch, workers
        self._ends = False

    def on_step_end(self, args, state, control, **_):
        if ending(self._watch, self._workers) is not None:
            self._ends = control.should_save = control.should_training_stop = True

    def end(self) -> None:
        """Raise what ended the training, if anything did: now that its checkpoint is there, which the message names."""
        if self._ends and (reason := ending(self._watch, self._workers)) is not None:
            raise reason
