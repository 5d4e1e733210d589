"""Block projections as 8-bit integers with a scale per output row, for a model that only predicts.

Plain parameters, unlike torchao's tensors, so that `placement` streams them like others.
Shapes: I inputs, O outputs of a layer.
"""

import torch
import torch.nn.functional as F
from torch import nn

from structprune.models.adapter import Adapter
from structprune.models.modeling_structprune import DiffusionLM

LARGEST = 127  # symmetric, so that 0 stays 0


class Int8Linear(nn.Module):
    """A linear layer that holds its weight (O, I) as int8, and makes it whole while it computes.

    Args:
        linear: whose weight is rounded, to at most half of 1/127 of its row's largest value.
        dtype: of the bias.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight = linear.weight.detach().float()  # (O, I)
        scale = (weight.abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)  # (O,)
        rounded = (weight / scale[:, None]).round().to(torch.int8)  # (O, I)
        # parameters, not buffers, so that they are streamed like others
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)  # fp32, whatever is computed in
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) -> (..., O). The weight is scaled before the product, whose sums would overflow fp16 otherwise."""
        weight = self.weight.to(x.dtype).mul_(self.scale.to(x.dtype)[:, None])  # (O, I)
        return F.linear(x, weight, self.bias)


@torch.no_grad()
def to_int8(model: DiffusionLM, dtype: torch.dtype) -> DiffusionLM:
    """Hold the block projections of a model as int8, in place, and all other weights in `dtype`, which it computes in.

    The model predicts only: nothing of it can be trained or saved.
    """
    names = {module: name for name, module in model.named_modules()}
    for block in Adapter(model).blocks:
        for role in block.names:
            linear = block[role]
            model.set_submodule(names[linear], Int8Linear(linear, dtype))
    for module in model.modules():
        if not isinstance(module, Int8Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.requires_grad_(False)
