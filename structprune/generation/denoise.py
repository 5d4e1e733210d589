"""One batch on its way from all masks to text, step by step (docs/methods.md section 6).

Shapes: B rows of a batch, b of them running at a step, P prompt columns (left padded), G generated positions,
T = P + G, M predicted positions, C features, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from structprune.generation.cached import KeyValueCache
from structprune.generation.samplers import Generation
from structprune.models.encode import encode_at
from structprune.models.logits import LOGIT_BYTES
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device
from structprune.models.sampling_structprune import guided, gumbel_choice


@dataclass(frozen=True)
class Step:
    """The model's input in one denoising step, for recorders; steps and rows that reveal nothing are left out."""

    index: int  # 0..steps-1
    prompts: torch.Tensor  # (B,) int64 on CPU, indices of the rows' prompts
    ids: torch.Tensor  # (B, T) int64, prompt and generated part with the remaining masks
    attention_mask: torch.Tensor | None  # (B, T) bool, false at padding; None where no row is padded


@dataclass(frozen=True)
class Options:
    """How a generation runs, beside its sampler."""

    generator: torch.Generator | None = None
    """Seeds the noise; default torch's global one. Greedy settings draw nothing."""
    batch: int = 8
    """Prompts in a forward pass (guidance doubles its rows)."""
    eos_id: int | Sequence[int] | None = None
    """For `stop_at_eos`, one id or several, of which the first fills; default the config's eos_token_id."""
    track: Callable[[Iterable], Iterable] = lambda items: items
    """Wraps the iteration over steps (progress)."""
    record: Callable[[Step], None] | None = None
    """Called before every forward pass."""
    cache: str = "none"
    """`none`; `prefix` or `dual` cache keys and values while a block is denoised: faster, and approximate, but exact in
    block diffusion."""
    refresh: int | None = None
    """Steps after which the cache is rebuilt within a block; default never."""


@dataclass(frozen=True)
class Request:
    """What all batches of a generation share."""

    model: DiffusionLM
    settings: Generation
    prompts: Sequence[torch.Tensor]  # N x (P,) int64 on CPU, without padding
    seeds: Sequence[int]  # one per prompt; empty where nothing is random
    stop: tuple[int, ...]  # EOS ids that end a row, the first of which fills it; empty where rows are never ended
    options: Options


class _Noise:
    """Uniform numbers in fp64 from one stream per row."""

    def __init__(self, seeds: list[int], device: torch.device):
        self._device = device
        self._streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(self, row: int, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self._streams[row], dtype=torch.float64, device=self._device)

    def positions(self, eligible: torch.Tensor) -> torch.Tensor:
        """One number per eligible position, 0 elsewhere: (B, G) bool -> (B, G)."""
        noise = torch.zeros(eligible.shape, dtype=torch.float64, device=self._device)  # (B, G)
        for row, count in enumerate(eligible.sum(1).tolist()):
            if count:
                noise[row, eligible[row]] = self.draw(row, count)
        return noise


def portions(counts: list[int], limit: int) -> list[list[tuple[int, int]]]:
    """Cut rows of `counts` positions into portions of (row, positions), at most `limit` positions each, in order.

    A row longer than `limit` is cut at multiples of it, whatever stands before, so that its noise does not depend on
    the other rows.
    """
    parts: list[list[tuple[int, int]]] = []
    room = 0
    for row, count in enumerate(counts):
        for start in range(0, count, limit):
            size = min(limit, count - start)
            if size > room:
                parts.append([])
                room = limit
            parts[-1].append((row, size))
            room -= size
    return parts


