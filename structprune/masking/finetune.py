"""Keep a masked model's zeros through fine-tuning, plain and with PEFT's LoRA.

    masks = Masks.load("masks.safetensors")
    with keep_zeros(model, masks):         # or mask_adapters(peft_model, masks)
        trainer.train()
    model = merge_adapters(peft_model, masks)  # with LoRA only

Weights are matched by name, so the model can come from the family's own code or from ours. Weights must be whole in
memory: FSDP, DeepSpeed ZeRO-3, tensor-parallel and offloaded weights are refused or not found. An optimizer that steps
copies of the weights (DeepSpeed, Apex O2) is not covered.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from structprune.errors import UserError
from structprune.masking.masks import Masks, unpack_bits

LORA = ("lora_A", "lora_B", "lora_dropout", "scaling", "active_adapters", "disable_adapters", "merged")


class _Removed:
    """The removed weights of one (O, C) tensor, packed until used, on the device they were last used on."""

    def __init__(self, packed: torch.Tensor, columns: int):
        self.packed, self.columns = packed, columns

    def mask(self, device: torch.device) -> torch.Tensor:
        """(O, C) bool, True where removed; the packed bits move to the weight's device."""
        if self.packed.device != device:
            self.packed = self.packed.to(device)
        return ~unpack_bits(self.packed, self.columns)

    @torch.no_grad()
    def zero(self, weight: torch.Tensor) -> None:
        weight.masked_fill_(self.mask(weight.device), 0)

    def zero_grad(self, weight: torch.Tensor) -> None:
        if weight.grad is not None:
            self.zero(weight.grad)


@contextmanager
def keep_zeros(model: nn.Module, masks: Masks) -> Iterator[None]:
    """While open, training leaves the removed weights exactly 0, whatever the torch optimizer, Trainer or not.

    Opening sets them to 0. From then on their gradients are zeroed as they accumulate, so that optimizer moments and
    gradient clipping ignore them. After every step of an optimizer that holds a masked weight, the weight is masked
    again, for updates that are not elementwise (Muon) or need no gradient. Unfreeze weights before opening;
    frozen ones stay as they are.

    Raises:
        UserError: the masks are empty, or a weight is missing, has another shape, or is not in memory whole.
    """
    removed = _open(model, masks)

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight in removed and weight.requires_grad:
                    removed[weight].zero(weight)

    with ExitStack() as stack:
        stack.callback(register_optimizer_step_post_hook(after_step).remove)
        for weight, entries in removed.items():
            if weight.requires_grad:
                entries.zero_grad(weight)  # from an earlier backward pass
                stack.callback(weight.register_post_accumulate_grad_hook(entries.zero_grad).remove)
        yield


@contextmanager
def mask_adapters(peft_model: nn.Module, masks: Masks) -> Iterator[None]:
    """While open, LoRA adds only the kept entries of its delta: x (W + mask * delta)^T, which is what merging gives.

    Opening sets the removed base weights to 0 (initialisations such as PiSSA fill them). PEFT's own forward runs where
    adapters are disabled or merged; merging while open keeps the zeros as well, and must be undone while open. Weights
    that are trained themselves (`modules_to_save`, unfrozen ones) are kept as by `keep_zeros`. Forward and backward
    passes must both run while open. The delta is formed at full size, one layer at a time, and again in the backward
    pass instead of being stored: per layer one more (O, C) product in the forward pass, two in the backward pass.

    Raises:
        UserError: as `keep_zeros`; or an adapter on a masked weight is merged already, or is not plain LoRA, such as
            DoRA, so that its delta cannot be masked.
    """
    layers, masks = _lora_layers(peft_model, masks), masks.split(peft_model)
    for name, layer in layers:
        if layer.merged:
            raise UserError(f"'{name}' has merged adapters, which have filled its zeros: call unmerge_adapter() first")
    with keep_zeros(peft_model, masks), ExitStack() as stack:
        for name, layer in layers:
            weight = layer.base_layer.weight
            entries = _Removed(masks.packed[name], weight.shape[1])
            # accelerate's hooks call the forward they replaced by this name
            forward = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
            stack.enter_context(_replaced(layer, forward, partial(_masked_forward, layer, getattr(layer, forward))))
            delta = partial(_masked_delta, entries, layer.get_delta_weight)
            stack.enter_context(_replaced(layer, "get_delta_weight", delta))
        yield


