"""What a measurement of sinks looks at: text or prompt, trajectories and sizes, checked before anything is read."""

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

from structprune.config import SinkSettings
from structprune.errors import UserError, nearest

Trajectories = Literal["forward", "reverse", "both"]
MOST = 1 << 20  # of any count
COUNTS = {  # option -> its largest value
    "windows": MOST, "length": MOST, "gen_length": MOST, "levels": 10_000, "steps": MOST, "block_length": MOST,
}  # fmt: skip


@dataclass(frozen=True)
class SinkRun:
    """Choices of one measurement; None stands for the default, so that an option without effect can be refused.

    Raises:
        UserError: values that contradict each other or cannot be used.
    """

    sink: SinkSettings
    """α, κ and scale_free of the sink mask φ."""
    text: str | None = None
    """A .txt, .jsonl or .parquet file; default the package's own held-out text."""
    prompt: str | None = None
    """Generate from this instead of from the start of every window; noise levels are then those of the prompt."""
    trajectory: str | None = None
    """forward, reverse or both; default both, for a causal LM reverse, for Nemotron-Labs-Diffusion forward."""
    windows: int | None = None
    """Number N of text windows; default 8."""
    length: int | None = None
    """Tokens T of a window, of which the last ones are generated; default 128."""
    gen_length: int | None = None
    """Tokens to generate; default half the length, after a prompt 64."""
    levels: int | None = None
    """Noise levels; default 10."""
    steps: int | None = None
    """Denoising steps of a diffusion LM; default one per generated token."""
    block_length: int | None = None
    """Tokens in a block of LLaDA's sampler; default the whole generation."""
    seed: int | None = None
    """Seed of windows and noise; default 0."""

    def __post_init__(self):
        for name, most in COUNTS.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                option = f"--{name.replace('_', '-')} = {value}"
                raise UserError(f"{option} is not a count: give a whole number from 1 to {most}")
        if self.seed is not None and not 0 <= self.seed < 2**62:
            raise UserError(f"--seed = {self.seed} is not a seed: give a whole number from 0, below 2**62")
        choices = list(get_args(Trajectories))
        if self.trajectory is not None and self.trajectory not in choices:
            close = nearest(self.trajectory, choices)
            raise UserError(f"unknown trajectory '{self.trajectory}'{close}: {', '.join(choices)}")
        if self.text is not None and self.prompt is not None:
            raise UserError("--text and --prompt both say what the model reads: leave one out")
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt is empty: give it at least one word")
        if self.prompt is not None:
            self._refuse("applies to windows of text, which --prompt replaces", "windows", "length")
        if self.trajectory == "forward":
            self._refuse("applies to generation, and --trajectory is forward", "gen_length", "steps", "block_length")
        elif self.prompt is None and self.generated_tokens >= self.window_tokens:
            raise UserError(
                f"--gen-length = {self.generated_tokens} leaves no prompt in windows of --length {self.window_tokens}"
            )
        if self.trajectory == "reverse":
            self._refuse("applies to noise levels, and --trajectory is reverse", "levels")

    def check_kinds(self, causal: bool) -> None:
        """Refuse options that change nothing for these models.

        Args:
            causal: all models are causal LMs.
        Raises:
            UserError: an option of diffusion LMs only, or a seed where nothing is drawn.
        """
        if causal:
            self._refuse("applies to diffusion LMs, and no model given is one", "levels", "steps", "block_length")
        if self.prompt is not None and (causal or self.trajectory == "reverse"):
            self._refuse("has no effect, since generation from a --prompt draws no windows and no noise", "seed")

    def _refuse(self, reason: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} = {getattr(self, name)} {reason}: leave it out")

    @property
    def window_count(self) -> int:
        return self.windows or 8

    @property
    def window_tokens(self) -> int:
        return self.length or 128

    @property
    def generated_tokens(self) -> int:
        return self.gen_length or (64 if self.prompt is not None else self.window_tokens // 2)

    @property
    def noise_levels(self) -> int:
        return self.levels or 10

    @property
    def random_seed(self) -> int:
        return self.seed or 0

    @property
    def shapes_generation(self) -> bool:
        """Whether an option of generation was given."""
        return any(value is not None for value in (self.prompt, self.gen_length, self.steps, self.block_length))

    def includes(self, kind: str) -> bool:
        """Whether a trajectory, "forward" or "reverse", is measured."""
        return self.trajectory in (None, "both", kind)

    def plain(self) -> dict:
        """For sinks.json: the options as given, with defaults filled in and the constants of φ."""
        values = {key: value for key, value in asdict(self).items() if key != "sink"}
        values |= {"levels": self.noise_levels, "seed": self.random_seed}
        if self.prompt is None:
            values |= {"windows": self.window_count, "length": self.window_tokens}
        sink = {name: getattr(self.sink, name) for name in ("alpha", "kappa", "scale_free")}
        return values | sink | {"torch": torch.__version__}
