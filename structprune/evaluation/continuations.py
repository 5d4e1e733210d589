"""What generation keeps of a reference's: openings of the text, continued greedily, and what that costs under it.

Choice tasks hide a collapse of generation (docs/methods.md section 6).

Shapes: N openings of P tokens, n of a chunk, G generated tokens, S noisy copies.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from structprune.errors import UserError
from structprune.evaluation import results
from structprune.evaluation.fidelity_units import Run
from structprune.evaluation.nelbo import maskable_tokens, masked_nelbo
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.settings import EvaluationSettings
from structprune.evaluation.units import Noise, TextUnit, Unit, digest
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import low_confidence
from structprune.models.encode import Batches
from structprune.models.families import family_of
from structprune.models.modeling_structprune import DiffusionLM

OPENING, TOKENS = 32, 64  # where windows and positions are long enough


@dataclass(frozen=True)
class ContinuationUnit(Unit):
    """Openings of windows, continued greedily by the family's sampler with low-confidence remasking."""

    prompts: torch.Tensor = field(repr=False)  # (N, P) int64
    tokens: int  # G
    steps: int
    tokenizer: Any = field(repr=False)
    batch: int  # openings in a forward pass
    of: Run | None = field(default=None, repr=False)

    size = 8

    @property
    def settings(self) -> dict:
        own = {"opening": self.prompts.shape[1], "tokens": self.tokens, "steps": self.steps}
        return own | {"items": digest(*self.keys)}

    def check(self, config: Any) -> None:
        longest, opening = getattr(config, family_of(config).keys["positions"]), self.prompts.shape[1]
        if low_confidence(config, self.tokens, self.steps).reach(opening) > longest:
            raise UserError(
                f"evaluation.fidelity_tokens = {self.tokens} after openings of {opening} do not fit the model's"
                f" {longest} positions: lower it, or evaluation.fidelity_opening"
            )

    def bound(self, run: Run) -> "ContinuationUnit":
        return replace(self, of=run)

    def run(self, model: DiffusionLM, indices: Sequence[int], batch: Batches) -> list[results.Row]:
        assert self.of is not None
        settings = low_confidence(model.config, self.tokens, self.steps)
        outputs = generate(model, list(self.prompts[list(indices)]), settings, options=Options(batch=self.batch))
        theirs = {} if self.of.is_reference else self.of.reference_rows(self.task)
        rows: list[results.Row] = []
        for index, ids in zip(indices, outputs, strict=True):
            key, tokens = self.keys[index], tuple(ids[self.prompts.shape[1] :].tolist())  # (G,)
            kept = None if self.of.is_reference else _equal(tokens, _tokens(theirs, key))
            text = self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
            rows.append(results.Continuation(self.task, key, tokens, text, kept))
        return rows

    def token_ids(self) -> Iterator[torch.Tensor]:
        yield from self.prompts


@dataclass(frozen=True)
class JudgedUnit(Unit):
    """The continuations of a checkpoint under the reference: their NELBO, given the openings."""

    source: str  # task of the continuations
    prompts: torch.Tensor = field(repr=False)  # (N, P) int64
    copies: int  # S noisy ones of each
    seed: int
    noise: Noise = field(repr=False)
    of: Run | None = field(default=None, repr=False)

    size = 16
    by_reference = True

    @property
    def settings(self) -> dict:
        return {"noise": self.copies, "opening": self.prompts.shape[1], "items": digest(*self.keys)}

    def check(self, config: Any) -> None:
        """Nothing that the continuations are not checked for."""

    def bound(self, run: Run) -> "JudgedUnit":
        return replace(self, of=run)

    def run(self, model: DiffusionLM, indices: Sequence[int], batch: Batches) -> list[results.Row]:
        """Rows of the checkpoint that generated; `model` is the reference."""
        assert self.of is not None
        rows, keys = self.of.own_rows(self.source), [self.keys[index] for index in indices]
        generated = torch.tensor([_tokens(rows, key) for key in keys])  # (n, G)
        prompts = self.prompts[list(indices)]  # (n, P)
        ids = torch.cat((prompts, generated), dim=1)  # (n, P + G)
        # the same levels and positions for every checkpoint; openings stay visible
        drawn = [self.noise(ids[n : n + 1], item_generator(self.seed, key)) for n, key in enumerate(keys)]
        noisy, probability = (torch.cat(parts) for parts in zip(*drawn, strict=True))  # (n, S, P + G), (n, S)
        noisy[..., : prompts.shape[1]] = prompts[:, None]
        estimate = masked_nelbo(model, ids, noisy, probability, batch)
        # per generated token that noise can mask, not per token of the whole
        share = maskable_tokens(model, ids.shape[1]) / (generated.shape[1] - model.edges_visible)
        columns = zip(keys, estimate.nelbo.tolist(), estimate.masked_nats.tolist(), estimate.masked_tokens.tolist())
        samples = (self.copies, self.copies)
        return [results.Window(self.task, key, each * share, nats, int(n), *samples) for key, each, nats, n in columns]

    def token_ids(self) -> Iterator[torch.Tensor]:
        """Generated text was not calibrated on."""
        yield from ()


def continuation_units(text: TextUnit, settings: EvaluationSettings, tokenizer: Any, positions: int) -> list[Unit]:
    """The units of a text's openings.

    Args:
        positions: of the checkpoint that has the fewest.
    Raises:
        UserError: openings longer than a window, or more steps than tokens.
    """
    length = text.windows.shape[1]
    opening = settings.fidelity_opening or min(OPENING, length // 2)
    tokens = settings.fidelity_tokens or max(2, min(TOKENS, positions - opening))
    steps = settings.fidelity_steps or tokens
    if opening > length:
        raise UserError(f"evaluation.fidelity_opening = {opening} exceeds the {length} tokens of a window: lower it")
    if steps > tokens:
        raise UserError(f"evaluation.fidelity_steps = {steps} exceeds the {tokens} tokens to generate: lower it")
    prompts = text.windows[: settings.fidelity_prompts, :opening]  # (N, P)
    keys, task = text.keys[: len(prompts)], f"{text.task} continued"
    continued = ContinuationUnit(task, keys, prompts, tokens, steps, tokenizer, settings.prompts)
    judged = JudgedUnit(f"{task}, under the reference", keys, task, prompts, text.copies, text.seed, text.noise)
    return [continued, judged]


def _tokens(rows: Any, key: str) -> tuple[int, ...]:
    """The tokens that were generated after an opening."""
    row = rows[key]
    assert isinstance(row, results.Continuation)
    return row.tokens


def _equal(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are the same at the same place."""
    return sum(one == other for one, other in zip(ours, theirs, strict=True))
