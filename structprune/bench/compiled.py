"""torch.compile for a benchmark: every block by itself, in place, and back again."""

from contextlib import contextmanager
from typing import Iterable, Iterator

import torch

from structprune.errors import UserError
from structprune.models.modeling_structprune import DiffusionLM

RECOMPILATIONS = 4096  # blocks of different widths share their code, and 8 variants of it are torch's limit


def check_compile(device: torch.device) -> None:
    """Compile something small.

    Raises:
        UserError: it does not work here, such as for want of a C++ compiler.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"torch.compile does not work here ({reason}): install a C++ compiler, or leave out --compile"
        ) from error


@contextmanager
def compiled_blocks(models: Iterable[DiffusionLM]) -> Iterator[None]:
    """While open, every block of the models is compiled, for one shape at a time, when it is first called.

    Block by block, because a whole model of 32 blocks compiles for minutes at every shape and gains little more. In a
    generation the last block runs as it is: it ends at the wanted positions (`encode_at`), which no call of it does.
    """
    blocks = [block for model in models for block in model.blocks]
    for block in blocks:
        block.compile(dynamic=False)
    limits = {"recompile_limit": RECOMPILATIONS, "accumulated_recompile_limit": RECOMPILATIONS}
    try:
        with torch._dynamo.config.patch(limits):
            yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
