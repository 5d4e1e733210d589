"""The processes that `accelerate launch` or `torchrun` start: each does its share of the chunks."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from structprune.errors import UserError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by both launchers
PATIENCE = timedelta(days=30)  # one process may have much more work than another
Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass(frozen=True)
class Workers:
    """The processes of a run, of which this is number `rank`."""

    rank: int = 0
    count: int = 1
    device: str | None = None  # this process's accelerator, where there are any

    @property
    def main(self) -> bool:
        """Whether this process reports to the user."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether this process does chunk `number`."""
        return number % self.count == self.rank

    def agree(self, problem: UserError | None) -> None:
        """Raise the first process's problem in every process, so that none waits for a process that has ended."""
        messages = [None if problem is None else str(problem)]
        if self.count > 1:
            torch.distributed.broadcast_object_list(messages, src=0)
        if messages[0] is not None:
            raise problem or UserError(messages[0])

    def first(self, work: Callable[[], object]) -> None:
        """Work of the first process, for whose end the others wait.

        Raises:
            UserError: in all processes, what was raised in the first one.
        """
        problem = None
        if self.main:
            try:
                work()
            except UserError as error:
                problem = error
        self.agree(problem)

    def share(self, work: Callable[[Sequence[Input]], Sequence[Output]], inputs: Sequence[Input]) -> list[Output]:
        """`work` on all inputs, the same in every process: each works on its own, and all get the outputs, in order.

        Raises:
            UserError: what `work` raised in the first process where it did, in every process.
        """
        if self.count == 1:
            return list(work(inputs))
        own: Sequence[Output] | UserError
        try:
            own = work(inputs[self.rank :: self.count])
        except UserError as error:
            own = error
        outputs: list[Any] = [None] * len(inputs)
        parts = self.gather(own)
        for rank, part in enumerate(parts):
            if isinstance(part, UserError):
                raise part
            outputs[rank :: self.count] = part
        return outputs

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in every process."""
        values = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes call this."""
        if self.count > 1:
            torch.distributed.barrier()


def join(trains: bool = False) -> Workers:
    """Join the other processes where a launcher started this one.

    Args:
        trains: gradients are summed on accelerators, where there are any. Else gloo does for all, which needs none.
    """
    count = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 1
    if count < 2:
        return Workers()
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if trains and torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
    devices, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    return Workers(int(os.environ["RANK"]), count, f"cuda:{local % devices}" if devices else None)


def leave() -> None:
    """Undo `join`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def workers(trains: bool = False) -> Iterator[Workers]:
    """`join` on entry and `leave` on exit."""
    try:
        yield join(trains)
    finally:
        leave()
