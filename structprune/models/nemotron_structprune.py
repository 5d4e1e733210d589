"""Nemotron-Labs-Diffusion: one set of weights used as a block diffusion LM and as a causal one.

The layers are Ministral 3's: RoPE by YaRN (arXiv 2309.00071), and queries that grow with the logarithm of their
position. Copied next to every such checkpoint that structprune writes, beside the files that it imports from.
Shapes: B batch, P prompt columns, G generated tokens, T sequence length, C features, D head dim, V vocabulary.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .blockwise_structprune import Pairs, PairTraining
from .configuration_structprune import StructpruneDreamConfig
from .generation_structprune import Sampling, check_counts, padded_mask, uniform_like
from .layers_structprune import AttentionContext, DreamBlock, RMSNorm
from .modeling_structprune import DiffusionLM
from .rotary_structprune import positions_of, rotary_tables
from .sampling_structprune import gumbel_choice, reveal_counts, token_probability, top_positions

YARN = (
    "rope_type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "attention_factor", "llama_4_scaling_beta",
)  # fmt: skip


class StructpruneNemotronConfig(StructpruneDreamConfig):
    """Ministral's key names, with optional per-layer widths as in Dream's.

    `block_size`: tokens of a block. `dlm_loss_weight` (None: 1) and `ar_loss_weight`: of the two losses in training.
    `rotary_scaling`: YaRN's numbers; under the family's own keys they are in `rope_parameters`.
    """

    model_type = "structprune_nemotron_labs_diffusion"
    qkv_bias = False
    reads_head_dim = True

    def __init__(
        self, block_size=32, rotary_scaling=None, rope_theta=1000000.0, rms_norm_eps=1e-5, mask_token_id=100,
        dlm_loss_weight=None, ar_loss_weight=1.0, **kwargs,
    ):  # fmt: skip
        given = (rotary_scaling, kwargs.pop("rope_parameters", None), kwargs.pop("rope_scaling", None))
        rope = {key: value for each in given for key, value in (each or {}).items()}
        self.rotary_scaling = {key: rope[key] for key in YARN if rope.get(key) is not None}
        self.block_size, self.dlm_loss_weight, self.ar_loss_weight = block_size, dlm_loss_weight, ar_loss_weight
        theta = rope.get("rope_theta", rope_theta)
        super().__init__(rope_theta=theta, rms_norm_eps=rms_norm_eps, mask_token_id=mask_token_id, **kwargs)

    def in_own_layout(self, values: dict) -> dict:
        own = {"rope_parameters": self.rotary_scaling | {"rope_theta": self.rope_theta}}
        return {key: value for key, value in values.items() if key != "rotary_scaling"} | own


def yarn_frequencies(frequencies, theta: float, scaling: dict):
    """RoPE's frequencies by YaRN: (D/2,) -> (D/2,).

    A frequency that turns more than `beta_fast` times in `original_max_position_embeddings` positions stays, one that
    turns less than `beta_slow` times is divided by `factor`; between their places both are mixed linearly.
    """
    half = len(frequencies)

    def place(turns: float) -> float:
        """Where among the frequencies one turns so many times."""
        return half * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(theta)

    low, high = (
        max(math.floor(place(scaling["beta_fast"])), 0),
        min(math.ceil(place(scaling["beta_slow"])), 2 * half - 1),
    )
    places = torch.arange(half, dtype=torch.float32, device=frequencies.device)  # (D/2,)
    share = ((places - low) / max(high - low, 0.001)).clamp(0, 1)  # (D/2,) of the divided frequency
    return frequencies / scaling["factor"] * share + frequencies * (1 - share)


def query_scale(positions, scaling: dict):
    """The factor of queries, 1 + beta log(1 + floor(position / original positions)): (B, T) -> (B, 1, T, 1) fp32."""
    whole = torch.floor(positions / scaling["original_max_position_embeddings"])  # (B, T)
    return (1 + scaling["llama_4_scaling_beta"] * torch.log(1 + whole))[:, None, :, None]


class CausalPairs(Pairs):
    """Rows of a noisy window and its clean text, which the model reads as a causal one: a pass computes both uses."""

    causal = True


class TwofoldSampling(Sampling):
    """`generate` for models that are causal too."""

    @torch.no_grad()
    def generate(
        self: Any, input_ids, attention_mask=None, steps=128, gen_length=128, temperature=0.0, threshold=None
    ):  # fmt: skip
        """Prompts with `gen_length` tokens after them, (B, P) -> (B, P + G), block by block from left to right.

        Blocks count from the prompt's end. The first token of each is predicted causally from the text before it, and
        the others are filled in by confidence; a finished block is read causally. The last block is cut.

        Args:
            attention_mask: (B, P), 1 at real tokens of left-padded prompts.
            steps: of `gen_length` tokens; a block has its share of them, rounded up.
            temperature: of the choice of tokens; 0 takes the likeliest.
            threshold: also keep every prediction with at least this probability, and one at least.
        Raises:
            ValueError: lengths that do not fit the model, or a threshold that is no probability.
        """
        size, width, mask_id = self.config.block_size, input_ids.shape[1], self.config.mask_token_id
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold = {threshold}: give a probability above 0")
        check_counts(self.config.max_position_embeddings, width, gen_length, steps=steps, gen_length=gen_length)
        whole, block_steps = -(-gen_length // size) * size, -(-steps * size // gen_length)
        ids = F.pad(input_ids, (0, whole), value=mask_id)  # (B, T)
        real = padded_mask(attention_mask, whole)  # (B, T)
        for start in range(width, ids.shape[1], size):
            self._begin(ids, start, real, temperature)
            block, seen = ids[:, : start + size], None if real is None else real[:, : start + size]  # (B, t) each
            began = (block[:, start:] == mask_id).sum(1)  # (B,)
            for step in range(block_steps):
                masked = block == mask_id  # (B, t)
                masked[:, :start] = False  # a mask token that the model itself wrote stays
                if not masked.any():
                    break
                counts = reveal_counts(began, block_steps, step)  # (B,)
                self._fill(block, masked, (seen, start), counts, (temperature, threshold))
        return ids[:, : width + gen_length]

    def _begin(self: Any, ids, start: int, real, temperature: float) -> None:
        """Write the first token of the block at `start`, in place: ids (B, T)."""
        seen = None if real is None else real[:, :start]  # (B, t)
        context = self.open_context((len(ids), start), ids.device, seen, start)
        logits = self.output_head(self.encode(ids[:, :start], context=context)[:, -1]).float()  # (B, V)
        ids[:, start] = gumbel_choice(logits, temperature, uniform_like(logits) if temperature else None)

    def _fill(self: Any, ids, masked, place, counts, settings) -> None:
        """Write some tokens at masked positions (B, t) of the block at the end of ids (B, t), in place."""
        (real, start), (temperature, threshold) = place, settings
        hidden = self.encode(ids, context=self.open_context(ids.shape, ids.device, real, start))  # (B, t, C)
        logits = self.output_head(hidden[masked]).float()  # (M, V)
        tokens = gumbel_choice(logits, temperature, uniform_like(logits) if temperature else None)  # (M,)
        sure = token_probability(logits, tokens)  # (M,)
        scores = torch.zeros(masked.shape, dtype=sure.dtype, device=sure.device)  # (B, t)
        scores[masked] = sure
        chosen = top_positions(scores, masked, counts if threshold is None else counts.clamp(min=1))  # (B, t)
        if threshold is not None:
            chosen |= masked & (scores >= threshold)
        ids[chosen] = tokens[chosen[masked]]


class StructpruneNemotron(PairTraining, TwofoldSampling, DiffusionLM):  # type: ignore[misc]
    """Under the state-dict keys of `NemotronLabsDiffusionModel`. A sequence is one block, in which all see all."""

    config_class = StructpruneNemotronConfig
    pairs = CausalPairs
    _no_split_modules = ["DreamBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.encoder = nn.Module()
        self.encoder.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder.layers = nn.ModuleList(DreamBlock(config, index) for index in range(config.num_hidden_layers))
        self.encoder.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    embedding = property(lambda self: self.encoder.embed_tokens)
    blocks = property(lambda self: self.encoder.layers)
    final_norm = property(lambda self: self.encoder.norm)
    output_head = property(lambda self: self.diffusion_head)

    def set_input_embeddings(self, value):
        self.encoder.embed_tokens = value
        self.config.vocab_size = value.weight.shape[0]

    def set_output_embeddings(self, new_embeddings):
        self.diffusion_head = new_embeddings

    def rotary(self, length: int, device, attention_mask=None, position_ids=None):
        """As `DiffusionLM.rotary`, and the factor of queries (1 or B, 1, T, 1)."""
        positions, scaling = positions_of(length, device, attention_mask, position_ids), self.config.rotary_scaling
        scale = partial(yarn_frequencies, theta=self.config.rope_theta, scaling=scaling)
        tables = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, scale)  # 2 x (B or 1, 1, T, D)
        return (*tables, query_scale(positions, scaling))

    def open_context(self, shape, device, attention_mask=None, start=0) -> AttentionContext:
        """As there: the last block sees all, text before it is causal. With `start` T the whole sequence is causal."""
        context = self.context(shape, device, attention_mask)
        places = torch.arange(shape[1], device=device)  # (T,)
        mask = ((places[:, None] >= places) | (places[:, None] >= start))[None, None]  # (1, 1, T, T)
        return AttentionContext(context.rotary, mask if context.mask is None else mask & context.mask)

    def causal_loss(self, text, labels, real=None):
        """Mean nats of tokens that are predicted from the text before them: (B, T, C), (B, T) -> ().

        Tokens with the label -100 have no loss; nor does the first of a row, which nothing predicts.

        Args:
            real: (B, T), true or 1 at real tokens of padded rows; None: all are.
        """
        labels = labels[:, 1:]  # (B, T - 1)
        if real is not None:  # a token behind padding is the first
            labels = labels.masked_fill(~real[:, :-1].bool(), -100)
        logits = self.output_head(text[:, :-1]).float()  # (B, T - 1, V)
        nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")  # ()
        return nats / (labels != -100).sum().clamp(min=1)

    def pair_loss(self, logits, text, labels, noise, real=None):
        """As there: the diffusion loss and the causal one, with the weights of the config."""
        weight = 1.0 if self.config.dlm_loss_weight is None else self.config.dlm_loss_weight
        loss = weight * self.diffusion_loss(logits, labels, *noise)
        return loss + self.config.ar_loss_weight * self.causal_loss(text, labels, real)
