"""Projections held as int8: values by hand, and what a model predicts with them."""

import copy

import pytest
import torch

from structprune.assets import model_directory, text_file
from structprune.models.adapter import Adapter
from structprune.models.encode import encode_at
from structprune.models.int8 import Int8Linear, to_int8
from structprune.models.loading import load_model
from structprune.models.placement import streamed
from structprune.models.tokenizer import load_tokenizer
from structprune.recovery.held_out import HeldOutStudy
from structprune.recovery.settings import DataSettings
from structprune.recovery.text import read_recovery_text
from structprune.workers import Workers


def linear(weight, bias=None):
    layer = torch.nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return layer


def test_rows_are_rounded_to_127ths_of_their_largest_value():
    layer = Int8Linear(linear([[127.0, -63.4, 0.0], [0.0, 0.0, 0.0], [0.254, 0.0, -0.127]]), torch.float32)
    assert layer.weight.dtype == torch.int8
    assert layer.weight.tolist() == [[127, -63, 0], [0, 0, 0], [127, 0, -64]]  # half a step goes to the even one
    assert layer(torch.eye(3)).T[0].tolist() == pytest.approx([127, -63, 0])
    assert layer(torch.eye(3)).T[1].tolist() == [0, 0, 0]


def test_a_bias_is_added_and_sums_do_not_overflow_fp16():
    layer = Int8Linear(linear([[1.0] * 1024], [2.0]), torch.float16)
    assert layer(torch.ones(1, 1024, dtype=torch.float16)).item() == 1026  # 127 x 1024 is beyond fp16


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_only_block_projections_change_and_streaming_changes_nothing(tiny_model, family):
    model = tiny_model(family)
    model.config.mask_token_id = 5
    before = copy.deepcopy(model)
    to_int8(model, torch.float32)
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == sum(len(block.names) for block in Adapter(before).blocks)
    own, theirs = dict(model.named_parameters()), dict(before.named_parameters())
    same = [name for name in own if own[name].dtype != torch.int8 and name in theirs]
    assert same and all(torch.equal(own[name], theirs[name]) for name in same)
    ids = torch.randint(100, (2, 16), generator=torch.Generator().manual_seed(0))
    states, dense = (encode_at(each, ids, ids > 50) for each in (model, before))  # (M, C)
    assert 1e-5 < ((states - dense).norm() / dense.norm()).item() < 0.04
    with streamed(model, torch.device("cpu")):
        assert torch.equal(encode_at(model, ids, ids > 50), states)


@pytest.mark.slow
def test_predictions_of_a_trained_model_hardly_move():
    directory = model_directory()
    settings = DataSettings(source=str(text_file("heldout.txt")), length=128, held_out=16)
    dense = load_model(directory)
    study = HeldOutStudy(dense, read_recovery_text(settings, load_tokenizer(directory), 1280), 2, 0, Workers())
    figures = study.measure(to_int8(load_model(directory), torch.float32)).means()
    assert 0 < figures["kl"] < 2e-3 and figures["agreement"] > 0.97
    assert figures["nelbo"] == pytest.approx(study.teacher.means()["nelbo"], abs=5e-3)
