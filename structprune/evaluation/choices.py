"""Log-likelihoods of the answers of many items, in as few and as full forward passes as they need.

Shapes: P prompt tokens, L target tokens, T = P + L, K blocks of b Monte Carlo samples.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Callable, Iterable, Sequence

import torch

from structprune.errors import UserError
from structprune.evaluation.adaptive import decided, look_schedule
from structprune.evaluation.forecast import Completed, complete
from structprune.evaluation.items import Answer, Item, MonteCarlo, Scored, check_items
from structprune.evaluation.likelihood import Rows, token_nats
from structprune.evaluation.perturb import FORMS, Form, Perturbed, aligned_columns, draw_uniform, item_generator
from structprune.models.encode import Batches
from structprune.models.families import family_of
from structprune.models.modeling_structprune import DiffusionLM

__all__ = ["Answer", "Item", "MonteCarlo", "Scored", "check_items", "score_items"]
GROUP = 8  # forward passes of equal length that are prepared at once


@dataclass
class _Tally:
    """One answer on its way: nats of the masks that were run, and of samples in their order."""

    answer: Answer
    item: "_Progress"
    exact: bool
    known: dict[bytes, torch.Tensor] = field(default_factory=dict)  # mask -> (L,) float64
    nats: list[torch.Tensor] = field(default_factory=list)  # (n, L) of the samples that were run
    drawn: int = 0
    estimate: tuple[float, float | None] | None = None  # log-likelihood and error, when there are no more to come

    def __len__(self) -> int:
        return sum(map(len, self.nats))

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
    form = FORMS[family_of(model.config).likelihood]
    check_items(model.config, items, settings)
    states = [_Progress(item) for item in items]
    for state in states:
        for answer in state.item.answers:
            state.tallies.append(_Tally(answer, state, _exact(answer, settings, form)))
    looks = look_schedule(settings.blocks, settings.rows) if settings.adaptive else [settings.blocks]
    active, done = states, 0
    for count in looks:
        work = [tally for state in active for tally in state.tallies if not (tally.exact and done)]
        for group in track(_groups(work, (count - done) * settings.rows, batch)):
            _extend(model, group, settings, form, (done, count), batch)
            if count == settings.blocks:
                _close(group, settings, form)  # at once, as what is known of tokens takes room
        done = count
        if done < settings.blocks:
            over = [_decided(state, settings, form) for state in active]
            _close([tally for state in compress(active, over) for tally in state.tallies], settings, form)
            active = [state for state, ends in zip(active, over) if not ends]
    _close([tally for state in states for tally in state.tallies if tally.estimate is None], settings, form)
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


def _samples(tally: _Tally, settings: MonteCarlo, form: Form) -> Perturbed:
    """All samples of the item's stream."""
    length = len(tally.answer.target)
    if tally.exact:  # the only maskable token, whose mean of CE / p is CE
        return Perturbed(torch.arange(length)[None] == 0, torch.ones(1, dtype=torch.float64))
    columns, width = tally.item.columns
    generator = item_generator(settings.seed, tally.item.item.key)
    levels, positions = draw_uniform(form, settings.samples, settings.rows, width, settings.sampling, generator)
    own = next(index for index, each in enumerate(tally.item.tallies) if each is tally)
    return form.perturb(levels, positions[:, columns[own]])


def _extend(
    model: DiffusionLM, group: list[_Tally], settings: MonteCarlo, form: Form, blocks: tuple[int, int], batch: Batches
) -> None:
    """Add blocks to answers of one length; of equal samples of an answer one is run."""
    wanted, fresh, rows = [], [], []
    start, stop = (block * settings.rows for block in blocks)
    for tally in group:
        patterns, inverse = _samples(tally, settings, form).masked[start:stop].unique(dim=0, return_inverse=True)
        names = [bytes(pattern) for pattern in patterns.to(torch.uint8).tolist()]  # (n, L), (N,)
        empty = [name for name in names if not any(name)]  # Dream's, of which nothing need be run
        tally.known.update({name: torch.zeros(len(name), dtype=torch.float64) for name in empty})
        new = [i for i, name in enumerate(names) if name not in tally.known]
        wanted.append([names[i] for i in inverse.tolist()])
        fresh.append([names[i] for i in new])
        rows.append(_rows(tally.answer, patterns[new]))
    nats = token_nats(model, Rows.join(rows), form.guidance(settings.cfg_scale), batch)  # (n, T)
    for tally, names, order, found in zip(group, fresh, wanted, nats.split([len(names) for names in fresh])):
        own = found[:, len(tally.answer.prompt) :].clone()  # (n, L), which does not keep the whole group's
        tally.known.update(zip(names, own))  # (L,) each
        tally.nats.append(torch.stack([tally.known[name] for name in order]))  # (N, L)


