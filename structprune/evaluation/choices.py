"""Log-likelihoods of the answers of many items, in as few and as full forward passes as they need.

Shapes: P prompt tokens, L target tokens, T = P + L, K blocks of b Monte Carlo samples.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Callable, Iterable, Sequence

import torch

from structprune.errors import UserError
from structprune.evaluation.adaptive import decided, look_schedule
from structprune.evaluation.encode import Batches
from structprune.evaluation.items import Answer, Item, MonteCarlo, Scored, check_items
from structprune.evaluation.likelihood import Rows, masked_nats
from structprune.evaluation.perturb import FORMS, Form, Perturbed, aligned_columns, draw_uniform, item_generator
from structprune.models.families import family_of
from structprune.models.modeling_structprune import DiffusionLM

__all__ = ["Answer", "Item", "MonteCarlo", "Scored", "check_items", "score_items"]
GROUP = 8  # forward passes of equal length that are prepared at once


@dataclass
class _Tally:
    """One answer on its way: per block the sum of its samples' nats and how many count."""

    answer: Answer
    item: "_Progress"
    exact: bool
    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    known: dict[bytes, float] = field(default_factory=dict)  # nats of patterns that were run

    @property
    def length(self) -> int:
        return len(self.answer.prompt) + len(self.answer.target)


@dataclass
class _Progress:
    """One item on its way."""

    item: Item
    tallies: list[_Tally] = field(default_factory=list)

    @cached_property
    def columns(self) -> tuple[list[torch.Tensor], int]:
        """Of `aligned_columns`."""
        return aligned_columns([answer.target for answer in self.item.answers])


def score_items(
    model: DiffusionLM,
    items: Sequence[Item],
    settings: MonteCarlo,
    batch: Batches,
    track: Callable[[Iterable], Iterable] = lambda items: items,
) -> list[Scored]:
    """Conditional log-likelihoods of all answers, in the order of the items.

    Answers of one exact length share forward passes (no padding), the longest first. What is found for an item
    depends on the model, the settings and the item, and not on other items, their order or the batch size, up to
    rounding.

    Args:
        batch: how much goes into a forward pass; keeps what it learned about the device's memory.
        track: wraps the iteration over groups of answers (progress); called once per round of adaptive sampling.
    Raises:
        UserError: an answer that is empty, does not fit the model's positions or holds the mask token, settings that
            the model's family has no use for, or a forward pass of one row that does not fit the device's memory.
    """
    form = FORMS[family_of(model.config).name]
    check_items(model.config, items, settings)
    states = [_Progress(item) for item in items]
    for state in states:
        for answer in state.item.answers:
            state.tallies.append(_Tally(answer, state, _exact(answer, settings, form)))
    looks, active, done = look_schedule(settings.blocks) if settings.adaptive else [settings.blocks], states, 0
    for count in looks:
        work = [tally for state in active for tally in state.tallies if not (tally.exact and done)]
        for group in track(_groups(work, (count - done) * settings.rows, batch)):
            _extend(model, group, settings, form, (done, count), batch)
        done = count
        active = [state for state in active if not _finished(state, settings)]
    return [_scored(state, settings) for state in states]


def _exact(answer: Answer, settings: MonteCarlo, form: Form) -> bool:
    """Whether one sample says it all: of one maskable token, unless Dream's noise is wanted as published."""
    as_published = settings.sampling == "published" or settings.skip_empty
    return len(answer.target) == 1 + form.hidden_last and not (form.hidden_last and as_published)


def _groups(work: list[_Tally], samples: int, batch: Batches) -> list[list[_Tally]]:
    """Answers of one exact length together, the longest first; about GROUP forward passes each."""
    groups, room = [], 0
    for tally in sorted(work, key=lambda tally: -tally.length):  # stable: answers of an item stay together
        if not groups or room <= 0 or groups[-1][0].length != tally.length:
            groups.append([])
            room = GROUP * batch.tokens
        groups[-1].append(tally)
        room -= samples * tally.length
    return groups


