"""What is said where a block's numbers are not finite: the place, the dtype and the remedy, in one line."""

import torch

from structprune.errors import UserError
from structprune.models.modeling_structprune import DiffusionLM

PARTS = {"attention": "attention heads", "channels": "MLP channels"}  # kinds of units


def place(block: int, part: str) -> str:
    """A part of a block: a kind of units, or the role of a linear."""
    return f"block {block}, {PARTS.get(part, part)}"


def overflow(where: str, what: str, dtype: torch.dtype, model: DiffusionLM | None = None) -> UserError:
    """The error for numbers that are not finite.

    Args:
        where: the place. what: the numbers.
        dtype: of the model's weights; bfloat16 has the range of float32, so that only another checkpoint helps.
        model: to name its largest weight.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return UserError(f"{where}: its {what} overflow in {name}: use model.dtype = float32")
    cause = "the checkpoint's weights are damaged or too large" if model is None else largest_weight(model)
    return UserError(f"{where}: its {what} overflow in {name}: {cause}; use a sound checkpoint")


def largest_weight(model: DiffusionLM) -> str:
    """The largest weight of a model in size and where it is; the first NaN where there is one."""
    sizes = {name: weight.detach().abs().max().item() for name, weight in model.named_parameters()}
    # NaN is unequal to itself
    name = next((name for name, size in sizes.items() if size != size), max(sizes, key=sizes.__getitem__))
    return f"the largest weight is {sizes[name]:.3g}, in {name}"
