"""A pass over windows whose sums so far are kept every so often, so that a run that was killed goes on within it."""

import hashlib
from collections.abc import Callable

import torch

from structprune.statistics.scan import Scan
from structprune.workers import Workers

MASS = "mass"  # the tensor of a journal's part
PARTS = 10  # of a pass, at most: a kill loses one
Tensors = dict[str, torch.Tensor]


def rows_digest(workers: Workers, own: torch.Tensor) -> str:
    """16 hex digits of the rows of all processes, of which each gives its own (r, T)."""
    return hashlib.sha256(workers.rows(own).numpy().tobytes()).hexdigest()[:16]


class PassParts:
    """What a pass has summed so far; of several processes, which have sums of their own, the first keeps all.

    Every process reads its rows in batches of one size. It calls `restore` before them and `keep` after each, and
    passes on the attention mass that it meets by `observe`.

    Args:
        name: of the pass, and of all that decides its sums beside its rows.
        ids: (R, T) this process's rows. size: of them in a batch, the last of which may have fewer.
    """

    def __init__(self, scan: Scan, name: str, ids: torch.Tensor, size: int):
        self._scan, self._batches = scan, -(-len(ids) // size)
        self._masses: list[torch.Tensor] = []
        self._kept, self._name = 0, ""
        if scan.journal.directory is not None:
            counts = scan.workers.gather(self._batches)
            self._parts = min(PARTS, *counts)
            # sums so far are those of whole batches
            self._name = f"pass-{name}-{rows_digest(scan.workers, ids)}-by-{size}-{'-'.join(map(str, counts))}"

    def observe(self, mass: torch.Tensor) -> None:
        """Let the scan's observer see attention mass (..., T), which is kept with the sums."""
        if self._name:
            self._masses.append(mass.flatten(0, -2))  # (r, T), without a device sync
        self._scan.observe(mass)

    def restore(self) -> tuple[int, Tensors]:
        """How many of this process's batches were summed, and their sums on CPU; the mass they had is observed."""
        kept = self._scan.journal.read(self._name)
        if kept is None:
            return 0, {}
        own = f"{self._scan.workers.rank} "
        sums = {name.removeprefix(own): tensor for name, tensor in kept.tensors.items() if name.startswith(own)}
        if (mass := sums.pop(MASS, None)) is not None:
            self.observe(mass)
        self._kept = kept.notes["parts"]
        return kept.notes["batches"][self._scan.workers.rank], sums

    def keep(self, done: int, sums: Callable[[], Tensors]) -> None:
        """Keep the sums after `done` batches, where a part of the pass ends there."""
        if not self._name or done * self._parts < (self._kept + 1) * self._batches:
            return
        self._kept += 1
        own = {name: tensor.cpu() for name, tensor in sums().items()}
        if self._masses:
            self._masses = [torch.cat([mass.cpu() for mass in self._masses])]  # (r, T)
            own[MASS] = self._masses[0]
        workers = self._scan.workers
        every = workers.gather((done, own))
        tensors = {f"{rank} {name}": tensor for rank, (_, part) in enumerate(every) for name, tensor in part.items()}
        self._scan.journal.keep(self._name, tensors, {"parts": self._kept, "batches": [count for count, _ in every]})
