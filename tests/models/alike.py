"""What two loadings of one model share."""

import torch


@torch.no_grad()
def assert_alike(one, two, ids):
    """The same weights bit for bit, and logits up to rounding.

    Rounding of a product depends on where its weights lie in memory, which small experts feel: their rows begin at
    places that vector instructions read in parts.
    """
    weights, others = one.state_dict(), two.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert (one(ids).logits - two(ids).logits).abs().max() <= 1e-5
