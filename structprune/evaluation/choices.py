"""Log-likelihoods of the answers of many items, in as few and as full forward passes as they need.

Shapes: P prompt tokens, L target tokens, T = P + L, K blocks of b Monte Carlo samples, N samples in all, S of them run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress

import torch

from structprune.errors import UserError
from structprune.evaluation.adaptive import decided, look_schedule
from structprune.evaluation.forecast import Completed, complete
from structprune.evaluation.items import Answer, Item, MonteCarlo, Scored, check_items, longest_first
from structprune.evaluation.likelihood import MaskedRows, token_nats
from structprune.evaluation.perturb import FORMS, Perturbed, aligned_columns, draw_uniform, item_generator
from structprune.models.encode import Batches
from structprune.models.families import family_of
from structprune.models.modeling_structprune import DiffusionLM

__all__ = ["Answer", "Item", "MonteCarlo", "Scored", "check_items", "longest_first", "score_items"]
GROUP = 8  # forward passes of equal length that are prepared at once


@dataclass
class _AnswerState:
    """The samples of one answer so far, run in the order of `nats`."""

    answer: Answer
    item: "_ItemState"
    exact: bool  # whether one sample is the exact log-likelihood
    by_mask: dict[bytes, torch.Tensor] = field(default_factory=dict)  # mask -> (L,) float64 nats of it
    nats: list[torch.Tensor] = field(default_factory=list)  # (n, L) each
    count: int = 0  # samples that were run, once it is closed
    estimate: tuple[float, float | None] | None = None  # log-likelihood and standard error, once it is closed

    @property
    def samples(self) -> int:
        return sum(map(len, self.nats))

    @property
    def length(self) -> int:
        return len(self.answer.prompt) + len(self.answer.target)


@dataclass
class _ItemState:
    """The answers of one item."""

    item: Item
    answers: list[_AnswerState] = field(default_factory=list)

    @cached_property
    def columns(self) -> tuple[list[torch.Tensor], int]:
        """What `aligned_columns` returns for its targets."""
        return aligned_columns([answer.target for answer in self.item.answers])

    def scored(self) -> Scored:
        estimates = [answer.estimate for answer in self.answers if answer.estimate is not None]
        values, errors = zip(*estimates, strict=True)
        return Scored(self.item.key, values, errors, max(answer.count for answer in self.answers))


def score_items(
    model: DiffusionLM,
    items: Sequence[Item],
    settings: MonteCarlo,
    batch: Batches,
) -> list[Scored]:
    """Conditional log-likelihoods of all answers, in the order of the items.

    Answers of equal length share forward passes (no padding), the longest first. The result of an item depends on the
    model, the settings and the item, and not on other items, their order or the batch size, up to rounding.

    Args:
        batch: tokens in a forward pass; keeps what it learns about the device's memory.
    Raises:
        UserError: an answer that is empty, does not fit the model's positions or holds the mask token, settings that
            have no effect for the model's family, or a forward pass of one row that does not fit the device's memory.
    """
    check_items(model.config, items, settings)
    scorer = _Scorer(model, settings, batch)
    states = [scorer.begin(item) for item in items]
    looks = look_schedule(settings.blocks, settings.rows) if settings.adaptive else [settings.blocks]
    active, done = states, 0
    for count in looks:
        work = [answer for state in active for answer in state.answers if not (answer.exact and done)]
        for group in scorer.groups(work, (count - done) * settings.rows):
            scorer.extend(group, (done, count))
            if count == settings.blocks:
                scorer.close(group)  # at once, because the nats of tokens take memory
        done = count
        if done < settings.blocks:
            finished = [scorer.is_decided(state) for state in active]
            scorer.close([answer for state in compress(active, finished) for answer in state.answers])
            active = [state for state, ends in zip(active, finished, strict=True) if not ends]
    scorer.close([answer for state in states for answer in state.answers if answer.estimate is None])
    return [state.scored() for state in states]


class _Scorer:
    """The steps of `score_items` for one model and its settings."""

    def __init__(self, model: DiffusionLM, settings: MonteCarlo, batch: Batches):
        self._model, self._settings, self._batch = model, settings, batch
        self._form = FORMS[family_of(model.config).likelihood]

    def begin(self, item: Item) -> _ItemState:
        """An item without samples."""
        state = _ItemState(item)
        state.answers = [_AnswerState(answer, state, self._is_exact(answer)) for answer in item.answers]
        return state

    def _is_exact(self, answer: Answer) -> bool:
        """Whether one sample is enough: there is one maskable token, and Dream's noise is not as published."""
        as_published = self._settings.sampling == "published" or self._settings.skip_empty
        hidden_last = self._form.hidden_last
        return len(answer.target) == 1 + hidden_last and not (hidden_last and as_published)

    def groups(self, work: list[_AnswerState], samples: int) -> list[list[_AnswerState]]:
        """Answers of equal length together, the longest first; about GROUP forward passes each."""
        groups: list[list[_AnswerState]] = []
        room = 0
        for answer in sorted(work, key=lambda answer: -answer.length):  # stable: answers of an item stay together
            if not groups or room <= 0 or groups[-1][0].length != answer.length:
                groups.append([])
                room = GROUP * self._batch.tokens
            groups[-1].append(answer)
            room -= samples * answer.length
        return groups

    def _samples(self, answer: _AnswerState) -> Perturbed:
        """All samples of the item's stream."""
        settings, length = self._settings, len(answer.answer.target)
        if answer.exact:  # the only maskable token, whose mean of CE / p is CE
            return Perturbed(torch.arange(length)[None] == 0, torch.ones(1, dtype=torch.float64))
        columns, width = answer.item.columns
        generator = item_generator(settings.seed, answer.item.item.key)
        count = (settings.samples, settings.rows)
        levels, positions = draw_uniform(self._form, *count, width, settings.sampling, generator)
        index = next(index for index, each in enumerate(answer.item.answers) if each is answer)
        return self._form.perturb(levels, positions[:, columns[index]])

    def extend(self, group: list[_AnswerState], blocks: tuple[int, int]) -> None:
        """Add blocks to answers of one length; of an answer's equal masks one is run."""
        orders, runs, rows = [], [], []  # of every answer: the masks of its samples, those to run, and their rows
        start, stop = (block * self._settings.rows for block in blocks)
        for answer in group:
            masks, inverse = self._samples(answer).masked[start:stop].unique(dim=0, return_inverse=True)
            names = [bytes(mask) for mask in masks.to(torch.uint8).tolist()]  # (n, L), (N,)
            empty = [name for name in names if not any(name)]  # Dream may mask nothing: no loss
            answer.by_mask.update({name: torch.zeros(len(name), dtype=torch.float64) for name in empty})
            new = [index for index, name in enumerate(names) if name not in answer.by_mask]
            orders.append([names[index] for index in inverse.tolist()])
            runs.append([names[index] for index in new])
            rows.append(_masked_rows(answer.answer, masks[new]))
        scale = self._form.guidance(self._settings.cfg_scale)
        nats = token_nats(self._model, MaskedRows.join(rows), scale, self._batch)  # (n, T)
        parts = nats.split([len(names) for names in runs])
        for answer, names, order, part in zip(group, runs, orders, parts, strict=True):
            own = part[:, len(answer.answer.prompt) :].clone()  # (n, L), which does not keep the whole group's
            answer.by_mask.update(zip(names, own, strict=True))  # (L,) each
            answer.nats.append(torch.stack([answer.by_mask[name] for name in order]))  # (N, L)

    def is_decided(self, state: _ItemState) -> bool:
        """Whether an item needs no further samples."""
        if all(answer.exact for answer in state.answers):
            return True
        if len(state.answers) < 2:
            return False
        run = max(answer.samples for answer in state.answers)
        sizes = torch.tensor([answer.answer.size for answer in state.answers], dtype=torch.float64)  # (A,)
        return decided([self._completed(answer, run) for answer in state.answers], sizes, self._settings.confidence)

    def _completed(self, answer: _AnswerState, run: int) -> Completed:
        """An answer's samples with forecasts of those that were not run; an exact answer has the same in each."""
        nats = torch.cat(answer.nats)  # (S, L)
        if answer.exact:
            values = nats.sum().expand(self._settings.samples)  # (N,)
            none = torch.zeros(run, dtype=torch.float64)  # (S,)
            return Completed(values, torch.zeros_like(values).long(), none, none, none.bool())
        samples = self._samples(answer)
        return complete(samples.masked, samples.weight, nats, run)

    def close(self, answers: list[_AnswerState]) -> None:
        """Estimate answers that get no further samples, and drop the nats of their tokens."""
        for answer in answers:
            answer.estimate = self._estimate(answer)
            answer.count, answer.by_mask, answer.nats = answer.samples, {}, []

    def _estimate(self, answer: _AnswerState) -> tuple[float, float | None]:
        """Log-likelihood and its standard error over blocks, of a ratio where blocks count differently.

        Of an answer that stopped early, the mean is that of all samples, run and forecast. The error combines that of
        as many blocks in full and that of the forecasts.
        """
        settings, nats = self._settings, torch.cat(answer.nats)  # (S, L)
        if answer.exact:
            return -nats.sum().item(), 0.0
        samples = self._samples(answer)
        values = nats.sum(1) * samples.weight[: len(nats)]  # (S,)
        counted = samples.masked[: len(nats)].any(1) | (not settings.skip_empty)  # (S,)
        sums, counts = (part.double().unflatten(0, (-1, settings.rows)).sum(1) for part in (values, counted))  # (K,)
        if not counts.sum():
            raise UserError(
                f"item {answer.item.item.key}: none of its {len(counts)} blocks has a mask: raise samples, or leave"
                " skip_empty out"
            )
        ratio = sums.sum() / counts.sum()
        error = None
        if len(sums) > 1:
            error = ((sums - ratio * counts) / counts.mean()).std().item() / settings.blocks**0.5
        if error is None or len(nats) == settings.samples:
            return -ratio.item(), error
        completed = complete(samples.masked, samples.weight, nats, len(nats))
        return -completed.values.mean().item(), math.hypot(error, completed.error())


def _masked_rows(answer: Answer, masks: torch.Tensor) -> MaskedRows:
    """(n, L) masks of the target -> rows of prompt and target."""
    count, prompt = len(masks), len(answer.prompt)
    clean = torch.cat((answer.prompt, answer.target)).expand(count, -1)  # (n, T)
    masked = torch.cat((masks.new_zeros(count, prompt), masks), dim=1)  # (n, T)
    return MaskedRows(clean, masked, torch.full((count,), prompt))