def merge_adapters(peft_model: nn.Module, masks: Masks) -> nn.Module:
    """The plain model with the active adapters merged and every zero exact: what `mask_adapters` trained.

    Raises:
        UserError: no PEFT model that can be merged, or as `mask_adapters`.
    """
    if not hasattr(peft_model, "merge_and_unload"):
        raise UserError(f"{type(peft_model).__name__} has no merge_and_unload(): give the PEFT model itself")
    _lora_layers(peft_model, masks)
    merger: Any = peft_model
    merged = merger.merge_and_unload()
    masks.apply(merged)
    return merged


def _open(model: nn.Module, masks: Masks) -> dict[nn.Parameter, _Removed]:
    """Apply the masks; the removed entries of every masked weight."""
    if not masks.packed:
        raise UserError("the masks name no weight: there is no zero to keep")
    masks.apply(model)
    masks = masks.split(model)
    return {
        weight: _Removed(masks.packed[name], weight.shape[1])
        for name, weights in masks.find(model).items()
        for _, weight in weights
    }


def _lora_layers(model: nn.Module, masks: Masks) -> list[tuple[str, Any]]:
    """The LoRA linears on masked weights, with the masks' names for them.

    Raises:
        UserError: a masked weight has an adapter whose delta cannot be masked.
    """
    layers = []
    for name, weights in masks.find(model).items():
        for full, _ in weights:
            layer_name, inside, _ = full.rpartition(".base_layer.")
            if inside:
                layer = model.get_submodule(layer_name)
                if reason := _not_plain_lora(layer):
                    raise UserError(f"'{layer_name}' {reason}: its delta cannot be masked, use plain LoRA there")
                layers.append((name, layer))
    return layers


def _not_plain_lora(layer: Any) -> str | None:
    """Why an adapter's update is no delta of the weight's shape that could be masked; None for plain LoRA."""
    if not all(hasattr(layer, name) for name in (*LORA, "get_delta_weight")):
        return f"is {type(layer).__name__}, not LoRA"
    variants = [type(variant).__name__ for variant in getattr(layer, "lora_variant", {}).values()]
    if variants or any(getattr(layer, "use_dora", {}).values()):
        return f"uses {variants[0] if variants else 'DoRA'}"
    if not isinstance(layer.base_layer, nn.Linear) or getattr(layer, "fan_in_fan_out", False):
        return f"wraps {type(layer.base_layer).__name__}, not a plain nn.Linear"
    if hasattr(layer, "parameter_name"):
        return "targets a parameter (target_parameters)"
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):
        return "has a replaced forward"
    return None


@contextmanager
def _replaced(module: nn.Module, name: str, value: Callable) -> Iterator[None]:
    """`value` as the attribute of this one module, and what was there before at the end."""
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def _masked_delta(entries: _Removed, own_delta: Callable, adapter: str) -> torch.Tensor:
    """PEFT's delta of an adapter, (O, C), 0 where the weight is removed."""
    delta = own_delta(adapter)
    return delta.masked_fill(entries.mask(delta.device), 0)


def _masked_forward(layer: Any, own_forward: Callable, x: torch.Tensor, *args: Any, **kwargs: Any):
    """The forward of PEFT's LoRA linear with masked deltas: (..., C) -> (..., O)."""
    if layer.disable_adapters or layer.merged:
        return own_forward(x, *args, **kwargs)
    if kwargs.get("adapter_names") is not None:
        raise UserError(
            "adapter_names (one adapter per row) cannot be used while adapters are masked: merge them first"
        )
    result = layer.base_layer(x, *args, **kwargs)  # (..., O)
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        dropped = layer.lora_dropout[adapter](x)  # (..., C)
        # the masked delta is fixed here, so that a backward pass forms it again even after closing
        update = partial(_update, layer, adapter, layer.get_delta_weight)
        if torch.is_grad_enabled():
            added = checkpoint(update, dropped, use_reentrant=False, preserve_rng_state=False)  # (..., O)
        else:
            added = update(dropped)  # (..., O)
        result = result + added.to(result.dtype)
    return result


def _update(layer: Any, adapter: str, delta: Callable, x: torch.Tensor) -> torch.Tensor:
    """What one adapter adds: (..., C) -> (..., O)."""
    bias = getattr(layer.lora_B[adapter], "bias", None)  # (O,), with lora_bias only
    bias = None if bias is None else (bias * layer.scaling[adapter]).to(x.dtype)
    return F.linear(x, delta(adapter).to(x.dtype), bias)