class Denoiser:
    """One batch, of the prompts `rows`; `generated` (B, G) is its state."""

    def __init__(self, request: Request, rows: list[int]):
        self._request, self._model, self._settings = request, request.model, request.settings
        self._device, self._mask_id = compute_device(self._model), self._model.config.mask_token_id
        self._rows = torch.tensor(rows)  # (B,)
        whole = [request.prompts[row] for row in rows]
        started = [self._settings.started(len(prompt)) for prompt in whole]
        prompts = [prompt[: len(prompt) - count] for prompt, count in zip(whole, started)]
        length = self._settings.span(max(started))
        padding = int(self._mask_id == 0)  # any token but the mask
        self._prompt = pad_sequence(prompts, True, padding, "left").to(self._device)  # (B, P)
        self._width = self._prompt.shape[1]
        ones = [torch.ones(len(prompt) + length, dtype=torch.bool) for prompt in prompts]
        real = pad_sequence(ones, True, False, "left")  # (B, T)
        self._real = None if real.all() else real.to(self._device)
        self._noise = _Noise([request.seeds[row] for row in rows] if request.seeds else [], self._device)
        self._cache = None
        if request.options.cache != "none":
            form, refresh = request.options.cache, request.options.refresh
            self._cache = KeyValueCache(self._model, form, refresh, self._settings.sealed)
        self._started = torch.tensor(started, device=self._device)  # (B,)
        self.generated = torch.full((len(rows), length), self._mask_id, device=self._device)  # (B, G)
        for row, (prompt, count) in enumerate(zip(whole, started)):
            self.generated[row, :count] = prompt[len(prompt) - count :]

    def tails(self) -> torch.Tensor:
        """The tokens behind every prompt, (B, gen_length)."""
        places = self._started[:, None] + torch.arange(self._settings.gen_length, device=self._device)
        return self.generated.gather(1, places)

    def advance(self, step: int) -> None:
        """One denoising step."""
        length, steps = self._settings.block_tokens, self._settings.steps_of_block
        block, within = divmod(step, steps)
        start, end = block * length, (block + 1) * length
        self._block = slice(self._width + start, self._width + end)  # among the T
        if within == 0 and self._settings.begins:
            self._begin(start)
        masked = self.generated == self._mask_id  # (B, G)
        if within == 0:
            self._began = masked[:, start:end].sum(1)  # (B,)
        masked[:, end:] = False
        if self._settings.sealed:  # a mask token that the model itself wrote stays, as published
            masked[:, :start] = False
        counts = self._settings.counts(step, self._began, masked.sum(1))  # (B,)
        if self._settings.threshold is not None:
            counts = counts.clamp(min=1)  # who is ahead of the schedule would predict the same again
        self._reveal(step, masked & (counts > 0)[:, None], counts)
        if self._request.stop and within == steps - 1:
            self._end_rows(start, end)

    def _begin(self, start: int) -> None:
        """The first token of a block, predicted causally from what precedes it."""
        running = self.generated[:, start] == self._mask_id  # (B,)
        if not running.any():
            return
        place, rows = self._width + start, running.nonzero().flatten().tolist()  # b rows
        ids = torch.cat((self._prompt[running], self.generated[running, :start]), dim=1)  # (b, t)
        last = torch.zeros_like(ids, dtype=torch.bool)  # (b, t)
        last[:, -1] = True
        real = None if self._real is None else self._real[running, :place]  # (b, t)
        logits = self._model.output_head(self._encode(ids, last, real, rows, slice(place, place))).float()  # (b, V)
        temperature, uniform = self._settings.draw_temperature, None
        if temperature:
            uniform = torch.stack([self._noise.draw(row, logits.shape[1]) for row in rows])  # (b, V)
        self.generated[running, start] = gumbel_choice(logits, temperature, uniform)

    def _end_rows(self, start: int, end: int) -> None:
        """Fill what follows a block that holds an EOS: no masks remain there, so it never runs again."""
        stop = torch.tensor(self._request.stop, device=self._device)  # (E,)
        made = torch.arange(start, end, device=self._device) >= self._started[:, None]  # (B, n), not of the prompt
        ended = (torch.isin(self.generated[:, start:end], stop) & made).any(1)  # (B,)
        self.generated[:, end:].masked_fill_(ended[:, None], self._request.stop[0])

    def _reveal(self, step: int, eligible: torch.Tensor, counts: torch.Tensor) -> None:
        """Predict eligible positions (B, G) and keep some of the predictions."""
        settings = self._settings
        uniform = self._noise.positions(eligible) if settings.draws_positions else None  # (B, G)
        if settings.blind:
            eligible = settings.reveal(step, settings.scores(None, uniform), eligible, counts)  # (B, G)
        if not eligible.any():
            return
        tokens, confidence = self._predict(step, eligible)  # 2 x (M,)
        chosen = eligible
        if not settings.blind:
            assert confidence is not None
            scores = torch.zeros(eligible.shape, device=self._device, dtype=confidence.dtype)  # (B, G)
            scores[eligible] = confidence
            chosen = settings.reveal(step, settings.scores(scores, uniform), eligible, counts)  # (B, G)
            if settings.threshold is not None:
                chosen = chosen | (eligible & (scores >= settings.threshold))  # (B, G)
        self.generated[chosen] = tokens[chosen[eligible]]

    def _predict(self, step: int, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and, unless blind, confidence at the target positions, row by row: (B, G) bool -> (M,), (M,)."""
        settings, head = self._settings, self._model.output_head
        states = self._states(step, targets)  # (1 or 2, M, C)
        limit = max(1, LOGIT_BYTES // (4 * head.weight.shape[0]))
        tokens, confidence, start = [], [], 0
        for portion in portions(targets.sum(1).tolist(), limit):
            part = slice(start, start + sum(size for _, size in portion))
            logits = head(states[0, part]).float()  # (m, V)
            if settings.cfg_scale:
                logits = guided(logits, head(states[1, part]).float(), settings.cfg_scale)  # (m, V)
            logits = settings.shape_logits(logits)  # (m, V)
            uniform = None
            if settings.draw_temperature:
                uniform = torch.cat([self._noise.draw(row, size, logits.shape[1]) for row, size in portion])  # (m, V)
            tokens.append(gumbel_choice(logits, settings.draw_temperature, uniform))
            if not settings.blind:
                confidence.append(settings.confidence(logits, tokens[-1]))
            start = part.stop
        return torch.cat(tokens), torch.cat(confidence) if confidence else None

    def _states(self, step: int, targets: torch.Tensor) -> torch.Tensor:
        """Hidden states that predict the targets, with the prompt and (guidance) without: (1 or 2, M, C)."""
        running = targets.any(1)  # (B,)
        prompt, generated = self._prompt[running], self.generated[running]  # (b, P), (b, G)
        ids = torch.cat((prompt, generated), dim=1)  # (b, T)
        real = None if self._real is None else self._real[running]  # (b, T)
        if (record := self._request.options.record) is not None:
            record(Step(step, self._rows[running.cpu()], ids.clone(), real))
        branches = 2 if self._settings.cfg_scale else 1
        if branches == 2:
            bare = torch.cat((torch.full_like(prompt, self._mask_id), generated), dim=1)  # (b, T)
            ids = torch.cat((ids, bare))  # (2b, T)
        none = torch.zeros_like(prompt, dtype=torch.bool)  # (b, P)
        targets = torch.cat((none, targets[running]), dim=1).repeat(branches, 1)  # (1 or 2 x b, T)
        real = None if real is None else real.repeat(branches, 1)  # (1 or 2 x b, T)
        if self._settings.sealed:  # nothing behind the block is seen
            ids, targets = ids[:, : self._block.stop], targets[:, : self._block.stop]  # (1 or 2 x b, t) each
            real = None if real is None else real[:, : self._block.stop]  # (1 or 2 x b, t)
        names = running.repeat(branches).nonzero().flatten().tolist()  # 1 or 2 x b
        return self._encode(ids, targets, real, names, self._block).unflatten(0, (branches, -1))  # (1 or 2, M, C)

    def _encode(self, ids, targets, real, names: list[int], block: slice) -> torch.Tensor:
        """As `KeyValueCache.encode`, without a cache too."""
        if self._cache is not None:
            return self._cache.encode(ids, targets, real, names, block)
        context = self._model.open_context(ids.shape, ids.device, real, block.start)
        return encode_at(self._model, ids, targets, context=context)
