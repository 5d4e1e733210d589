"""Text by iterative denoising where structprune is not installed: LLaDA's `generate`, Dream's `diffusion_generate`.

This file is copied next to every checkpoint written, and needs only torch and transformers. Arguments have the names of
the published samplers (of Dream's, hooks and generation_config are left out), and greedy tokens are theirs. Prompts are
padded on the left under an attention mask. structprune itself has caches, a stream of noise for every prompt, and
batches of prompts of any length (`structprune.generate`).

Shapes: B rows, P prompt tokens, G generated ones, T = P + G, M masked positions, V vocabulary.
Papers: LLaDA arXiv 2502.09992, Dream arXiv 2508.15487, threshold: Fast-dLLM arXiv 2505.22618.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .sampling_structprune import (
    guided,
    gumbel,
    gumbel_choice,
    negative_entropy,
    reveal_counts,
    reveal_shares,
    rounded_counts,
    shared_counts,
    token_probability,
    top_k_filter,
    top_margin,
    top_p_filter,
    top_positions,
)

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def padded_mask(attention_mask, generated: int):
    """The attention mask of prompt and generated part, (B, P) -> (B, T); None of none, of "full" and where all is real.

    Raises:
        ValueError: another text than "full".
    """
    if attention_mask is None or isinstance(attention_mask, str):
        if attention_mask not in (None, "full"):
            raise ValueError(f"attention_mask = '{attention_mask}' is unknown: give a tensor (B, P), 'full' or None")
        return None
    mask = F.pad(attention_mask, (0, generated), value=1)  # (B, T)
    return None if mask.bool().all() else mask


def uniform_like(values: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), in fp64 and of that shape, from torch's generator of the device."""
    return torch.rand(values.shape, dtype=torch.float64, device=values.device)


def check_counts(longest: int, prompt: int, length: int, **counts: Any) -> None:
    """Raise ValueError for counts below 1 (None passes), or a text of more than `longest` positions."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} = {count}: give at least 1")
    if prompt + length > longest:
        raise ValueError(f"a prompt of {prompt} tokens and {length} more do not fit the model's {longest} positions")


def check_blocks(steps: int, gen_length: int, block_length: int) -> None:
    """Raise ValueError for a length that is no number of blocks, or steps that these cannot share."""
    if gen_length % block_length or steps % (gen_length // block_length):
        raise ValueError(
            f"gen_length = {gen_length} must be a multiple of block_length = {block_length}, and steps = {steps} of the"
            " number of blocks"
        )


class Sampling:
    """What both samplers share; mixed into the models."""

    def masked_logits(self: Any, ids: torch.Tensor, masked: torch.Tensor, attention_mask) -> torch.Tensor:
        """Logits that predict the masked positions, row by row: (B, T), (B, T) bool -> (M, V) fp32."""
        hidden = self.encode(ids, attention_mask)  # (B, T, C)
        if self.shifted:  # position i predicts token i + 1
            hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)  # (B, T, C)
        return self.output_head(hidden[masked]).float()  # (M, V)


class LLaDASampling(Sampling):
    """`generate` for LLaDA models."""

    step_counts = staticmethod(reveal_counts)

    @torch.no_grad()
    def generate(
        self: Any, input_ids, attention_mask=None, steps=128, gen_length=128, block_length=128, temperature=0.0,
        cfg_scale=0.0, remasking="low_confidence", mask_id=None, threshold=None,
    ):  # fmt: skip
        """Prompts with `gen_length` tokens after them, (B, P) -> (B, P + G), block by block from left to right.

        Args:
            attention_mask: (B, P), 1 at real tokens of left-padded prompts.
            steps: over all blocks. temperature: of the Gumbel-max choice; 0 takes the likeliest token.
            cfg_scale: of classifier-free guidance; 0 is off.
            remasking: which predictions stay, "low_confidence" (the surest) or "random".
            mask_id: default the config's.
            threshold: also reveal every prediction with at least this probability, and one at least.
        Raises:
            ValueError: lengths or steps that cannot be shared by blocks, another remasking, or a threshold with random.
        """
        least_one = {"steps": steps, "gen_length": gen_length, "block_length": block_length}
        check_counts(self.config.max_position_embeddings, input_ids.shape[1], gen_length, **least_one)
        check_blocks(steps, gen_length, block_length)
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold = {threshold}: give a probability above 0")
        if remasking not in ("low_confidence", "random") or (threshold is not None and remasking == "random"):
            given = f"remasking = '{remasking}' with threshold = {threshold}"
            raise ValueError(f"{given}: give low_confidence, or random without a threshold")
        mask_id = self.config.mask_token_id if mask_id is None else mask_id
        ids = F.pad(input_ids, (0, gen_length), value=mask_id)  # (B, T)
        bare = ids.masked_fill(ids != mask_id, mask_id) if cfg_scale > 0 else None  # (B, T) without the prompt
        mask, block_steps = padded_mask(attention_mask, gen_length), steps // (gen_length // block_length)
        settings = (temperature, cfg_scale, remasking, threshold)
        for end in range(input_ids.shape[1] + block_length, ids.shape[1] + 1, block_length):
            began = (ids[:, end - block_length : end] == mask_id).sum(1)  # (B,)
            for step in range(block_steps):
                masked = ids == mask_id  # (B, T)
                masked[:, end:] = False
                if not masked.any():  # a threshold was ahead of the schedule
                    break
                counts = self.step_counts(began, block_steps, step)  # (B,)
                tokens, chosen = self._choose((ids, bare), masked, mask, counts, settings)
                ids[chosen] = tokens
                if bare is not None:
                    bare[chosen] = tokens
        return ids

    def _choose(self: Any, ids, masked, mask, counts, settings) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a step, and their places (B, T) bool.

        Args:
            ids: (B, T) with the prompt, and without it for guidance. masked: (B, T) bool, where tokens may be revealed.
            counts: (B,) how many at least.
        """
        temperature, cfg_scale, remasking, threshold = settings
        logits = self.masked_logits(ids[0], masked, mask)  # (M, V)
        if cfg_scale > 0:
            logits = guided(logits, self.masked_logits(ids[1], masked, mask), cfg_scale)  # (M, V)
        tokens = gumbel_choice(logits, temperature, uniform_like(logits) if temperature else None)  # (M,)
        sure = token_probability(logits, tokens)  # (M,)
        if remasking == "random":
            sure = uniform_like(sure)  # (M,)
        scores = torch.zeros(masked.shape, dtype=sure.dtype, device=sure.device)  # (B, T)
        scores[masked] = sure
        chosen = top_positions(scores, masked, counts if threshold is None else counts.clamp(min=1))  # (B, T)
        if threshold is not None:
            chosen |= masked & (scores >= threshold)
        return tokens[chosen[masked]], chosen


