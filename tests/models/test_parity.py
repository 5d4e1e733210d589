"""Our models against the logits that the families' published implementation gives on the parity checkpoints."""

import torch
from safetensors.torch import load_file

from structprune import load_model
from structprune.models.adapter import Adapter


def test_logits_equal_the_published_implementation(parity):
    expected = load_file(parity / "expected.safetensors")
    with torch.no_grad():
        logits = load_model(parity)(expected["calibration_ids"]).logits  # (N, T, V)
    assert logits.shape == expected["dense_logits"].shape
    assert expected["dense_logits"].abs().max() > 0.1  # a fixture of zeros would prove nothing
    assert (logits - expected["dense_logits"]).abs().max() < 1e-5


def test_attention_core_sees_what_the_logits_come_from(parity):
    """The seam is really in the forward pass: scaling its output changes the logits."""
    expected = load_file(parity / "expected.safetensors")
    model = load_model(parity)
    shapes = []

    def double(module, inputs, output):
        shapes.append([tuple(tensor.shape) for tensor in inputs[:3]])
        return output * 2

    handles = [block.core.register_forward_hook(double) for block in Adapter(model).blocks]
    with torch.no_grad():
        logits = model(expected["calibration_ids"]).logits  # (N, T, V)
    for handle in handles:
        handle.remove()
    rows, length = expected["calibration_ids"].shape
    widths, size = Adapter(model).blocks[0].widths, model.config.head_dim
    shared = (rows, widths.kv_heads, length, size)
    assert shapes == [[(rows, widths.query_heads, length, size), shared, shared]] * len(handles)
    assert (logits - expected["dense_logits"]).abs().max() > 1e-3
