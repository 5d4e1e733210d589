"""What samplers of block diffusion models share: blocks of the model's own size, of which each sees none behind it."""

from dataclasses import dataclass

from structprune.generation.checks import check_not_negative, check_whole
from structprune.generation.sampler import Generation


@dataclass(frozen=True)
class BlockGeneration(Generation):
    """Blocks from left to right. The last one is generated whole, and cut to `gen_length`. Every block has its share of
    the steps, `steps · block_length / gen_length` rounded up."""

    block_length: int = 32
    """Tokens of a block; the model's own by default, and no other."""
    temperature: float = 0.0
    """Of the choice of tokens; 0 takes the likeliest."""
    stop_at_eos: bool = False
    """Generate no further block of a row once a finished one holds an EOS: the rest becomes EOS."""

    single_block = "blocks see no later one"
    of_config = {"block_length": "block_size"}
    sealed = True

    def __post_init__(self):
        super().__post_init__()
        check_whole(block_length=self.block_length)
        check_not_negative(temperature=self.temperature)

    @property
    def blocks(self) -> int:
        return -(-self.gen_length // self.block_length)

    @property
    def block_tokens(self) -> int:
        return self.block_length

    @property
    def steps_of_block(self) -> int:
        """A block's share of the steps of `gen_length` tokens, rounded up."""
        return -(-self.steps * self.block_length // self.gen_length)

    @property
    def blind(self) -> bool:
        return False
