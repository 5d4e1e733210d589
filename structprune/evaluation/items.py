"""Items, settings and results of conditional log-likelihoods, and their checks.

Shapes: P prompt tokens, L target tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from structprune.errors import UserError
from structprune.evaluation.perturb import FORMS, Form, Sampling
from structprune.generation.checks import check_not_negative, check_one_of, check_whole
from structprune.models.families import family_of


@dataclass(frozen=True)
class Answer:
    """One continuation of a prompt."""

    prompt: torch.Tensor  # (P,) int64; may be empty
    target: torch.Tensor  # (L,) int64, the tokens to score; should end with EOS where the last is never masked
    size: int  # divisor of the log-likelihood for the normalised choice (acc_norm), usually its characters


@dataclass(frozen=True)
class Item:
    """A question with its answers, or one text to score; `key` is unique in its task and seeds the noise."""

    key: str
    answers: tuple[Answer, ...]


def longest_first(items: Sequence[Item]) -> list[int]:
    """Indices of items, those of similar length together so that forward passes are full, and the longest first."""
    longest = [max(len(each.prompt) + len(each.target) for each in item.answers) for item in items]
    return sorted(range(len(items)), key=lambda index: -longest[index])


@dataclass(frozen=True)
class MonteCarlo:
    """How log-likelihoods are estimated.

    Raises:
        UserError: a value that cannot be used.
    """

    samples: int = 128
    """Perturbations of an answer (mc_num); an answer with one maskable token needs one."""
    block: int = 8
    """Samples that share one draw of LLaDA's k (the published batch size), and between tests of `adaptive`."""
    cfg_scale: float = 0.0
    """w of classifier-free guidance: LLaDA u + (1 + w)(c - u), 0 is off; Dream u + w(c - u), 0 and 1 are off."""
    seed: int = 0
    """Seed of the noise; with an item's key it determines all its samples."""
    sampling: Sampling = "stratified"
    """"published": independent levels of noise; "stratified": the same distribution, spread evenly."""
    adaptive: bool = False
    """Stop sampling an item once its choice among several answers is decided; the other samples are forecast."""
    confidence: float = 0.99
    """Probability that `adaptive` makes the choices of all samples, raw and normalised."""
    skip_empty: bool = False
    """Dream as in the sink-aware release: leave samples without a mask out of the mean, which biases it."""

    def __post_init__(self):
        check_whole(samples=self.samples, block=self.block)
        if self.samples % self.rows:
            raise UserError(f"samples = {self.samples} is not a multiple of block = {self.block}: change either")
        check_not_negative(cfg_scale=self.cfg_scale)
        if not 0 < self.confidence < 1:
            raise UserError(f"confidence = {self.confidence} is not between 0 and 1: give a number such as 0.99")
        check_one_of("sampling", self.sampling, get_args(Sampling))
        if self.skip_empty and self.adaptive:
            raise UserError("skip_empty reproduces published numbers, which adaptive sampling does not: drop either")

    @property
    def rows(self) -> int:
        """Samples of a block, at most all of them."""
        return min(self.block, self.samples)

    @property
    def blocks(self) -> int:
        return self.samples // self.rows


@dataclass(frozen=True)
class Scored:
    """The log-likelihoods of an item, in nats per answer, summed over its target.

    Errors are standard errors over blocks, including that of forecasts where the item stopped early; 0 where the value
    is exact, None with a single block.
    """

    key: str
    log_likelihoods: tuple[float, ...]
    errors: tuple[float | None, ...]
    samples: int  # run per answer


def check_items(config, items: Iterable[Item], settings: MonteCarlo) -> None:
    """Raise the errors of `score_items` that the model's configuration is enough for: before any weight is read."""
    family = family_of(config)
    form = FORMS[family.likelihood]
    _check_settings(settings, form)
    for item in items:
        _check_item(item, form, config.mask_token_id, getattr(config, family.keys["positions"]))


def _check_settings(settings: MonteCarlo, form: Form) -> None:
    if form.hidden_last and 0 < settings.cfg_scale < 1:
        remedy = "give 0 or 1 (off), or more than 1"
        raise UserError(
            f"cfg_scale = {settings.cfg_scale} has no effect where guidance starts above 1, as for Dream: {remedy}"
        )
    if settings.skip_empty and not form.hidden_last:
        raise UserError("skip_empty has no effect where every sample has a mask, as for LLaDA: drop it")


def _check_item(item: Item, form: Form, mask_id: int, longest: int) -> None:
    if not item.answers:
        raise UserError(f"item {item.key} has no answer: give it at least one")
    for index, answer in enumerate(item.answers):
        name = f"item {item.key}, answer {index}"
        length = len(answer.prompt) + len(answer.target)
        if len(answer.target) < 1 + form.hidden_last:
            remedy = "the last one is never masked, so end it with EOS" if form.hidden_last else "give it a token"
            raise UserError(f"{name} has {len(answer.target)} tokens to score: {remedy}")
        if length > longest:
            remedy = "shorten the prompt or leave the item out"
            raise UserError(f"{name} has {length} tokens with its prompt and the model {longest} positions: {remedy}")
        if (answer.prompt == mask_id).any() or (answer.target == mask_id).any():
            raise UserError(f"{name} holds the mask token {mask_id}: remove it")
        if answer.size < 1:
            raise UserError(f"{name} has size {answer.size}, by which its choice is divided: give 1 or more")
