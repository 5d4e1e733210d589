"""Block diffusion: tokens of a noisy block see each other and the clean blocks before it (arXiv 2503.09573).

Copied next to checkpoints of families that use it: imports torch, transformers and the files beside it only.
Shapes: B batch, P prompt columns, G generated tokens, T sequence length, S = 2 T tokens of a row, M predictions,
C features, V vocabulary.
"""

from typing import Any

import torch
from transformers.modeling_outputs import MaskedLMOutput

from .generation_structprune import Sampling, check_counts, uniform_like
from .layers_structprune import AttentionContext, Layout, core_mask
from .rotary_structprune import positions_of
from .sampling_structprune import (
    gumbel_choice,
    reveal_counts,
    token_probability,
    top_k_filter,
    top_p_filter,
    top_positions,
)


def block_mask(positions, size: int):
    """Which keys each query of a sequence sees, in its block and those before: (B, T) -> (B, 1, T, T) bool."""
    block = positions // size  # (B, T)
    return (block[:, :, None] >= block[:, None, :])[:, None]


def pair_mask(positions, size: int, causal: bool = False):
    """Which keys each query of a noisy window and its clean text sees: (B, T) -> (B, 1, 2 T, 2 T) bool.

    A noisy token sees its noisy block and the clean blocks before it, a clean token clean blocks up to its own; with
    `causal` clean tokens up to itself.
    """
    block = positions // size  # (B, T)
    query, key = block[:, :, None], block[:, None, :]  # (B, T, 1), (B, 1, T)
    noisy = torch.cat((query == key, query > key), dim=-1)  # (B, T, 2 T)
    before = positions[:, :, None] >= positions[:, None, :] if causal else query >= key  # (B, T, T)
    clean = torch.cat((torch.zeros_like(before), before), dim=-1)  # (B, T, 2 T)
    return torch.cat((noisy, clean), dim=1)[:, None]


