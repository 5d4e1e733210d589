"""What the next token costs a model that is used causally too, on text without noise.

Shapes: N windows of T tokens, b of a batch, C features, V vocabulary.
"""

import torch
import torch.nn.functional as F

from structprune.models.encode import Batches
from structprune.models.logits import logit_slices
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device


@torch.inference_mode()
def causal_nats(model: DiffusionLM, input_ids: torch.Tensor, batches: Batches) -> torch.Tensor:
    """Mean nats of tokens 2 to T, each predicted from the text before it: (N, T) int64 -> (N,) fp32 on CPU."""
    count, length = input_ids.shape
    device = compute_device(model)
    return batches.map(lambda rows: _nats(model, input_ids[rows].to(device)), count, length) / (length - 1)


def _nats(model: DiffusionLM, ids: torch.Tensor) -> torch.Tensor:
    """Summed over a window: (b, T) -> (b,) on CPU."""
    context = model.open_context(ids.shape, ids.device, None, ids.shape[1])
    read, labels = (
        model.encode(ids, context=context)[:, :-1].flatten(0, 1),
        ids[:, 1:].flatten(),
    )  # (b (T - 1), C), (.,)
    nats = [
        F.cross_entropy(model.output_head(read[part]).float(), labels[part], reduction="none")  # (m,)
        for part in logit_slices(len(labels), model.embedding.weight.shape[0], kinds=2)
    ]
    return torch.cat(nats).view(len(ids), -1).sum(1).cpu()
