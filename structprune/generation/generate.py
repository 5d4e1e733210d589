"""Generation by iterative denoising, one code path for all samplers (docs/methods.md section 6).

Papers: LLaDA arXiv 2502.09992, Dream arXiv 2508.15487. Shapes: N prompts, P prompt tokens, G generated positions.
"""

from collections.abc import Callable, Iterable, Sequence

import torch

from structprune.errors import UserError
from structprune.generation.cached import check_cache
from structprune.generation.denoise import Denoiser, Request, Step
from structprune.generation.samplers import Generation, sampler_of
from structprune.models.families import family_of
from structprune.models.modeling_structprune import DiffusionLM


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

    Prompts of similar length share a batch, left-padded under an attention mask. The LM head runs only at positions
    that may be revealed. Every prompt has its own stream of noise, seeded from `generator`, so that the tokens drawn
    depend neither on the batch size nor on the other prompts (up to the rounding of logits); they differ between CPU
    and CUDA. Positions of equal score are revealed from left to right. A model that predicts the mask token leaves
    masks in the output, as in the published samplers.

    Args:
        prompts: N tensors (P,) int64; or (N, P) left-padded, with `attention_mask`.
        attention_mask: (N, P), 1 at real tokens; for a tensor of prompts only, and not needed without padding.
        generator: seeds the noise; default torch's global one. Greedy settings draw nothing.
        batch: prompts in a forward pass (guidance doubles its rows).
        eos_id: for `stop_at_eos`, one id or several, of which the first fills; default the config's eos_token_id.
        track: wraps the iteration over steps (progress).
        record: called before every forward pass.
        cache: `none`; `prefix` or `dual` cache keys and values while a block is denoised (`cached`): faster, and
            approximate.
        refresh: steps after which the cache is rebuilt within a block; default never.
    Returns:
        int64 on CPU, prompt and generated tokens: N tensors (P + G,), or (N, P + G) where the prompts are a tensor.
    Raises:
        UserError: settings of another sampler, an empty prompt, one with a mask token in it or too long for the model,
            or an unknown cache.
    """
    unpadded = _unpadded(prompts, attention_mask)
    _check(model, unpadded, settings, cache, refresh)
    stop = _stop_ids(model, settings, eos_id)
    seeds = _seeds(len(unpadded), generator) if settings.draws else []
    request = Request(model, settings, unpadded, seeds, stop, record, cache, refresh)
    tails = _tails(request, batch, track)  # (N, G)
    if isinstance(prompts, torch.Tensor):
        return torch.cat((prompts.cpu(), tails), dim=1)
    return [torch.cat(pair) for pair in zip(unpadded, tails, strict=True)]


def _tails(request: Request, batch: int, track: Callable[[Iterable], Iterable]) -> torch.Tensor:
    """The generated tokens of every prompt, (N, G) on CPU."""
    prompts, settings = request.prompts, request.settings
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # longest first: memory runs out early
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    tails = torch.empty(len(prompts), settings.gen_length, dtype=torch.long)  # (N, G)
    for rows, step in track([(rows, step) for rows in batches for step in range(settings.steps)]):
        if step == 0:
            denoiser = Denoiser(request, rows)
        denoiser.advance(step)
        if step == settings.steps - 1:
            tails[rows] = denoiser.generated.cpu()
    return tails


def _seeds(count: int, generator: torch.Generator | None) -> list[int]:
    """One seed per prompt, in the order of the prompts."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def _unpadded(
    prompts: Sequence[torch.Tensor] | torch.Tensor, attention_mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """The real tokens of every prompt, N x (P,) on CPU.

    Raises:
        ValueError: a mask for a list, a mask of another shape, or padding that is not on the left.
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
    return [prompt[row] for prompt, row in zip(prompts.cpu(), real, strict=True)]


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
    """The EOS ids that end a row; none where rows are never ended."""
    if not settings.stop_at_eos:
        if eos_id is not None:
            raise ValueError("eos_id has no effect without stop_at_eos")
        return ()
    eos_id = getattr(model.config, "eos_token_id", None) if eos_id is None else eos_id
    if eos_id is None:
        raise UserError("stop_at_eos needs an EOS token, and the model's config.json has no eos_token_id: give eos_id")
    return (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
