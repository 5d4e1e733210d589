"""How strongly text is masked: the one formula that calibration and evaluation share (docs/methods.md section 2)."""

import torch

from structprune.models.modeling_structprune import NOISE_EPSILON


def mask_rate(t: torch.Tensor) -> torch.Tensor:
    """p = (1 - eps) t + eps, eps = 1e-3: times t in [0, 1] of any shape -> probabilities, float32."""
    return ((1 - NOISE_EPSILON) * t.double() + NOISE_EPSILON).float()
