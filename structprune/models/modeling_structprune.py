"""Masked diffusion language models whose blocks may differ in width: what all share, LLaDA and Dream.

This file and those that it imports from beside it are copied next to every checkpoint written, so they need only torch
and transformers (4.46 to 4.57 and 5). Attributes are named as in the published checkpoints, whose state dicts load.

Shapes: B batch, T sequence length, D head dim, C features, V vocabulary.
Papers: LLaDA arXiv 2502.09992, Dream arXiv 2508.15487.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_structprune import StructpruneDreamConfig, StructpruneLLaDAConfig, check_packed
from .generation_structprune import DreamSampling, LLaDASampling
from .layers_structprune import AttentionContext, DreamBlock, Layout, LLaDABlock, RMSNorm, check_attention, core_mask
from .rotary_structprune import check_positions, positions_of, rotary_tables

# transformers copies only the files that this one names, not those that they name
from .sampling_structprune import gumbel_choice  # noqa: F401

NOISE_EPSILON = 1e-3  # smallest mask probability: p = (1 - eps) t + eps


class DiffusionLM(PreTrainedModel):
    """What all families share: one forward pass, the masked-diffusion loss, and what trainers expect."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    accepts_loss_kwargs = False  # the loss is already a mean per window: the Trainer scales it as usual
    _auto_class: Any = "AutoModelForCausalLM"  # save_pretrained writes the code too, under transformers 4 as well
    shifted = False  # whether position i predicts token i + 1
    layout: Layout = Layout()  # of the rows that statistics, losses and likelihoods run
    edges_visible = False  # whether the first and last position are never masked
    gradient_checkpointing = False  # set per instance by gradient_checkpointing_enable
    embedding: Any  # these four are placed by a subclass, under its family's names
    blocks: Any
    final_norm: Any
    output_head: Any
    source: Any  # the checkpoint it was loaded from
    streamed_to: Any  # the device that weights visit, where they are streamed

    def __init__(self, config):
        check_attention(getattr(config, "_attn_implementation", None))
        check_packed(config)
        super().__init__(config)

    def set_attn_implementation(self, attn_implementation):
        """Compute attention by "sdpa" or "eager" from now on.

        Raises:
            ValueError: another name.
        """
        check_attention(attn_implementation)
        self.config._attn_implementation = attn_implementation

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()

    @classmethod
    def can_generate(cls) -> bool:  # not as transformers does, token by token; this silences a warning
        return False

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.output_head

    @classmethod
    def is_shifted(cls, config) -> bool:
        """Whether position i predicts token i + 1 in a model of that config."""
        return getattr(config, "right_shift_logits", cls.shifted)

    @property
    def followers(self) -> dict[str, str]:
        """Names of weights that are another one: the head's, where it follows the embedding -> the embedding's."""
        return dict(self._tied_weights_keys or {}) if self.config.tie_word_embeddings else {}

    def stored_state(self) -> dict[str, torch.Tensor]:
        """The state dict without weights that are another one: what a file holds."""
        return {name: value for name, value in self.state_dict().items() if name not in self.followers}

    def tie_head(self) -> None:
        """Make the head's weight the embedding's, where the head follows it."""
        if self.followers:
            self.output_head.weight = self.embedding.weight  # (V, C)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As in torch; weights that are another one may be absent, and stay that one."""
        leaders = {name: leader for name, leader in self.followers.items() if leader in state_dict}
        whole = {**{name: state_dict[leader] for name, leader in leaders.items()}, **state_dict}
        result = super().load_state_dict(whole, strict, assign)
        self.tie_head()
        return result

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in transformers, for embedding, head and config; returns the embedding.

        Raises:
            ValueError: the mask token's row would be cut off.
        """
        step = pad_to_multiple_of or 1
        mask, rows = self.config.mask_token_id, -(-(new_num_tokens or 0) // step) * step
        if new_num_tokens is not None and rows <= mask:
            raise ValueError(f"{rows} tokens would leave out the mask token, {mask}: resize to {mask + 1} or more")
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def rotary(self, length: int, device, attention_mask=None, position_ids=None):
        """RoPE tables for `position_ids` (B, T); else for positions 0.. (1, T), or of each row's real tokens (B, T)."""
        positions = positions_of(length, device, attention_mask, position_ids)  # (B or 1, T)
        scaling = getattr(self.config, "rotary_scaling", None)
        return rotary_tables(positions, self.config.head_dim, self.config.rope_theta, scaling)

    def context(self, shape, device, attention_mask=None, position_ids=None, dtype=None) -> AttentionContext:
        """Positions of the tokens of sequences of a (B, T) shape, and which of them they see.

        Args:
            attention_mask, position_ids: see `encode`, also for errors.
            dtype: that a float mask is cast to; None: the embedding's.
        """
        mask = core_mask(attention_mask, tuple(shape), dtype or self.embedding.weight.dtype)  # (B, 1, 1 or T, T)
        if position_ids is not None:
            check_positions(position_ids, tuple(shape))
        real = attention_mask if mask is not None and attention_mask.dim() == 2 else None  # (B, T)
        return AttentionContext(self.rotary(shape[1], device, real, position_ids), mask)

    def open_context(self, shape, device, attention_mask=None, start=0) -> AttentionContext:
        """As `context`, in generation: the positions from `start` on are the last block, and those before are text."""
        return self.context(shape, device, attention_mask)

    def encode(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, keep=None, position_ids=None, context=None
    ):
        """Hidden states after the final norm, (B, T) -> (B, T, C); `keep` collects every block's input.

        Args:
            attention_mask: see `core_mask`. A 2-D one says which tokens are real, and positions count those only.
            position_ids: (B, T) or (1, T) integers, instead of positions 0.. or those by a 2-D mask.
            context: from `context` or a layout, instead of both.
        Raises:
            ValueError: another shape of either; positions that are not integers.
        """
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        context = context or self.context(x.shape[:2], x.device, attention_mask, position_ids, x.dtype)
        for block in self.blocks:
            if keep is not None:
                keep.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x, *context)
            else:
                x = block(x, *context)  # (B, T, C)
        return self.final_norm(x)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
        mask_probability=None, output_hidden_states=None, output_attentions=None, use_cache=None, return_dict=None,
    ):  # fmt: skip
        """Logits (B, T, V) in checkpoint alignment (Dream's are not shifted back), and a loss when `labels` are given.

        Args:
            attention_mask, position_ids: see `encode`.
            labels: (B, T) clean token ids, -100 at positions without loss, which are not masked either.
            mask_probability: (B,) or (B, T) the probability `input_ids` were already masked with, by row or token.
                Without it the model masks `input_ids` itself: t stratified over the batch, p = (1 - eps) t + eps.
        Raises:
            ValueError: attention weights, a cache, or a loss of `inputs_embeds`, none of which is supported; see also
                `encode` and `noise`.
        """
        if output_attentions or use_cache:
            raise ValueError("output_attentions and use_cache are not available in a masked diffusion model")
        if labels is not None:
            if input_ids is None:
                raise ValueError("the masked-diffusion loss needs input_ids, not inputs_embeds")
            input_ids, masked, mask_probability = self.noise(input_ids, labels, mask_probability)
        states = [] if output_hidden_states else None
        hidden = self.encode(input_ids, attention_mask, inputs_embeds, states, position_ids)  # (B, T, C)
        logits = self.output_head(hidden)  # (B, T, V)
        loss = None if labels is None else self.diffusion_loss(logits, labels, masked, mask_probability)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=states and (*states, hidden))
        return output if return_dict is None or return_dict else output.to_tuple()

    def noise(self, input_ids, labels, mask_probability=None):
        """The noised ids (B, T), which positions carry loss (B, T), and the mask probabilities (B,) or (B, T).

        Raises:
            ValueError: mask probabilities of another shape.
        """
        maskable = self.maskable(labels)  # (B, T)
        if mask_probability is not None:
            rows, tokens = tuple(labels.shape[:1]), tuple(labels.shape)
            mask_probability = torch.as_tensor(mask_probability, device=labels.device)  # (B,) or (B, T)
            if (given := tuple(mask_probability.shape)) not in (rows, tokens):
                raise ValueError(f"mask_probability must be of shape {rows} or {tokens}, not {given}")
            return input_ids, maskable & (input_ids == self.config.mask_token_id), mask_probability
        batch, device = input_ids.shape[0], input_ids.device
        t = torch.rand(1, device=device) + torch.arange(batch, device=device) / batch  # (B,)
        p = (1 - NOISE_EPSILON) * (t % 1) + NOISE_EPSILON  # (B,)
        masked = maskable & (torch.rand(input_ids.shape, device=device) < p[:, None])  # (B, T)
        return input_ids.masked_fill(masked, self.config.mask_token_id), masked, p

    def maskable(self, labels):
        """Positions that may be masked: (B, T) ids, -100 at positions without loss -> (B, T) bool."""
        maskable = labels != -100  # (B, T)
        if self.edges_visible:
            maskable[:, 0] = maskable[:, -1] = False
        return maskable

    def diffusion_loss(self, logits, labels, masked, mask_probability):
        """NELBO in nats per maskable token: sum of CE / p over masked positions / number of maskable ones."""
        if self.shifted:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)  # (B, T, V)
        nats = F.cross_entropy(logits[masked].float(), labels[masked], reduction="none")  # (M,)
        weight = mask_probability.reshape(len(masked), -1).expand(masked.shape)[masked]  # (M,)
        return (nats / weight).sum() / self.maskable(labels).sum().clamp(min=1)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """PEFT needs this method; text is generated by iterative denoising."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


class StructpruneLLaDA(LLaDASampling, DiffusionLM):
    """LLaDA, LLaDA-1.5 and MMaDA's text tower, under the state-dict keys of `LLaDAModelLM`."""

    config_class = StructpruneLLaDAConfig
    _no_split_modules = ["LLaDABlock"]

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Module()
        parts = self.model.transformer = nn.ModuleDict()
        parts["wte"] = nn.Embedding(config.embedding_size, config.d_model)
        parts["blocks"] = nn.ModuleList(LLaDABlock(config, index) for index in range(config.n_layers))
        parts["ln_f"] = RMSNorm(config.d_model, config.rms_norm_eps)
        parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=config.include_bias)
        self.post_init()

    embedding = property(lambda self: self.model.transformer["wte"])
    blocks = property(lambda self: self.model.transformer["blocks"])
    final_norm = property(lambda self: self.model.transformer["ln_f"])
    output_head = property(lambda self: self.model.transformer["ff_out"])

    def set_input_embeddings(self, value):
        self.model.transformer["wte"] = value
        self.config.embedding_size = value.weight.shape[0]

    def set_output_embeddings(self, new_embeddings):
        self.model.transformer["ff_out"] = new_embeddings


class DecoderLM(DiffusionLM):
    """A model under the state-dict keys of Qwen's and Llama's decoders; a subclass names its config."""

    _no_split_modules = ["DreamBlock"]
    block_class: Any = DreamBlock
    embedding_name = "embed_tokens"

    def __init__(self, config):
        super().__init__(config)
        self.model = nn.Module()
        self.model.add_module(self.embedding_name, nn.Embedding(config.vocab_size, config.hidden_size))
        self.model.layers = nn.ModuleList(self.block_class(config, index) for index in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.tie_head()

    embedding = property(lambda self: getattr(self.model, self.embedding_name))
    blocks = property(lambda self: self.model.layers)
    final_norm = property(lambda self: self.model.norm)
    output_head = property(lambda self: self.lm_head)

    def set_input_embeddings(self, value):
        setattr(self.model, self.embedding_name, value)
        self.config.vocab_size = value.weight.shape[0]

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings


class StructpruneDream(DreamSampling, DecoderLM):
    """Dream, Dream-Coder and DiffuCoder, under the state-dict keys of `DreamModel`."""

    config_class = StructpruneDreamConfig
    shifted = True
    edges_visible = True