class A2DSampling(LLaDASampling):
    """`generate` for A2D models: LLaDA's, with as many tokens a step as a linear schedule gives, rounded."""

    step_counts = staticmethod(rounded_counts)


class DreamSampling(Sampling):
    """`diffusion_generate` for Dream models."""

    @torch.no_grad()
    def diffusion_generate(
        self: Any, inputs, attention_mask=None, max_new_tokens=128, steps=512, eps=1e-3, temperature=0.0, top_p=None,
        top_k=None, alg="origin", alg_temp=None, output_history=False, return_dict_in_generate=False,
    ):  # fmt: skip
        """Prompts with `max_new_tokens` tokens after them, (B, P) -> (B, P + G).

        Args:
            attention_mask: (B, P), 1 at real tokens of left-padded prompts; or "full".
            steps, eps: times go from 1 to eps in so many even steps.
            temperature, top_p, top_k: act on the logits, in that order; temperature 0 takes the likeliest token.
            alg: which masks are revealed first, one of `ALGORITHMS`; "origin": at random.
            alg_temp: draw them from softmax(confidence / alg_temp).
            return_dict_in_generate: return `sequences` and, with `output_history`, `history`: the ids after every step.
        Raises:
            ValueError: another `alg`.
        """
        if alg not in ALGORITHMS:
            raise ValueError(f"alg = '{alg}' is unknown: give one of {', '.join(ALGORITHMS)}")
        least_one = {"steps": steps, "max_new_tokens": max_new_tokens, "top_k": top_k}
        check_counts(self.config.max_position_embeddings, inputs.shape[1], max_new_tokens, **least_one)
        mask_id, history = self.config.mask_token_id, []
        ids = F.pad(inputs, (0, max_new_tokens), value=mask_id)  # (B, T)
        mask = padded_mask(attention_mask, max_new_tokens)  # (B, T)
        for share in reveal_shares(steps, eps):
            masked = ids == mask_id  # (B, T)
            chosen = masked
            if alg == "origin":
                chosen = masked & (uniform_like(ids) < share.to(ids.device))  # (B, T); only these are predicted
            if chosen.any():
                ids = self._step(ids, chosen, mask, (share, temperature, top_p, top_k, alg, alg_temp))
            if output_history:
                history.append(ids.clone())
        if not return_dict_in_generate:
            return ids
        return ModelOutput(sequences=ids, history=tuple(history) if output_history else None)

    def _step(self, ids, masked, mask, settings) -> torch.Tensor:
        """Ids (B, T) with some of the masked positions (B, T) revealed; with "origin" all of them."""
        share, temperature, top_p, top_k, alg, alg_temp = settings
        logits = self.masked_logits(ids, masked, mask)  # (M, V)
        if temperature > 0:
            logits = logits / temperature  # (M, V)
        if top_p is not None and top_p < 1:
            logits = top_p_filter(logits, top_p)  # (M, V)
        if top_k is not None:
            logits = top_k_filter(logits, top_k)  # (M, V)
        tokens = gumbel_choice(logits, float(temperature > 0), uniform_like(logits) if temperature else None)  # (M,)
        chosen = masked
        if alg != "origin":
            measures = {"entropy": negative_entropy, "topk_margin": top_margin}
            sure = measures[alg](logits) if alg in measures else token_probability(logits, tokens)  # (M,)
            if alg_temp:  # the highest k are then k draws without replacement
                sure = sure.double() / alg_temp + gumbel(uniform_like(sure))  # (M,)
            scores = torch.zeros(ids.shape, dtype=sure.dtype, device=ids.device)  # (B, T)
            scores[masked] = sure
            chosen = top_positions(scores, masked, shared_counts(masked.sum(1), share))  # (B, T)
        ids = ids.clone()
        ids[chosen] = tokens[chosen[masked]]
        return ids
