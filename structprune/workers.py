"""The processes that `torchrun` or `accelerate launch` start: each does its share, and all get what was made."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from structprune.errors import Elsewhere, Interrupted, UserError

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
        """Whether this process reports to the user, and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def mine(self, number: int) -> bool:
        """Whether this process does chunk `number`."""
        return number % self.count == self.rank

    def span(self, size: int) -> slice:
        """This process's part of `size` things in a row; the parts of all processes follow each other."""
        return slice(self.rank * size // self.count, (self.rank + 1) * size // self.count)

    def agree(self, problem: UserError | Interrupted | None) -> None:
        """Raise the first process's problem in every process, so that none waits for a process that has ended."""
        own = None if problem is None else (str(problem), problem.code if isinstance(problem, Interrupted) else None)
        problems = [own]
        if self.several:
            with connected():
                torch.distributed.broadcast_object_list(problems, src=0)
        if problems[0] is not None:
            message, code = problems[0]
            raise problem or (Elsewhere(message) if code is None else Interrupted(message, code))

    def first(self, work: Callable[[], object]) -> None:
        """Work of the first process, for whose end the others wait.

        Raises:
            UserError: in all processes, what was raised in the first one.
        """

        def silent() -> None:  # what it returns stays here
            work()

        self.from_first(silent)

    def from_first(self, work: Callable[[], Output]) -> Output:
        """What the first process's `work` returns, in every process.

        Raises:
            UserError, Interrupted: in all processes, what was raised in the first one.
        """
        if not self.several:
            return work()
        problem: UserError | Interrupted | None = None
        values: list[Any] = [None]
        if self.main:
            try:
                values = [work()]
            except (UserError, Interrupted) as error:
                problem = error
        self.agree(problem)
        with connected():
            torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def in_turn(self, work: Callable[[], Output]) -> Output:
        """What `work` returns in this process; the first one does it before the others, which then find its files.

        Raises:
            UserError: in all processes, what was raised in any.
        """
        own: list[Output] = []
        self.first(lambda: own.append(work()))
        problem = None
        if not self.main:
            try:
                own.append(work())
            except UserError as error:
                problem = error
        for other in self.gather(problem):
            if other is not None:
                raise problem or Elsewhere(str(other))
        return own[0]

    def share(self, work: Callable[[Sequence[Input]], Sequence[Output]], inputs: Sequence[Input]) -> list[Output]:
        """`work` on all inputs, the same in every process: each works on its own, and all get the outputs, in order.

        Raises:
            UserError: what `work` raised in the first process where it did, in every process.
        """
        if not self.several:
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
                raise part if rank == self.rank else Elsewhere(str(part))
            outputs[rank :: self.count] = part
        return outputs

    def gather(self, value: Output) -> list[Output]:
        """The values of all processes, in every process."""
        values = [value] * self.count
        if self.several:
            with connected():
                torch.distributed.all_gather_object(values, value)
        return values

    def rows(self, own: torch.Tensor) -> torch.Tensor:
        """The rows (n, ...) of all processes, one process's after another's: (N, ...) on CPU where there are several.

        The opposite of `span`.
        """
        return torch.cat(self.gather(own.cpu())) if self.several else own

    def add_up(self, *tensors: torch.Tensor) -> None:
        """Replace tensors by their sums over all processes, in place; each process gives the same shapes in order."""
        if self.several:
            with connected():
                for tensor in tensors:
                    torch.distributed.all_reduce(tensor)

    def mean(self, own: float, size: int) -> float:
        """The mean over the things of all processes, of which this one's `size` have the mean `own`."""
        parts = self.gather((own, size))
        return own if len(parts) == 1 else sum(mean * count for mean, count in parts) / sum(size for _, size in parts)

    def wait(self) -> None:
        """Wait until all processes call this."""
        if self.several:
            with connected():
                torch.distributed.barrier()


ALONE = Workers()
LOST = re.compile(r"connection (was )?(closed|reset)|remote process exited|socket timeout", re.IGNORECASE)
_joined = False


@contextmanager
def connected() -> Iterator[None]:
    """While open, a lost connection is another process's end.

    Raises:
        Elsewhere: one was lost.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed has no class of its own for it
        if LOST.search(str(error)):
            raise Elsewhere("another process of this run was killed or lost") from error
        raise


def check_shares(workers: Workers, sizes: Iterable[tuple[int, str]]) -> None:
    """Raise UserError where there are more processes than things to share.

    Args:
        sizes: how many there are, and what they are.
    """
    for size, name in sizes:
        if size < workers.count:
            raise UserError(f"{workers.count} processes cannot share {size} {name}: start at most {size}")


def join(reduces: bool = False) -> Workers:
    """Join the other processes where a launcher started this one.

    Args:
        reduces: tensors are summed on accelerators, where there are any. Else gloo does for all, which needs none.
    """
    global _joined
    count, rank = _launched()
    if count < 2:
        return ALONE
    local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if reduces and devices:
        if (here := processes_here()) > devices:
            raise UserError(f"{here} processes cannot share {devices} GPUs: start one for each")
        torch.cuda.set_device(local)
    _joined = True
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if reduces and torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
    return Workers(rank, count, f"cuda:{local % devices}" if devices else None)


def repeats() -> bool:
    """Whether this process never joined the others and is not the first one of its machine: what it refuses by then,
    that one refuses."""
    return int(os.environ.get("LOCAL_RANK", _launched()[1])) > 0 and not _joined


def _launched() -> tuple[int, int]:
    """How many processes a launcher started, and the number of this one."""
    if not all(name in os.environ for name in LAUNCHED):
        return 1, 0
    return int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])


def processes_here() -> int:
    """How many processes a launcher started on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _launched()[0] > 1 else 1


def leave() -> None:
    """Undo `join`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def workers(reduces: bool = False) -> Iterator[Workers]:
    """`join` on entry and `leave` on exit.

    Raises:
        Elsewhere: another process failed before this one, and says why.
    """
    try:
        place = join(reduces)
        try:
            yield place
        except (Exception, KeyboardInterrupt) as error:
            if not place.several:
                raise
            if not _first_to_fail():
                raise Elsewhere(str(error), getattr(error, "code", 2)) from error
            if isinstance(error, Elsewhere):  # it was killed, and says nothing
                raise UserError(str(error)) from error
            raise
    finally:
        leave()


def _first_to_fail() -> bool:
    """Whether no other process said so before; also where that cannot be known any more."""
    try:
        return torch.distributed.distributed_c10d._get_default_store().add("structprune failed", 1) == 1
    except (RuntimeError, ValueError, AttributeError):
        return True
