"""torch.compile for a benchmark: blocks are compiled one by one, in place, and restored afterwards."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from structprune.errors import UserError
from structprune.files import first_line
from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM

RECOMPILATIONS = 4096  # blocks of different widths share their code; torch's limit is 8 variants of it


def check_compile(device: torch.device) -> None:
    """Compile a small function.

    Raises:
        UserError: compilation fails here, for example because there is no C++ compiler.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
    except TorchDynamoException as error:
        raise UserError(
            f"torch.compile does not work here ({first_line(error)}): install a C++ compiler, or leave out --compile"
        ) from error


@contextmanager
def compiled_blocks(models: Iterable[DiffusionLM]) -> Iterator[None]:
    """While open, every block of the models is compiled at its first call, for one shape at a time.

    Blocks are compiled one by one, because a whole model of 32 blocks compiles for minutes at every shape and gains
    little more. In a generation the last block with attention is not compiled, nor what follows it: only the predicted
    positions are computed there (`encode_at`), not through its forward.
    """
    blocks = [view.module for model in models for view in Adapter(model).blocks]
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
