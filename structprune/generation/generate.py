"""Generation by iterative denoising, one code path for LLaDA's and Dream's samplers (docs/methods.md section 6).

Papers: LLaDA arXiv 2502.09992, Dream arXiv 2508.15487. Shapes: N prompts, B rows of a batch, P prompt columns (left
padded), G generated positions, T = P + G, M predicted positions, C features, V vocabulary.
"""

from dataclasses import dataclass
from typing import Callable, Iterable, Sequence

import torch

from structprune.errors import UserError
from structprune.generation.cached import KeyValueCache, check_cache
from structprune.generation.samplers import Generation, sampler_of
from structprune.generation.sampling import guided, gumbel_choice
from structprune.models.encode import encode_at
from structprune.models.families import family_of
from structprune.models.logits import LOGIT_BYTES
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device


@dataclass(frozen=True)
class Step:
    """What the model is given in one denoising step, for whoever records it.

    Attributes:
        index: 0..steps-1; steps that reveal nothing in any row are left out.
        prompts: (B,) int64 on CPU, which prompts the rows belong to; rows that reveal nothing are left out.
        ids: (B, T) int64, prompt and generated part with the masks that are left.
        attention_mask: (B, T) bool, false at padding; None where no row is padded.
    """

    index: int
    prompts: torch.Tensor
    ids: torch.Tensor
    attention_mask: torch.Tensor | None


@torch.no_grad()
def generate(
    model: DiffusionLM,
    prompts: Sequence[torch.Tensor] | torch.Tensor,
    settings: Generation,
    attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    batch: int = 8,
    eos_id: int | Sequence[int] | None = None,
    track: Callable[[Iterable], Iterable] = lambda items: items,
    record: Callable[[Step], None] | None = None,
    cache: str = "none",
    refresh: int | None = None,
) -> list[torch.Tensor] | torch.Tensor:
    """Generate `settings.gen_length` tokens after every prompt.

    Prompts of like length share a batch, left-padded under an attention mask. The LM head runs only at positions that
    may be revealed. Every prompt has its own stream of noise, seeded from `generator`, so that which tokens are drawn
    depends neither on the batch size nor on the other prompts (up to the rounding of logits); it differs between CPU
    and CUDA. Positions of equal score are revealed from left to right. A model that predicts the mask token leaves
    masks in the output, as in the published samplers.

    Args:
        prompts: N tensors (P,) int64; or (N, P) left-padded, with `attention_mask`.
        attention_mask: (N, P), 1 at real tokens; for a tensor of prompts only, and not needed where nothing is padded.
        generator: seeds the noise; default torch's global one. Greedy settings draw nothing.
        batch: prompts in a forward pass (guidance doubles its rows).
        eos_id: for `stop_at_eos`, one id or several, of which the first fills; default the config's eos_token_id.
        track: wraps the iteration over steps (progress).
        record: called before every forward pass.
        cache: `none`; `prefix` or `dual` keep keys and values while a block is denoised (`cached`): faster, and
            approximate.
        refresh: steps after which a cache is made anew within a block; default never.
    Returns:
        int64 on CPU, prompt and generated tokens: N tensors (P + G,), or (N, P + G) as the prompts came.
    Raises:
        UserError: settings of another family, an empty prompt, one with a mask token in it or too long for the model,
            or a cache that there is not.
    """
    rows = _unpadded(prompts, attention_mask)
    _check(model, rows, settings, cache, refresh)
    stop = _stop_ids(model, settings, eos_id)
    seeds = _seeds(len(rows), generator) if settings.draws else None
    keep = None if cache == "none" else lambda: KeyValueCache(model, cache, refresh)
    begin = lambda chosen: _Denoiser(model, settings, chosen, rows, seeds, stop, record, keep and keep())  # noqa: E731
    tails = _tails(begin, rows, settings, batch, track)  # (N, G)
    if isinstance(prompts, torch.Tensor):
        return torch.cat((prompts.cpu(), tails), dim=1)
    return [torch.cat(pair) for pair in zip(rows, tails)]