class Pairs(Layout):
    """Rows of a noisy window and, behind it, its clean text, at the same positions.

    One pass predicts all blocks, each from clean text as in generation.

    Args:
        size: tokens of a block.
    """

    copies = 2

    def __init__(self, size: int):
        self.size = size

    def rows(self, noisy, clean):
        return torch.cat(torch.broadcast_tensors(noisy, clean), dim=-1)  # (..., 2 T)

    def spread(self, values, other):
        return torch.cat((values, torch.full_like(values, other)), dim=-1)  # (..., 2 T)

    def context(self, model, shape, device, real=None) -> AttentionContext:
        """As `Layout.context`; `real` (B, T), true or 1 at real tokens of a window."""
        positions = positions_of(shape[1] // 2, device, real)  # (B or 1, T)
        mask = pair_mask(positions, self.size, self.causal)  # (B or 1, 1, S, S)
        if real is not None:
            mask = mask & core_mask(real.repeat(1, 2), tuple(shape), None)  # (B, 1, S, S)
        return AttentionContext(model.rotary(shape[1], device, position_ids=positions.repeat(1, 2)), mask)


class BlockSampling(Sampling):
    """`generate` for block diffusion models."""

    @torch.no_grad()
    def generate(
        self: Any, input_ids, attention_mask=None, steps=128, gen_length=128, temperature=0.0, top_k=None, top_p=None,
        remasking="low_confidence", threshold=None,
    ):  # fmt: skip
        """Prompts with `gen_length` tokens after them, (B, P) -> (B, P + G), block by block from left to right.

        Blocks count from a prompt's first real token; the last one is generated whole, and cut.

        Args:
            attention_mask: (B, P), 1 at real tokens of left-padded prompts.
            steps: of `gen_length` tokens; a block has its share of them, rounded up.
            temperature, top_k, top_p: act on the logits, in that order; temperature 0 takes the likeliest token.
            remasking: which predictions stay, "low_confidence" (the surest) or "sequential" (the first).
            threshold: also keep every prediction with at least this probability, and one at least.
        Raises:
            ValueError: lengths that do not fit the model, or another remasking.
        """
        size, width = self.config.block_size, input_ids.shape[1]
        check_counts(self.config.max_position_embeddings, width, gen_length, steps=steps, gen_length=gen_length)
        if remasking not in ("low_confidence", "sequential") or (threshold is not None and remasking == "sequential"):
            given = f"remasking = '{remasking}' with threshold = {threshold}"
            raise ValueError(f"{given}: give low_confidence, or sequential without a threshold")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, P)
        ids, real, first = aligned_texts((input_ids, real.bool()), gen_length, size, self.config.mask_token_id)
        settings, block_steps = (temperature, top_k, top_p, remasking, threshold), -(-steps * size // gen_length)
        start = int(first[0]) // size * size  # column where all rows' first block begins
        for end in range(start + size, ids.shape[1] + 1, size):
            for step in range(block_steps):
                masked = ids[:, :end] == self.config.mask_token_id  # (B, t)
                masked[:, : end - size] = False  # a mask token that the model itself wrote stays
                if not masked.any():
                    break
                count = int(reveal_counts(torch.tensor(size), block_steps, step))
                self._reveal(ids[:, :end], masked, real[:, :end], count, settings)
        places = first[:, None] + torch.arange(gen_length, device=ids.device)  # (B, G)
        return torch.cat((input_ids, ids.gather(1, places)), dim=1)

    def _reveal(self: Any, ids, masked, real, count: int, settings) -> None:
        """Write `count` tokens of each row, or more by a threshold, at masked positions of ids (B, t)."""
        temperature, top_k, top_p, remasking, threshold = settings
        logits = self.masked_logits(ids, masked, None if real.all() else real)  # (M, V)
        if temperature > 0:
            logits = logits / temperature  # (M, V)
        if top_k is not None:
            logits = top_k_filter(logits, top_k)  # (M, V)
        if top_p is not None and top_p < 1:
            logits = top_p_filter(logits, top_p)  # (M, V)
        tokens = gumbel_choice(logits, float(temperature > 0), uniform_like(logits) if temperature else None)  # (M,)
        scores = torch.zeros(masked.shape, dtype=logits.dtype, device=ids.device)  # (B, t)
        if remasking == "low_confidence":  # else the earlier of equal scores comes first
            scores[masked] = token_probability(logits, tokens)
        least = count if threshold is None else max(1, count)
        chosen = top_positions(scores, masked, torch.full_like(ids[:, 0], least))  # (B, t)
        if threshold is not None:
            chosen |= masked & (scores >= threshold)
        ids[chosen] = tokens[chosen[masked]]


def aligned_texts(prompts, generated: int, size: int, mask_id: int):
    """Left-padded prompts (B, P), moved so that blocks begin in the same columns, and masks up to the end of a block.

    Args:
        prompts: ids and which of them are real tokens, (B, P) each. size: of a block.
    Returns:
        ids (B, T), which of them are real (B, T) bool, and the column of each row's first generated token (B,).
    """
    rows = [ids[real] for ids, real in zip(*prompts)]  # B x (p,)
    starts = [len(row) % size for row in rows]  # tokens in the first block that is generated
    width = max(len(row) - start for row, start in zip(rows, starts))  # columns before that block
    length = width + -(-(max(starts) + generated) // size) * size  # T
    ids = prompts[0].new_full((len(rows), length), mask_id)  # (B, T)
    real = torch.ones_like(ids, dtype=torch.bool)  # (B, T)
    for place, (row, start) in enumerate(zip(rows, starts)):
        begin = width - (len(row) - start)
        ids[place, :begin], real[place, :begin] = int(mask_id == 0), False  # any token but the mask
        ids[place, begin : begin + len(row)] = row
    return ids, real, torch.tensor([width + start for start in starts], device=ids.device)


class PairTraining:
    """What trains a `DiffusionLM` on noisy windows beside their text; stands before it among the bases of a class.

    `config.block_size`: tokens of a block, counted from the first token of a sequence.
    """

    pairs: type[Pairs] = Pairs

    def __init__(self, config):
        super().__init__(config)  # type: ignore[call-arg]
        self.layout = self.pairs(config.block_size)

    def pair_loss(self: Any, logits, text, labels, noise, real=None):
        """The loss of a pass over pairs, ().

        Args:
            logits: (B, T, V) of noisy tokens. text: (B, T, C) hidden states of clean ones. labels: (B, T).
            noise: where tokens are masked (B, T), and mask probabilities (B,) or (B, T).
            real: (B, T), true or 1 at real tokens of padded rows; None: all are.
        """
        return self.diffusion_loss(logits, labels, *noise)

    def forward(
        self: Any, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
        mask_probability=None, output_hidden_states=None, output_attentions=None, use_cache=None, return_dict=None,
    ):  # fmt: skip
        """As `DiffusionLM.forward`. With `labels` all blocks are predicted at once, each from clean text before it.

        Raises:
            ValueError: as there; or labels with positions or a mask of other than 2 dimensions.
        """
        if labels is None or input_ids is None or output_attentions or use_cache:
            return super().forward(  # type: ignore[misc]
                input_ids, attention_mask, position_ids, inputs_embeds, labels, mask_probability,
                output_hidden_states, output_attentions, use_cache, return_dict,
            )  # fmt: skip
        if position_ids is not None or (attention_mask is not None and attention_mask.dim() != 2):
            raise ValueError("the loss of a block diffusion model takes an attention_mask (B, T), and no position_ids")
        clean = torch.where(labels == -100, input_ids, labels)  # (B, T)
        noisy, masked, p = self.noise(input_ids, labels, mask_probability)  # (B, T) each, (B,) or (B, T)
        rows, length = self.layout.rows(noisy, clean), noisy.shape[1]  # (B, 2 T)
        states: Any = [] if output_hidden_states else None
        hidden = self.encode(
            rows, context=self.layout.context(self, rows.shape, rows.device, attention_mask), keep=states
        )
        logits = self.output_head(hidden[:, :length])  # (B, T, V)
        loss = self.pair_loss(logits, hidden[:, length:], labels, (masked, p), attention_mask)
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=states and (*states, hidden)
        )  # (B, 2 T, C) each
        return output if return_dict is None or return_dict else output.to_tuple()


class BlockDiffusion(PairTraining):
    """What makes a `DiffusionLM` a block diffusion LM, of sequences too; stands before it among a class's bases."""

    def context(self: Any, shape, device, attention_mask=None, position_ids=None, dtype=None) -> AttentionContext:
        """As `DiffusionLM.context`; a token sees its block and those before. A 4-D mask replaces this."""
        context = super().context(shape, device, attention_mask, position_ids, dtype)  # type: ignore[misc]
        tensor = isinstance(attention_mask, torch.Tensor)
        if tensor and attention_mask.dim() == 4:
            return context
        positions = positions_of(shape[1], device, attention_mask if tensor else None, position_ids)  # (B or 1, T)
        mask = block_mask(positions, self.config.block_size)  # (B or 1, 1, T, T)
        return AttentionContext(context.rotary, mask if context.mask is None else mask & context.mask)
