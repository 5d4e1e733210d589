"""What a benchmark measures: sizes, forms of generation and rounds, checked before any weight is read."""

from dataclasses import dataclass

from structprune.errors import UserError, nearest
from structprune.generation.cached import CACHES, check_cache
from structprune.generation.samplers import Generation, generation_settings, sampler_options

BLOCK_LENGTH = 32  # the default of block-wise generation, with which block-wise caches are published
ALL = "all"


@dataclass(frozen=True)
class BenchSettings:
    """Choices of one benchmark.

    Attributes:
        batches, lengths: every pair is measured; a length counts prompt and generated tokens together.
        gen_length: generated tokens of each sequence, 0 for no generation; steps: denoising steps of all blocks.
        block_length: for a sampler with blocks; None: 32, or gen_length where that is less.
        caches: some of `none`, `prefix`, `dual`, or `all` that the sampler can have.
        compiled: also measure with torch.compile: forward passes, and generation without a cache.
        semi_structured: also run 2:4-masked weights through torch's semi-structured kernels.
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
        for option, values in (
            ("--batch", self.batches),
            ("--length", self.lengths),
            ("--rounds", (self.rounds,)),
            ("--generation-rounds", (self.generation_rounds,)),
            ("--steps", (self.steps,)),
        ):
            for value in values:
                if value < 1:
                    raise UserError(f"{option} {value} cannot be used: give whole numbers from 1")
            if len(set(values)) < len(values) or not values:
                raise UserError(f"{option} needs different numbers, at least one: {', '.join(map(str, values))}")
        if self.gen_length < 0:
            raise UserError(f"--gen-length {self.gen_length} cannot be used: give 0 (no generation) or more")
        known = (*CACHES, ALL)
        for name in self.caches:
            if name not in known:
                close = nearest(name, list(known))
                raise UserError(f"unknown --cache '{name}'{close}: choose from {', '.join(known)}")
        if len(set(self.caches)) < len(self.caches) or (ALL in self.caches and len(self.caches) > 1):
            raise UserError(f"--cache {','.join(self.caches)} names one twice: give each once, or only 'all'")
        self._check_idle()
        if self.gen_length and self.steps > self.gen_length:
            raise UserError(
                f"--steps {self.steps} is more than the {self.gen_length} tokens of --gen-length, and a step without a"
                f" token runs nothing: give at most {self.gen_length}"
            )
        shortest = min(self.lengths)
        if self.gen_length >= shortest:
            raise UserError(
                f"--length {shortest} leaves no room for a prompt before --gen-length {self.gen_length}: raise"
                " --length, lower --gen-length, or leave generation out with --gen-length 0"
            )

    def _check_idle(self) -> None:
        """Refuse options of generation where there is none."""
        if self.gen_length:
            return
        fields = type(self).__dataclass_fields__
        for name, option in (("steps", "--steps"), ("block_length", "--block-length"), ("caches", "--cache"),
                             ("generation_rounds", "--generation-rounds")):  # fmt: skip
            if getattr(self, name) != fields[name].default:
                raise UserError(f"{option} has no effect without generation: leave it out, or raise --gen-length")

    def generation(self, config) -> Generation | None:
        """The sampler's settings for a model's family; None where no generation is measured.

        Raises:
            UserError: settings that the family's sampler cannot have.
        """
        if not self.gen_length:
            return None
        values = {"gen_length": self.gen_length, "steps": self.steps}
        block_length = self.block_length
        if block_length is None and "block_length" in sampler_options(config):
            block_length = min(BLOCK_LENGTH, self.gen_length)
        return generation_settings(config, values if block_length is None else values | {"block_length": block_length})

    def caches_of(self, generation: Generation) -> tuple[str, ...]:
        """The caches to measure, in a fixed order.

        Raises:
            UserError: a cache that the sampler cannot have.
        """
        if ALL in self.caches:
            return CACHES if generation.blocks > 1 else CACHES[:-1]
        for name in self.caches:
            check_cache(name, generation)
        return tuple(name for name in CACHES if name in self.caches)