def _tails(begin: Callable, rows: list[torch.Tensor], settings: Generation, batch: int, track: Callable):
    """What follows every prompt, (N, G) on CPU; `begin` makes the denoiser of some prompts, by their indices."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # longest first: what does not fit shows early
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    tails = torch.empty(len(rows), settings.gen_length, dtype=torch.long)  # (N, G)
    for chosen, step in track([(chosen, step) for chosen in batches for step in range(settings.steps)]):
        if step == 0:
            state = begin(chosen)
        state.advance(step)
        if step == settings.steps - 1:
            tails[chosen] = state.generated.cpu()
    return tails


def _seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """One seed per prompt, in the order of the prompts."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def _unpadded(prompts: Sequence[torch.Tensor] | torch.Tensor, attention_mask) -> list[torch.Tensor]:
    """The real tokens of every prompt, N x (P,) on CPU.

    Raises:
        ValueError: a mask beside a list or of another shape, or padding that is not at the left.
    """
    if not isinstance(prompts, torch.Tensor):
        if attention_mask is not None:
            raise ValueError("a list of prompts is not padded: give no attention_mask, or one tensor of prompts")
        return [prompt.cpu() for prompt in prompts]
    if attention_mask is None:
        return list(prompts.cpu())
    real = attention_mask.cpu().bool()  # (N, P)
    if real.shape != prompts.shape or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError(f"attention_mask {tuple(real.shape)} must mark left padding of {tuple(prompts.shape)} prompts")
    return [prompt[row] for prompt, row in zip(prompts.cpu(), real)]


def _check(
    model: DiffusionLM, prompts: list[torch.Tensor], settings: Generation, cache: str, refresh: int | None
) -> None:
    check_cache(cache, settings)
    if refresh is not None and (cache == "none" or refresh < 1):
        raise ValueError(f"refresh = {refresh} with cache '{cache}': give a number from 1, and a cache")
    family, mask_id = family_of(model.config), model.config.mask_token_id
    sampler = sampler_of(model.config)
    if type(settings) is not sampler:
        name = type(settings).__name__
        raise UserError(f"{name} is not for a model of family {family.name}: use {sampler.__name__}")
    longest = getattr(model.config, family.keys["positions"])
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {index} is empty: give it at least one token, such as BOS")
        if (prompt == mask_id).any():
            raise UserError(f"prompt {index} holds the mask token {mask_id}: remove it")
        if len(prompt) + settings.gen_length > longest:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens and gen_length = {settings.gen_length} more do not fit the "
                f"model's {longest}: shorten the prompt, or lower gen_length"
            )


