"""Zeros stay zeros while everything else learns, whatever the optimizer, by hand and through the Trainer."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from structprune.errors import UserError
from structprune.masking import Masks, keep_zeros, mask_adapters, merge_adapters

Q = "model.transformer.blocks.0.q_proj.weight"


pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing"),  # renamed in transformers 5.24, in use everywhere
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing"),
]


class Shuffled(torch.optim.Optimizer):
    """An update that is not elementwise: every entry moves by the mean gradient, and without a gradient as well."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            weight.sub_(0.01 if weight.grad is None else 0.1 * weight.grad.abs().mean())


def muon(params):
    """Muon on the tensors with two dimensions: its update mixes all entries of a matrix."""
    return torch.optim.Muon([weight for weight in params if weight.dim() == 2], lr=0.02, weight_decay=0.1)


OPTIMIZERS = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "muon": muon,
    "shuffled": Shuffled,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_and_the_rest_learns(masked, kind):
    model, masks = masked.model, masked.masks
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS[kind](list(model.parameters()))
    with keep_zeros(model, masks):
        masked.train(model, optimizer)
        for name in masks.packed:
            weight, removed = model.get_parameter(name), ~masks.kept(name)
            assert (weight.grad[removed] == 0).all() and (weight.grad[~removed] != 0).any()
            for key, moment in optimizer.state[weight].items():
                if moment.shape == weight.shape:
                    assert (moment[removed] == 0).all() and (moment[~removed] != 0).any(), key
    assert not masked.moved(model)
    assert masked.changed(model, before) > 0.99
    assert not torch.equal(model.state_dict()["model.transformer.wte.weight"], before["model.transformer.wte.weight"])
    masked.train(model, optimizer, 1)  # closed: nothing holds them any more
    assert masked.moved(model)


def test_nothing_is_left_behind_even_by_an_error(masked):
    model, masks = masked.model, masked.masks
    weights = [model.get_parameter(name) for name in masks.packed]
    count = len(_global_optimizer_post_hooks)
    with pytest.raises(RuntimeError, match="stop"), keep_zeros(model, masks):
        assert len(_global_optimizer_post_hooks) == count + 1
        assert all(len(weight._post_accumulate_grad_hooks) == 1 for weight in weights)
        raise RuntimeError("stop")
    assert len(_global_optimizer_post_hooks) == count
    assert not any(weight._post_accumulate_grad_hooks for weight in weights)


def test_opening_repairs_weights_and_gradients_of_before(masked):
    model, masks = masked.model, masked.masks
    name = next(iter(masks.packed))
    weight, removed = model.get_parameter(name), ~masks.kept(name)
    model(**masked.batch(0)).loss.backward()
    weight.data[removed] = 1.0
    with keep_zeros(model, masks):
        assert (weight[removed] == 0).all() and (weight.grad[removed] == 0).all()
        assert (weight.grad[~removed] != 0).any()


def test_other_models_and_frozen_weights_are_left_alone(masked, tiny_model):
    model, masks = masked.model, masked.masks
    frozen, trained = (f"model.transformer.blocks.{index}.q_proj.weight" for index in (0, 1))
    model.get_parameter(frozen).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    other = tiny_model(seed=1)
    with keep_zeros(model, masks):
        masked.train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        masked.train(other, torch.optim.AdamW(other.parameters(), lr=1e-2))
    assert torch.equal(model.get_parameter(frozen), before[frozen]) and not masked.moved(model)
    assert not torch.equal(model.get_parameter(trained), before[trained])
    assert (other.get_parameter(trained) != 0).all()


def test_zeros_stay_in_bf16_under_gradient_checkpointing_and_accumulation(masked):
    model, masks = masked.model, masked.masks
    model = model.to(torch.bfloat16).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    with keep_zeros(model, masks):
        for seed in range(4):
            model(**masked.batch(seed)).loss.backward()
            if seed % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    assert not masked.moved(model) and masked.changed(model, before) > 0.5


def test_any_module_with_those_names_will_do(pack_masks):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(9, 5)

        def forward(self, x):
            return self.first(x)

    torch.manual_seed(0)
    model, kept = Plain(), torch.rand(5, 9) > 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with keep_zeros(model, pack_masks({"first.weight": kept})):
        for _ in range(3):
            model(torch.randn(4, 9)).square().mean().backward()
            optimizer.step()
    assert torch.equal(model.first.weight != 0, kept)


def test_masks_that_do_not_fit_are_refused(masked, pack_masks):
    model, masks = masked.model, masked.masks
    for wrapper in (keep_zeros, mask_adapters):
        with pytest.raises(UserError, match="the masks name no weight"), wrapper(model, Masks({}, {})):
            pass
        other = pack_masks({"model.transformer.blocks.7.q_proj.weight": torch.ones(32, 32, dtype=torch.bool)})
        message = "no weight 'model.transformer.blocks.7.q_proj.weight'"
        with pytest.raises(UserError, match=message), wrapper(model, other):
            pass
    with pytest.raises(UserError, match=r"StructpruneLLaDA has no merge_and_unload\(\): give the PEFT model"):
        merge_adapters(model, masks)


def test_zeros_stay_through_the_trainer_and_its_checkpoint(masked, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, masks = masked.model, masked.masks
    before = copy.deepcopy(model.state_dict())
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, weight_decay=0.1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{key: value[0] for key, value in masked.batch(seed).items()} for seed in range(12)]
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    with keep_zeros(model, masks):
        trainer.train()
    assert trainer.state.global_step == 3
    assert not masked.moved(model) and masked.changed(model, before) > 0.99
    trainer.save_model(str(tmp_path / "trained"))
    again = type(model).from_pretrained(tmp_path / "trained", dtype=torch.bfloat16)
    assert not masked.moved(again)
    assert torch.equal(again.state_dict()[Q], model.state_dict()[Q].bfloat16())
