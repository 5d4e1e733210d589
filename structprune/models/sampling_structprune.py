"""The parts of a sampler of masked diffusion LMs, as pure functions of tensors (docs/methods.md section 6).

Randomness comes in as uniform numbers, so that every function can be checked by hand. This file is copied next to every
checkpoint written, and needs only torch. Papers: LLaDA arXiv 2502.09992, Dream arXiv 2508.15487, Gumbel-max in fp64
arXiv 2409.02908. Shapes: B rows, G generated positions, M predicted positions, V vocabulary.
"""

import torch


def reveal_counts(masks: torch.Tensor, steps: int, step: int) -> torch.Tensor:
    """LLaDA: m // s of a block's m masks are revealed a step, one more in the first m mod s: (B,) -> (B,) at one step.

    Args:
        masks: when the block began. steps: s, of the block. step: 0..s-1 within the block.
    """
    return masks // steps + (step < masks % steps)


def rounded_counts(masks: torch.Tensor, steps: int, step: int) -> torch.Tensor:
    """A2D: m · (1 - s/t) of the m masks that earlier steps left, rounded, for a linear schedule: (B,) -> (B,).

    Halves are rounded to even. Shares are computed in fp32 as in the published sampler, because what is rounded can
    depend on the last bit.

    Args:
        masks: when the block began. steps: of the block. step: 0..steps-1 within it.
    """
    clean = 1 - torch.arange(steps, -1, -1).double().div(steps).float()  # (steps + 1,) at times from 1 to 0
    shares = 1 - ((1 - clean[1:]) / (1 - clean[:-1])).double()  # (steps,)
    for share in shares[: step + 1].tolist():
        counts = (masks.double() * share).round().long()  # (B,)
        masks = masks - counts  # (B,)
    return counts


def reveal_shares(steps: int, eps: float) -> torch.Tensor:
    """Dream: 1 - s/t for the neighbours t > s of linspace(1, eps, steps + 1), and 1 at the last: (steps,) fp32 on CPU.

    Computed in fp32 as in the published sampler, because a truncated count can depend on the last bit.
    """
    times = torch.linspace(1, eps, steps + 1)  # (steps + 1,)
    shares = 1 - times[1:] / times[:-1]  # (steps,)
    shares[-1] = 1
    return shares


def shared_counts(masks: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Dream: int(m · share) of the remaining masks, truncated, per row: (B,) int64, () fp32 -> (B,) int64."""
    return (masks.float() * share.to(masks.device)).long()


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance as LLaDA defines it, u + (1 + w)(c - u): 2 x (M, V) -> (M, V)."""
    return unconditional + (1 + scale) * (conditional - unconditional)


def top_p_filter(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the likeliest tokens up to and with the one that takes their sum above `top_p`; others -inf: (M, V)."""
    ordered, token = logits.sort(dim=-1, descending=True)  # 2 x (M, V)
    before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)  # (M, V) probability of the likelier tokens
    before[..., 0] = 0  # the likeliest always stays
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, token, before > top_p)  # (M, V)
    return logits.masked_fill(dropped, -torch.inf)


def top_k_filter(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Keep the `top_k` highest logits and what ties with the last of them; others -inf: (M, V)."""
    least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]  # (M, 1)
    return logits.masked_fill(logits < least, -torch.inf)


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise from uniform numbers in [0, 1), any shape, in fp64."""
    tiny = torch.finfo(torch.float64).tiny
    return -(-uniform.double().clamp(min=tiny).log()).log()


def gumbel_choice(logits: torch.Tensor, temperature: float, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """A token of each row drawn from softmax(logits / temperature), the likeliest at 0: (M, V) -> (M,) int64.

    The argmax of logits + temperature · Gumbel noise in fp64 (low precision sharpens the distribution), which is the
    logarithm of LLaDA's exp(logits) / (-log u)^temperature.

    Args:
        uniform: (M, V) in [0, 1); not used at temperature 0.
    """
    if temperature == 0:
        return logits.argmax(-1)
    assert uniform is not None, "a temperature needs noise"
    return (logits.double() + temperature * gumbel(uniform)).argmax(-1)


def token_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Softmax probability of one token per row: (M, V), (M,) -> (M,)."""
    return (logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)).exp()


def top_margin(logits: torch.Tensor) -> torch.Tensor:
    """Highest minus second highest softmax probability: (M, V) -> (M,)."""
    first, second = logits.softmax(-1).topk(2, dim=-1).values.unbind(-1)  # 2 x (M,)
    return first - second


def negative_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Σ p log(p + 1e-10), so that higher is surer: (M, V) -> (M,) in nats."""
    p = logits.softmax(-1)  # (M, V)
    return (p * (p + 1e-10).log()).sum(-1)


def top_positions(scores: torch.Tensor, eligible: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The `counts` highest-scored eligible positions of each row, the earlier of equal ones: (B, G) bool.

    Args:
        scores: (B, G). eligible: (B, G) bool.
        counts: (B,) int64; of a row with fewer eligible positions all are chosen.
    """
    order = scores.masked_fill(~eligible, -torch.inf).argsort(dim=-1, descending=True, stable=True)  # (B, G)
    return (order.argsort(dim=-1) < counts[:, None]) & eligible
