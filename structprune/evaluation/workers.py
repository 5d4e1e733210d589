"""One process among several, as `accelerate launch` and `torchrun` start them: each takes its share of the chunks."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Iterator

import torch
import torch.distributed

from structprune.errors import UserError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what both launchers set
PATIENCE = timedelta(days=30)  # a process may have much more to do than another


@dataclass(frozen=True)
class Workers:
    """The processes of a run.

    Attributes:
        rank: of this one, from 0.
        count: of all.
        device: of this process, where the launcher gave it one of several accelerators.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None

    @property
    def main(self) -> bool:
        """Whether this process reports."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether chunk `number` is this process's."""
        return number % self.count == self.rank

    def agree(self, problem: UserError | None) -> None:
        """Raise in every process what went wrong in the first, instead of leaving the others to wait for it."""
        told = [None if problem is None else str(problem)]
        if self.count > 1:
            torch.distributed.broadcast_object_list(told, src=0)
        if told[0] is not None:
            raise problem or UserError(told[0])

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()


def join() -> Workers:
    """This process's place; joins the others where a launcher started it. Only gloo is used, which needs no GPU."""
    count = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 1
    if count < 2:
        return Workers()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    devices, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    return Workers(int(os.environ["RANK"]), count, f"cuda:{local % devices}" if devices else None)


def leave() -> None:
    """Undo `join`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def workers() -> Iterator[Workers]:
    """This process's place while open."""
    place = join()
    try:
        yield place
    finally:
        leave()
