"""Generation by iterative denoising, one code path for all samplers (docs/methods.md section 6).

Papers: LLaDA arXiv 2502.09992, Dream arXiv 2508.15487. Shapes: N prompts, P prompt tokens, G generated positions.
"""

from collections.abc import Sequence
from typing import Any

import torch

from structprune.errors import UserError
from structprune.generation.cached import check_cache
from structprune.generation.denoise import Denoiser, Options, Request, Step
from structprune.generation.samplers import Generation, sampler_of
from structprune.models.families import family_of
from structprune.models.modeling_structprune import DiffusionLM

__all__ = ["Options", "Step", "generate"]
DEFAULTS = Options()


@torch.no_grad()
def generate(
    model: DiffusionLM,
    prompts: Sequence[torch.Tensor] | torch.Tensor,
    settings: Generation,
    attention_mask: torch.Tensor | None = None,
    options: Options = DEFAULTS,
) -> list[torch.Tensor] | torch.Tensor:
    """Generate `settings.gen_length` tokens after every prompt.

    Prompts of similar length share a batch, left-padded under an attention mask. The LM head runs only at positions
    that may be revealed. Every prompt has its own stream of noise, so that the tokens drawn depend neither on the batch
    size nor on the other prompts (up to the rounding of logits); they differ between CPU and CUDA. Positions of equal
    score are revealed from left to right. A model that predicts the mask token leaves masks in the output, as in the
    published samplers.

    Args:
        prompts: N tensors (P,) int64; or (N, P) left-padded, with `attention_mask`.
        attention_mask: (N, P), 1 at real tokens; for a tensor of prompts only, and not needed without padding.
    Returns:
        int64 on CPU, prompt and generated tokens: N tensors (P + G,), or (N, P + G) where the prompts are a tensor.
    Raises:
        UserError: settings of another sampler, an empty prompt, one with a mask token in it or too long for the model,
            or an unknown cache.
    """
    unpadded = _unpadded(prompts, attention_mask)
    check_request(model.config, unpadded, settings, options)
    stop, seeds = _stop_ids(model, settings, options.eos_id), []
    if settings.draws:
        device = torch.device("cpu") if options.generator is None else options.generator.device
        seeds = torch.randint(2**62, (len(unpadded),), generator=options.generator, device=device).tolist()
    tails = _tails(Request(model, settings, unpadded, seeds, stop, options))  # (N, G)
    if isinstance(prompts, torch.Tensor):
        return torch.cat((prompts.cpu(), tails), dim=1)
    return [torch.cat(pair) for pair in zip(unpadded, tails, strict=True)]


def _tails(request: Request) -> torch.Tensor:
    """The generated tokens of every prompt, (N, G) on CPU."""
    prompts, settings, batch = request.prompts, request.settings, request.options.batch
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))  # longest first: memory runs out early
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    tails = torch.empty(len(prompts), settings.gen_length, dtype=torch.long)  # (N, G)
    counts = [settings.step_count([len(prompts[row]) for row in rows]) for rows in batches]
    works = [(rows, step, count) for rows, count in zip(batches, counts) for step in range(count)]
    for rows, step, count in request.options.track(works):
        if step == 0:
            denoiser = Denoiser(request, rows)
        denoiser.advance(step)
        if step == count - 1:
            tails[rows] = denoiser.tails().cpu()
    return tails


def _unpadded(
    prompts: Sequence[torch.Tensor] | torch.Tensor, attention_mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """The real tokens of every prompt, N x (P,) on CPU.

    Raises:
        ValueError: a mask for a list, a mask of another shape, or padding that is not on the left.
    """
    rows = [prompt.cpu() for prompt in prompts]  # N x (P,)
    if attention_mask is None:
        return rows
    if not isinstance(prompts, torch.Tensor):
        raise ValueError("a list of prompts is not padded: give no attention_mask, or one tensor of prompts")
    real = attention_mask.cpu().bool()  # (N, P)
    if real.shape != prompts.shape or (real[:, :-1] & ~real[:, 1:]).any():
        raise ValueError(f"attention_mask {tuple(real.shape)} must mark left padding of {tuple(prompts.shape)} prompts")
    return [prompt[row] for prompt, row in zip(rows, real, strict=True)]


def check_request(config: Any, prompts: Sequence[torch.Tensor], settings: Generation, options: Options) -> None:
    """Raise the errors of `generate` for a model with this config: before any weight is read."""
    cache, refresh = options.cache, options.refresh
    check_cache(cache, settings)
    if refresh is not None and (cache == "none" or refresh < 1):
        raise ValueError(f"refresh = {refresh} with cache '{cache}': give a number from 1, and a cache")
    family, mask_id = family_of(config), config.mask_token_id
    sampler = sampler_of(config)
    if type(settings) is not sampler:
        name = type(settings).__name__
        raise UserError(f"{name} is not for a model of family {family.name}: use {sampler.__name__}")
    for option, key in settings.of_config.items():
        if getattr(settings, option) != getattr(config, key):
            given = f"{option} = {getattr(settings, option)}"
            raise UserError(f"{given} is not the model's own, {getattr(config, key)}: leave it out")
    longest = getattr(config, family.keys["positions"])
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {index} is empty: give it some text, or at least one token")
        if (prompt == mask_id).any():
            raise UserError(f"prompt {index} holds the mask token {mask_id}: remove it")
        if settings.reach(len(prompt)) > longest:
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
