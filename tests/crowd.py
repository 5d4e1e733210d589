"""Processes as threads: the messages of `structprune.workers.Workers` in one process, for tests of what is shared."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from structprune.workers import Workers


@dataclass
class Post:
    """Where threads leave what they gather."""

    barrier: threading.Barrier
    values: list = field(default_factory=list)


@dataclass(frozen=True)
class Member(Workers):
    """One of several threads; messages wait for all of them."""

    post: Post | None = field(default=None, compare=False)

    def gather(self, value):
        self.post.values[self.rank] = value
        self.post.barrier.wait()
        values = list(self.post.values)
        self.post.barrier.wait()
        return values

    def from_first(self, work):
        return self.gather(work() if self.main else None)[0]

    def add_up(self, *tensors):
        for tensor in tensors:
            total = sum(each.clone() for each in self.gather(tensor.clone()))
            tensor.copy_(total)


def crowd(count, work):
    """What `work(workers)` returns in each of so many threads, in order."""
    post = Post(threading.Barrier(count, timeout=60), [None] * count)

    def run(rank):
        with torch.no_grad():
            return work(Member(rank, count, post=post))

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))