def _rows(answer: Answer, patterns: torch.Tensor) -> Rows:
    """(n, L) patterns of the target -> rows of prompt and target."""
    count, prompt = len(patterns), len(answer.prompt)
    clean = torch.cat((answer.prompt, answer.target)).expand(count, -1)  # (n, T)
    masked = torch.cat((patterns.new_zeros(count, prompt), patterns), dim=1)  # (n, T)
    return Rows(clean, masked, torch.full((count,), prompt))


def _decided(state: _Progress, settings: MonteCarlo, form: Form) -> bool:
    """Whether an item needs no more samples than it has."""
    if all(tally.exact for tally in state.tallies):
        return True
    if len(state.tallies) < 2:
        return False
    seen = max(len(tally) for tally in state.tallies)
    sizes = torch.tensor([tally.answer.size for tally in state.tallies], dtype=torch.float64)  # (A,)
    answers = [_completed(tally, settings, form, seen) for tally in state.tallies]
    return decided(answers, sizes, settings.confidence)


def _completed(tally: _Tally, settings: MonteCarlo, form: Form, seen: int) -> Completed:
    """An answer's samples with forecasts of those that were not run; an exact answer says the same in every one."""
    nats = torch.cat(tally.nats)  # (S, L)
    if tally.exact:
        values, nothing = nats.sum().expand(settings.samples), torch.zeros(seen, dtype=torch.float64)  # (N,), (S,)
        return Completed(values, torch.zeros_like(values).long(), nothing, nothing, nothing.bool())
    samples = _samples(tally, settings, form)
    return complete(samples.masked, samples.weight, nats, seen)


def _close(tallies: list[_Tally], settings: MonteCarlo, form: Form) -> None:
    """Estimate answers that get no more samples, and let go of what is known of their tokens."""
    for tally in tallies:
        tally.estimate = _estimate(tally, settings, form)
        tally.drawn, tally.known, tally.nats = len(tally), {}, []


def _estimate(tally: _Tally, settings: MonteCarlo, form: Form) -> tuple[float, float | None]:
    """Log-likelihood and its standard error: over blocks, of a ratio where they count differently.

    Of an answer that stopped early the mean is that of all samples, run and forecast, and the error is the full
    count's, of as many blocks, and that of the forecasts.
    """
    nats = torch.cat(tally.nats)  # (S, L)
    if tally.exact:
        return -nats.sum().item(), 0.0
    samples = _samples(tally, settings, form)
    values = nats.sum(1) * samples.weight[: len(nats)]  # (S,)
    counted = samples.masked[: len(nats)].any(1) | (not settings.skip_empty)  # (S,)
    sums, counts = (part.double().unflatten(0, (-1, settings.rows)).sum(1) for part in (values, counted))  # (K,) each
    if not counts.sum():
        key = tally.item.item.key
        raise UserError(
            f"item {key}: none of its {len(counts)} blocks has a mask: raise samples, or leave skip_empty out"
        )
    ratio = sums.sum() / counts.sum()
    error = ((sums - ratio * counts) / counts.mean()).std().item() / settings.blocks**0.5 if len(sums) > 1 else None
    if len(nats) == settings.samples:
        return -ratio.item(), error
    completed = complete(samples.masked, samples.weight, nats, len(nats))
    return -completed.values.mean().item(), math.hypot(error, completed.error())


def _scored(state: _Progress, settings: MonteCarlo) -> Scored:
    values, errors = zip(*(tally.estimate for tally in state.tallies))
    return Scored(state.item.key, values, errors, max(tally.drawn for tally in state.tallies))