def _stop_ids(model: DiffusionLM, settings: Generation, eos_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The EOS ids that end a row, none where rows are never ended."""
    if not settings.stop_at_eos:
        if eos_id is not None:
            raise ValueError("eos_id is for stop_at_eos, which is off")
        return ()
    eos_id = getattr(model.config, "eos_token_id", None) if eos_id is None else eos_id
    if eos_id is None:
        raise UserError("stop_at_eos needs an EOS token, and the model's config.json has no eos_token_id: name one")
    return (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)


class _Noise:
    """Uniform numbers in fp64 from one stream per row."""

    def __init__(self, seeds: list[int], device: torch.device):
        self.device = device
        self.streams = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw(self, row: int, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.streams[row], dtype=torch.float64, device=self.device)

    def positions(self, eligible: torch.Tensor) -> torch.Tensor:
        """One number per eligible position, 0 elsewhere: (B, G) bool -> (B, G)."""
        noise = torch.zeros(eligible.shape, dtype=torch.float64, device=self.device)  # (B, G)
        for row, count in enumerate(eligible.sum(1).tolist()):
            if count:
                noise[row, eligible[row]] = self.draw(row, count)
        return noise


def _portions(counts: list[int], limit: int) -> list[list[tuple[int, int]]]:
    """Cut rows of `counts` positions into portions of (row, positions), at most `limit` positions each, in order.

    A row longer than `limit` is cut at multiples of it, whatever stands before, so that its noise does not depend on
    the other rows.
    """
    portions, room = [], 0
    for row, count in enumerate(counts):
        for start in range(0, count, limit):
            size = min(limit, count - start)
            if size > room:
                portions.append([])
                room = limit
            portions[-1].append((row, size))
            room -= size
    return portions


class _Denoiser:
    """One batch on its way from all masks to text; `generated` (B, G) is its state."""

    def __init__(self, model, settings: Generation, chosen: list[int], prompts, seeds, stop, record, cache):
        self.model, self.settings, self.stop, self.record, self.cache = model, settings, stop, record, cache
        self.device, self.mask_id = compute_device(model), model.config.mask_token_id
        self.chosen = torch.tensor(chosen)  # (B,)
        self.width = max(len(prompts[row]) for row in chosen)
        prompt = torch.full((len(chosen), self.width), int(self.mask_id == 0))  # (B, P) any token but the mask
        real = torch.ones(len(chosen), self.width + settings.gen_length, dtype=torch.bool)  # (B, T)
        for index, row in enumerate(chosen):
            padding = self.width - len(prompts[row])
            prompt[index, padding:] = prompts[row]
            real[index, :padding] = False
        self.padded, self.real, self.prompt = not real.all(), real.to(self.device), prompt.to(self.device)
        self.generated = torch.full((len(chosen), settings.gen_length), self.mask_id, device=self.device)  # (B, G)
        self.noise = None if seeds is None else _Noise([seeds[row] for row in chosen], self.device)

    def advance(self, step: int) -> None:
        """One denoising step."""
        length, steps = (total // self.settings.blocks for total in (self.generated.shape[1], self.settings.steps))
        block, within = divmod(step, steps)
        start, end = block * length, (block + 1) * length
        self.block = slice(self.width + start, self.width + end)  # among the T
        masked = self.generated == self.mask_id  # (B, G)
        if within == 0:
            self.began = masked[:, start:end].sum(1)  # (B,)
        masked[:, end:] = False
        counts = self.settings.counts(step, self.began, masked.sum(1))  # (B,)
        self._reveal(step, masked & (counts > 0)[:, None], counts)
        if self.stop and within == steps - 1:
            ends = torch.isin(self.generated[:, start:end], torch.tensor(self.stop, device=self.device)).any(1)  # (B,)
            self.generated[:, end:].masked_fill_(ends[:, None], self.stop[0])  # no masks left: never run again

    def _reveal(self, step: int, eligible: torch.Tensor, counts: torch.Tensor) -> None:
        """Predict eligible positions (B, G) and keep some of the predictions."""
        settings = self.settings
        uniform = self.noise.positions(eligible) if settings.draws_positions else None  # (B, G)
        if settings.blind:
            eligible = settings.reveal(step, settings.scores(None, uniform), eligible, counts)  # (B, G)
        if not eligible.any():
            return
        tokens, confidence = self._predict(step, eligible)  # 2 x (M,)
        chosen = eligible
        if not settings.blind:
            scores = torch.zeros(eligible.shape, device=self.device, dtype=confidence.dtype)  # (B, G)
            scores[eligible] = confidence
            chosen = settings.reveal(step, settings.scores(scores, uniform), eligible, counts)  # (B, G)
        self.generated[chosen] = tokens[chosen[eligible]]

    def _predict(self, step: int, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and, unless blind, confidence at the wanted positions, row by row: (B, G) bool -> (M,), (M,)."""
        settings, head = self.settings, self.model.output_head
        states = self._states(step, wanted)  # (1 or 2, M, C)
        limit = max(1, LOGIT_BYTES // (4 * head.weight.shape[0]))
        tokens, confidence, start = [], [], 0
        for portion in _portions(wanted.sum(1).tolist(), limit):
            part = slice(start, start + sum(size for _, size in portion))
            logits = head(states[0, part]).float()  # (m, V)
            if settings.cfg_scale:
                logits = guided(logits, head(states[1, part]).float(), settings.cfg_scale)  # (m, V)
            logits = settings.shaped(logits)  # (m, V)
            uniform = None
            if settings.draw_temperature:
                uniform = torch.cat([self.noise.draw(row, size, logits.shape[1]) for row, size in portion])  # (m, V)
            tokens.append(gumbel_choice(logits, settings.draw_temperature, uniform))
            if not settings.blind:
                confidence.append(settings.confidence(logits, tokens[-1]))
            start = part.stop
        return torch.cat(tokens), torch.cat(confidence) if confidence else None

    def _states(self, step: int, wanted: torch.Tensor) -> torch.Tensor:
        """Hidden states that predict the wanted positions, with the prompt and (guidance) without: (1 or 2, M, C)."""
        running = wanted.any(1)  # (B,)
        prompt, generated = self.prompt[running], self.generated[running]
        ids = torch.cat((prompt, generated), dim=1)  # (b, T)
        real = self.real[running] if self.padded else None  # (b, T)
        if self.record is not None:
            self.record(Step(step, self.chosen[running.cpu()], ids.clone(), real))
        branches = 2 if self.settings.cfg_scale else 1
        if branches == 2:
            bare = torch.cat((torch.full_like(prompt, self.mask_id), generated), dim=1)  # (b, T)
            ids = torch.cat((ids, bare))  # (2b, T)
        known = torch.zeros_like(prompt, dtype=torch.bool)  # (b, P)
        wanted = torch.cat((known, wanted[running]), dim=1).repeat(branches, 1)  # (1 or 2 x b, T)
        real = real if real is None else real.repeat(branches, 1)  # (1 or 2 x b, T)
        if self.cache is None:
            states = encode_at(self.model, ids, wanted, real)
        else:
            names = running.repeat(branches).nonzero().flatten().tolist()  # 1 or 2 x b
            states = self.cache.encode(ids, wanted, real, names, self.block)
        return states.unflatten(0, (branches, -1))  # (1 or 2, M, C)
