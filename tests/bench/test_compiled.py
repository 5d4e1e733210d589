"""Blocks compiled in place, and what is said where that does not work."""

import pytest
import torch

from structprune.bench import compiled as module
from structprune.bench.compiled import check_compile, compiled_blocks
from structprune.bench.macs import counted_macs
from structprune.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile without a C++ compiler; `ran` counts the graphs that were made."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile(*args, **(kwargs | {"backend": backend})))
    return graphs


@torch.no_grad()
def test_every_block_is_compiled_for_its_own_width_and_back_again(tiny_model, eager_backend):
    widths = {str(index): {"mlp_hidden_size": 8 + 8 * index} for index in range(12)}  # more than torch's limit of 8
    model = tiny_model(n_layers=12, per_layer_config=widths)
    ids = torch.arange(10)[None]
    expected = model(ids).logits
    with compiled_blocks([model]):
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        assert len(eager_backend) == 12
        model(ids)
        assert len(eager_backend) == 12  # nothing is compiled twice
    assert all(block._compiled_call_impl is None for block in model.blocks)
    assert torch.equal(model(ids).logits, expected) and len(eager_backend) == 12


@torch.no_grad()
def test_what_is_only_counted_is_not_compiled(tiny_model, eager_backend):
    """With the hooks of the count in it, it would have to be compiled again without."""
    model, ids = tiny_model(), torch.arange(10)[None]
    with compiled_blocks([model]):
        with counted_macs(model) as count:
            model(ids)
        assert count.linear > 0 and not eager_backend
        model(ids)
        assert eager_backend


def test_a_missing_compiler_is_one_line(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def failing(*args, **kwargs):
        def call(*args):
            raise TorchDynamoException("no g++ here\nand a trace")

        return call

    monkeypatch.setattr(module.torch, "compile", failing)
    with pytest.raises(UserError, match=r"does not work here \(no g\+\+ here\): install a C\+\+ compiler, or leave"):
        check_compile(torch.device("cpu"))


def test_a_working_one_says_nothing(eager_backend):
    check_compile(torch.device("cpu"))
    assert len(eager_backend) == 1
