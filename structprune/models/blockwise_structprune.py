"""Block diffusion: tokens of a noisy block see each other and the clean blocks before it (arXiv 2503.09573).

Copied next to checkpoints of families that use it: imports torch, transformers and the files beside it only.
Shapes: B batch, T sequence length, S = 2 T tokens of a row, C features, V vocabulary.
"""

from typing import Any

import torch
from transformers.modeling_outputs import MaskedLMOutput

from .layers_structprune import Layout, Sight, core_mask, positions_of


def block_mask(positions, size: int):
    """Which keys each query of a sequence sees, in its block and those before: (B, T) -> (B, 1, T, T) bool."""
    block = positions // size  # (B, T)
    return (block[:, :, None] >= block[:, None, :])[:, None]


def pair_mask(positions, size: int):
    """Which keys each query of a noisy window and its clean text sees: (B, T) -> (B, 1, 2 T, 2 T) bool.

    A noisy token sees its noisy block and the clean blocks before it, a clean token clean blocks up to its own.
    """
    block = positions // size  # (B, T)
    query, key = block[:, :, None], block[:, None, :]  # (B, T, 1), (B, 1, T)
    noisy = torch.cat((query == key, query > key), dim=-1)  # (B, T, 2 T)
    clean = torch.cat((torch.zeros_like(query == key), query >= key), dim=-1)  # (B, T, 2 T)
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

    def sight(self, model, shape, device, real=None) -> Sight:
        """As `Layout.sight`; `real` (B, T), true or 1 at real tokens of a window."""
        positions = positions_of(shape[1] // 2, device, real)  # (B or 1, T)
        mask = pair_mask(positions, self.size)  # (B or 1, 1, S, S)
        if real is not None:
            mask = mask & core_mask(real.repeat(1, 2), tuple(shape), None)  # (B, 1, S, S)
        return Sight(model.rotary(shape[1], device, position_ids=positions.repeat(1, 2)), mask)


class BlockDiffusion:
    """What makes a `DiffusionLM` a block diffusion LM; stands before it among the bases of a class.

    `config.block_size`: tokens of a block, counted from the first token of a sequence.
    """

    def __init__(self, config):
        super().__init__(config)  # type: ignore[call-arg]
        self.layout = Pairs(config.block_size)

    def sight(self: Any, shape, device, attention_mask=None, position_ids=None, dtype=None) -> Sight:
        """As `DiffusionLM.sight`; a token sees its block and those before. A 4-D mask replaces this."""
        sight = super().sight(shape, device, attention_mask, position_ids, dtype)  # type: ignore[misc]
        tensor = isinstance(attention_mask, torch.Tensor)
        if tensor and attention_mask.dim() == 4:
            return sight
        positions = positions_of(shape[1], device, attention_mask if tensor else None, position_ids)  # (B or 1, T)
        mask = block_mask(positions, self.config.block_size)  # (B or 1, 1, T, T)
        return Sight(sight.rotary, mask if sight.mask is None else mask & sight.mask)

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
        hidden = self.encode(rows, sight=self.layout.sight(self, rows.shape, rows.device, attention_mask), keep=states)
        logits = self.output_head(hidden[:, :length])  # (B, T, V)
        loss = self.diffusion_loss(logits, labels, masked, p)
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=states and (*states, hidden)
        )  # (B, 2 T, C) each
        return output if return_dict is None or return_dict else output.to_tuple()
