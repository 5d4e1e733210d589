"""What a benchmark measures: sizes, kinds of generation and rounds, checked before any weight is read."""

from dataclasses import dataclass

from structprune.errors import UserError, nearest
from structprune.generation.cached import CACHES, caches_of, check_cache
from structprune.generation.samplers import Generation, free_options, generation_settings
from structprune.generation.settings import BLOCK_LENGTH

ALL = "all"
MOST = 1 << 20  # of any count


@dataclass(frozen=True)
class Size:
    """Sequences in a batch, and tokens of each (prompt and generated ones together)."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}"


@dataclass(frozen=True)
class BenchSettings:
    """Choices of one benchmark.

    Attributes:
        batches, lengths: every pair is measured; a length counts prompt and generated tokens together.
        gen_length: tokens to generate for each sequence, 0 for no generation; steps: over all blocks together.
        block_length: for a sampler with blocks; None: 32, or gen_length if that is less.
        caches: `none`, `prefix` and `dual`, or `all` that the sampler allows.
        compiled: also measure with torch.compile: forward passes, and generation without a cache.
        semi_structured: also run 2:4-masked weights on torch's semi-structured kernels.
        rounds, generation_rounds, warmup: timed passes, timed generations, and untimed passes before them.
    Raises:
        UserError: a value that cannot be used.
    """

    batches: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (512,)
    gen_length: int = 128
    steps: int = 32
    block_length: int | None = None
    caches: tuple[str, ...] = ("none",)
    compiled: bool = False
    semi_structured: bool = False
    rounds: int = 20
    generation_rounds: int = 5
    warmup: int = 3

    def __post_init__(self):
        for name, option, values in (
            ("batch size", "--batch", self.batches),
            ("length", "--length", self.lengths),
            ("count", "--rounds", (self.rounds,)),
            ("count", "--generation-rounds", (self.generation_rounds,)),
            ("count", "--steps", (self.steps,)),
        ):
            for value in values:
                if not 1 <= value <= MOST:
                    raise UserError(f"{option} {value} is not a {name}: give whole numbers from 1 to {MOST}")
            if len(set(values)) < len(values) or not values:
                raise UserError(f"{option} {','.join(map(str, values))}: give each number once, and at least one")
        if self.gen_length < 0:
            raise UserError(f"--gen-length {self.gen_length} is not a count: give 0 (no generation) or more")
        choices = [*CACHES, ALL]
        for name in self.caches:
            if name not in choices:
                raise UserError(f"unknown --cache '{name}'{nearest(name, choices)}: choose from {', '.join(choices)}")
        if len(set(self.caches)) < len(self.caches) or (ALL in self.caches and len(self.caches) > 1):
            raise UserError(f"--cache {','.join(self.caches)} names a cache twice: give each once, or all alone")
        self._check_idle()
        if self.gen_length and self.steps > self.gen_length:
            raise UserError(
                f"--steps {self.steps} are more than the {self.gen_length} tokens of --gen-length, and every step"
                f" reveals at least one: give at most {self.gen_length}"
            )
        shortest = min(self.lengths)
        if self.gen_length >= shortest:
            raise UserError(
                f"--length {shortest} leaves no room for a prompt before --gen-length {self.gen_length}: raise"
                " --length, lower --gen-length, or measure no generation with --gen-length 0"
            )

    def _check_idle(self) -> None:
        """Refuse options of generation where none is measured."""
        if self.gen_length:
            return
        fields = type(self).__dataclass_fields__
        for name, option in (("steps", "--steps"), ("block_length", "--block-length"), ("caches", "--cache"),
                             ("generation_rounds", "--generation-rounds")):  # fmt: skip
            if getattr(self, name) != fields[name].default:
                raise UserError(f"{option} has no effect with --gen-length 0: leave one of them out")

    @property
    def sizes(self) -> list[Size]:
        """Every batch size at every length."""
        return [Size(batch, length) for batch in self.batches for length in self.lengths]

    def generation(self, config) -> Generation | None:
        """The sampler's settings for the family of `config`; None where no generation is measured.

        By default there are two blocks at least where a dual cache is asked for, which needs them.

        Raises:
            UserError: settings that the family's sampler does not allow.
        """
        if not self.gen_length:
            return None
        values = {"gen_length": self.gen_length, "steps": self.steps}
        block_length = self.block_length
        if block_length is None and "block_length" in free_options(config):
            halved = {ALL, "dual"} & set(self.caches) and self.gen_length % 2 == self.steps % 2 == 0
            block_length = min(BLOCK_LENGTH, self.gen_length // 2 if halved else self.gen_length)
        return generation_settings(config, values if block_length is None else values | {"block_length": block_length})

    def caches_of(self, generation: Generation) -> tuple[str, ...]:
        """The caches to measure, in a fixed order.

        Raises:
            UserError: one that does not work with the sampler.
        """
        if ALL in self.caches:
            return caches_of(generation)
        for name in self.caches:
            check_cache(name, generation)
        return tuple(name for name in CACHES if name in self.caches)
