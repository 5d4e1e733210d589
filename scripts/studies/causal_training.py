"""Training of a converted causal model as a masked diffusion LM: adapters, mask rates, and a step that can be resumed.

Papers: LoRA arXiv 2106.09685, Dream arXiv 2508.15487. Shapes: B windows, T tokens, C features.
"""

import argparse
import hashlib
import math
import time
from typing import Any

import torch
from torch import nn

from scripts.tools.tiny_training import draw_windows, rate_factor
from structprune.calibration.noise import apply_mask, stratified_times
from structprune.errors import UserError
from structprune.models.family import ROLES
from structprune.models.layers_structprune import RMSNorm
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.quiet import quiet_transformers

CLIP = 1.0  # largest norm of a step's gradient: windows with few masked tokens weigh 1 / rate
PROBES = 512  # values of a weight in the digest


class MaskRow(nn.Module):
    """An embedding of which only the mask token's row is trained: a gradient of (C,), not of the whole table."""

    def __init__(self, embedding: nn.Embedding, mask_id: int):
        super().__init__()
        self.embedding, self.mask_id = embedding, mask_id
        self.row = nn.Parameter(embedding.weight[mask_id].detach().clone())  # (C,)

    @property
    def weight(self) -> torch.Tensor:
        return self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, C)
        return torch.where((ids == self.mask_id)[..., None], self.row, self.embedding(ids))

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """The embedding with the trained row in it."""
        self.embedding.weight[self.mask_id] = self.row  # (C,)
        return self.embedding


def add_adapters(model: DiffusionLM, rank: int, alpha: int, seed: int) -> Any:
    """Make a model trainable in place by LoRA on all linears of its blocks, its norms and the mask token's embedding.

    Returns:
        PEFT's wrapper, for `merge_adapters`; the model itself runs as before.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # of LoRA's A; B starts at zero
    roles = type(model.blocks[0]).roles
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[roles[role] for role in ROLES])
    with quiet_transformers():
        wrapper: Any = get_peft_model(model, settings)  # type: ignore[arg-type]
    model.set_input_embeddings(MaskRow(model.embedding, model.config.mask_token_id))
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.requires_grad_(True)
    return wrapper


def merge_adapters(wrapper: Any) -> DiffusionLM:
    """The plain model again, with what was trained in its weights."""
    model = wrapper.merge_and_unload(progressbar=False, safe_merge=True)
    model.set_input_embeddings(model.embedding.merged())
    return model.eval().requires_grad_(False)


def highest_rate(progress: float, first: float, rise: float) -> float:
    """The highest mask rate of a step: from `first` in a line to 1 over the share `rise` of the run.

    Args:
        progress: finished share of the run.
    """
    return 1.0 if progress >= rise else first + (1 - first) * progress / rise


def draw_batch(
    tokens: torch.Tensor, shape: tuple[int, int], rates: tuple[float, float], mask_id: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clean windows (B, T), noisy ones (B, T), and their mask rates (B,), stratified between the lowest and highest."""
    low, high = rates
    windows = draw_windows(tokens, *shape, generator)  # (B, T)
    rate = low + (high - low) * stratified_times(len(windows), generator).float()  # (B,)
    noisy = apply_mask(windows, rate[:, None], mask_id, generator, edges_visible=True)[:, 0]  # (B, T)
    return windows, noisy, rate


def digest(model: DiffusionLM) -> str:
    """A hash of some values of every weight, which tells models apart."""
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()  # (n,)
        probes = values[:: max(1, len(values) // PROBES)].float().cpu()  # about (PROBES,)
        sha.update(name.encode() + probes.numpy().tobytes())
    return sha.hexdigest()[:16]


class Run:
    """A training run between two steps: everything needed to go on exactly.

    Args:
        tokens: (number of tokens,) training text.
        settings: what the result depends on, kept with the state.
    """

    def __init__(self, options: argparse.Namespace, model: DiffusionLM, tokens: torch.Tensor, settings: dict):
        self.options, self.tokens, self.settings = options, tokens, settings | {"source": digest(model)}
        self.wrapper = add_adapters(model, options.rank, options.alpha, options.seed)
        self.model = model.to(options.device).train()
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), options.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(options.seed)  # windows and noise
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.before: dict[str, float] = {}  # held-out figures of the untrained model

    @property
    def progress(self) -> float:
        """Finished share of the run."""
        return self.step / self.options.steps

    def advance(self) -> None:
        """One step.

        Raises:
            UserError: it does not fit the device's memory, or the loss is no number.
        """
        start, options = time.perf_counter(), self.options
        factor = rate_factor(self.step, self.progress, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * options.lr
        rates = (options.rate_low, highest_rate(self.progress, options.rate_high, options.rate_rise))
        mask_id = self.model.config.mask_token_id
        batch = draw_batch(self.tokens, (options.batch, options.length), rates, mask_id, self.generator)
        try:
            loss = sum(self._backward(*parts) for parts in zip(*(part.split(options.micro_batch) for part in batch)))
        except torch.OutOfMemoryError as error:
            remedy = "lower --micro-batch and --resume" if options.micro_batch > 1 else "lower --length and --overwrite"
            size = f"{options.micro_batch} x {options.length} tokens"
            raise UserError(f"a forward pass of {size} does not fit the device's memory: {remedy}") from error
        if not math.isfinite(loss):
            raise UserError(f"training diverged at step {self.step + 1}: lower --lr, and start anew with --overwrite")
        nn.utils.clip_grad_norm_(self.trained.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(loss)
        self.seconds += time.perf_counter() - start

    def _backward(self, clean: torch.Tensor, noisy: torch.Tensor, rate: torch.Tensor) -> float:
        """Add the gradients of some of a step's windows, (b, T), (b, T), (b,); returns their part of its loss."""
        device = self.options.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = self.model(noisy.to(device), labels=clean.to(device), mask_probability=rate.to(device))
        loss = output.loss * (len(clean) / self.options.batch)
        loss.backward()
        return loss.item()

    def state(self) -> dict:
        """Tensors and plain values that `restore` takes."""
        state = {key: getattr(self, key) for key in ("settings", "step", "seconds", "losses", "before")}
        state |= {"trained": {name: p.detach() for name, p in self.trained.items()}}
        return state | {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        """Go on from a state.

        Raises:
            UserError: it is of a run on another source.
        """
        if state["settings"]["source"] != self.settings["source"]:
            raise UserError("the source's weights have changed since the run began: start anew with --overwrite")
        for name, parameter in self.trained.items():
            parameter.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses, self.before = list(state["losses"]), dict(state["before"])