def _samples(tally: _Tally, settings: MonteCarlo, form: Form, blocks: tuple[int, int]) -> Perturbed:
    """The samples of the blocks from one number up to another, of the item's stream."""
    length = len(tally.answer.target)
    if tally.exact:  # the only maskable token, whose mean of CE / p is CE
        return Perturbed(torch.arange(length)[None] == 0, torch.ones(1, dtype=torch.float64))
    columns, width = tally.item.columns
    generator = item_generator(settings.seed, tally.item.item.key)
    drawn = draw_uniform(form, settings.samples, settings.rows, width, settings.sampling, generator)
    first, last = blocks
    levels, positions = (part.unflatten(0, (settings.blocks, -1))[first:last].flatten(0, 1) for part in drawn)
    own = next(index for index, each in enumerate(tally.item.tallies) if each is tally)
    return form.perturb(levels, positions[:, columns[own]])


def _extend(
    model: DiffusionLM, group: list[_Tally], settings: MonteCarlo, form: Form, blocks: tuple[int, int], batch: Batches
) -> None:
    """Add blocks to answers of one length; of equal samples of an answer one is run."""
    drawn, fresh, rows = [], [], []
    for tally in group:
        samples = _samples(tally, settings, form, blocks)
        patterns, inverse = samples.masked.unique(dim=0, return_inverse=True)  # (n, L), (N,)
        names = [bytes(pattern) for pattern in patterns.to(torch.uint8).tolist()]
        new = [i for i, name in enumerate(names) if name not in tally.known and any(name)]
        drawn.append((samples, names, inverse))
        fresh.append([names[i] for i in new])
        rows.append(_rows(tally.answer, patterns[new]))
    nats = masked_nats(model, Rows.join(rows), form.guidance(settings.cfg_scale), batch)  # (n,)
    for tally, names, found in zip(group, fresh, nats.split([len(names) for names in fresh])):
        tally.known.update(zip(names, found.tolist()))
    for tally, (samples, names, inverse) in zip(group, drawn):
        value = torch.tensor([tally.known.get(name, 0.0) for name in names], dtype=torch.float64)  # (n,)
        values = (value[inverse] * samples.weight).view(1 if tally.exact else blocks[1] - blocks[0], -1)  # (K, b)
        counted = samples.masked.any(1) | (not settings.skip_empty)  # (N,)
        tally.sums += values.sum(1).tolist()
        tally.counts += counted.view_as(values).sum(1).tolist()


def _rows(answer: Answer, patterns: torch.Tensor) -> Rows:
    """(n, L) patterns of the target -> rows of prompt and target."""
    count, prompt = len(patterns), len(answer.prompt)
    clean = torch.cat((answer.prompt, answer.target)).expand(count, -1)  # (n, T)
    masked = torch.cat((patterns.new_zeros(count, prompt), patterns), dim=1)  # (n, T)
    return Rows(clean, masked, torch.full((count,), prompt))


def _finished(state: _Progress, settings: MonteCarlo) -> bool:
    if all(tally.exact for tally in state.tallies):
        return True
    if len(state.tallies) < 2:
        return False
    seen = max(len(tally.sums) for tally in state.tallies)
    values = [
        [-total / count for total, count in zip(tally.sums, tally.counts)] * (seen if tally.exact else 1)
        for tally in state.tallies
    ]
    sizes = torch.tensor([tally.answer.size for tally in state.tallies], dtype=torch.float64)  # (A,)
    return decided(torch.tensor(values, dtype=torch.float64), sizes, settings.blocks, settings.confidence)


def _scored(state: _Progress, settings: MonteCarlo) -> Scored:
    found = [_estimate(tally) for tally in state.tallies]
    seen = max(len(tally.sums) for tally in state.tallies)
    samples = 1 if all(tally.exact for tally in state.tallies) else seen * settings.rows
    return Scored(state.item.key, tuple(mean for mean, _ in found), tuple(error for _, error in found), samples)


def _estimate(tally: _Tally) -> tuple[float, float | None]:
    """Log-likelihood and its standard error over blocks, of a ratio where blocks count differently."""
    sums = torch.tensor(tally.sums, dtype=torch.float64)  # (K,)
    counts = torch.tensor(tally.counts, dtype=torch.float64)  # (K,)
    if not counts.sum():
        key = tally.item.item.key
        raise UserError(f"item {key}: none of its {len(counts)} blocks has a mask: draw more samples or no skip_empty")
    ratio = (sums.sum() / counts.sum()).item()
    if tally.exact:
        return -ratio, 0.0
    if len(sums) < 2:
        return -ratio, None
    residual = (sums - ratio * counts) / counts.mean()  # (K,)
    return -ratio, residual.std().item() / len(sums) ** 0.5
