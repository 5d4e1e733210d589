"""LoRA on a masked model: what is trained is what the merged model computes, zeros included."""

import copy

import pytest
import torch
from torch import nn

from structprune.errors import UserError
from structprune.masking import mask_adapters, merge_adapters

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "v_proj", "up_proj"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing"),  # renamed in transformers 5.24, in use everywhere
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing"),
]


def lora(model, **changes):
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **{"target_modules": TARGETS} | changes))


def train_lora(masked, model, count: int = 3) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masked.train(model.train(), torch.optim.AdamW(trained, lr=2e-2), count)
    model.eval()


LORA = {
    "plain": {},
    "dropout": {"lora_dropout": 0.2},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},  # takes the first components out of the base weight, zeros included
    "trained_copy": {"modules_to_save": ["attn_out"]},
}


@pytest.mark.parametrize("case", LORA)
def test_the_merged_model_is_what_lora_trained(masked, case):
    model, masks = masked.model, masked.masks
    dense = masked.logits(model)
    adapted = lora(model, **LORA[case])
    with mask_adapters(adapted, masks):
        assert torch.allclose(masked.logits(adapted), dense, atol=1e-4)  # nothing is learnt yet
        train_lora(masked, adapted)
        trained = masked.logits(adapted)
        assert not masked.moved(adapted)
    unmasked = masked.logits(adapted)
    assert (trained - dense).abs().max() > 0.1 and (trained - unmasked).abs().max() > 0.1
    plain = copy.deepcopy(adapted).merge_and_unload()
    assert masked.moved(plain)  # merging alone destroys them
    assert torch.allclose(masked.logits(plain), unmasked, atol=1e-4)
    merged = merge_adapters(adapted, masks)
    assert not masked.moved(merged) and not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(masked.logits(merged), trained, atol=1e-4)


def test_the_masked_delta_and_its_gradients_by_hand(pack_masks):
    """One layer against x (W + mask * scale * B A)^T written out, with lora_bias and two active adapters."""
    torch.manual_seed(0)
    base, kept = nn.Sequential(nn.Linear(9, 6)), torch.rand(6, 9) > 0.5
    masks = pack_masks({"0.weight": kept})
    settings = {"target_modules": ["0"], "r": 3, "init_lora_weights": False, "lora_bias": True}
    model = peft.get_peft_model(base, peft.LoraConfig(lora_alpha=6, **settings))
    model.add_adapter("second", peft.LoraConfig(lora_alpha=12, **settings))
    model.base_model.set_adapter(["default", "second"])
    layer, x = model.base_model.model[0], torch.randn(5, 9, requires_grad=True)
    masks.apply(model)
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    for adapter, scale in (("default", 2.0), ("second", 4.0)):
        weight = weight + kept * scale * (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight)  # (O, C)
        bias = bias + scale * layer.lora_B[adapter].bias  # (O,)
    expected = x @ weight.T + bias
    parameters = [p for p in model.parameters() if p.requires_grad] + [x]
    assert len(parameters) == 7
    by_hand = torch.autograd.grad(expected.square().sum(), parameters)
    with mask_adapters(model, masks):
        output = model(x)
    assert torch.allclose(output, expected, atol=1e-5)
    for grad, right in zip(torch.autograd.grad(output.square().sum(), parameters), by_hand, strict=True):
        assert torch.allclose(grad, right, atol=1e-3, rtol=1e-4)


def test_disabled_and_merged_adapters_run_as_peft_runs_them(masked):
    model, masks = masked.model, masked.masks
    dense = masked.logits(model)
    adapted = lora(model)
    with mask_adapters(adapted, masks):
        train_lora(masked, adapted)
        trained = masked.logits(adapted)
        with adapted.disable_adapter():
            assert torch.equal(masked.logits(adapted), dense)
        adapted.merge_adapter()
        assert not masked.moved(adapted)  # the delta that PEFT merges is masked too
        assert torch.allclose(masked.logits(adapted), trained, atol=1e-4)
        adapted.unmerge_adapter()
        assert not masked.moved(adapted)
        with pytest.raises(UserError, match="adapter_names .* cannot be used while adapters are masked"):
            layer = adapted.get_submodule("base_model.model.model.transformer.blocks.0.q_proj")
            layer(torch.zeros(1, 32), adapter_names=["default"])
    adapted.merge_adapter()  # closed: PEFT merges everything
    assert masked.moved(adapted)
    message = r"q_proj.weight' has merged adapters, .*: call unmerge_adapter\(\) first"
    with pytest.raises(UserError, match=message), mask_adapters(adapted, masks):
        pass
    assert torch.allclose(masked.logits(merge_adapters(adapted, masks)), trained, atol=1e-4)  # and this repairs it


def test_masked_lora_in_bf16_under_gradient_checkpointing(masked):
    model, masks = masked.model, masked.masks
    adapted = lora(model.to(torch.bfloat16)).train()  # PEFT keeps the adapters in float32
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    grads = []
    for inside in (True, False):
        if not inside:
            adapted.gradient_checkpointing_disable()
        adapted.zero_grad()
        torch.manual_seed(0)
        with mask_adapters(adapted, masks):
            adapted(**masked.batch(0)).loss.backward()
        grads.append({name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())
    assert all((grad != 0).any() for name, grad in grads[0].items() if "lora_B" in name)
    with mask_adapters(adapted, masks):
        train_lora(masked, adapted)
        trained = masked.logits(adapted)
    merged = merge_adapters(adapted, masks)
    assert merged.dtype == torch.bfloat16 and not masked.moved(merged)
    difference = (masked.logits(merged) - trained).float().abs().mean() / trained.float().abs().mean()
    assert difference < 0.02  # rounding of the merged weights


def test_the_delta_is_not_stored_for_the_backward_pass(pack_masks):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(target_modules=["0"], r=2))
    masks, sizes = pack_masks({"0.weight": torch.rand(64, 64) > 0.5}), []
    layer = model.base_model.model[0]
    own = {layer.base_layer.weight.data_ptr()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.numel())
        return tensor

    with mask_adapters(model, masks), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert max(sizes, default=0) < 64 * 64


def test_peft_is_as_before_when_it_closes(masked):
    model, masks = masked.model, masked.masks
    adapted = lora(model)
    layers = [module for module in adapted.modules() if hasattr(module, "lora_A")]
    with pytest.raises(RuntimeError, match="stop"), mask_adapters(adapted, masks):
        assert len(layers) == 9 and all({"forward", "get_delta_weight"} <= set(vars(layer)) for layer in layers)
        raise RuntimeError("stop")
    assert not any({"forward", "get_delta_weight"} & set(vars(layer)) for layer in layers)


def test_layers_with_accelerates_hooks_are_masked_and_hooked(masked):
    hooks = pytest.importorskip("accelerate.hooks")
    adapted = lora(masked.model, init_lora_weights=False).eval()
    with mask_adapters(adapted, masked.masks):
        expected = masked.logits(adapted)
    unmasked = masked.logits(adapted)
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    for layer in adapted.modules():
        if hasattr(layer, "lora_A"):
            hooks.add_hook_to_module(layer, Counting())
    with mask_adapters(adapted, masked.masks):
        assert torch.equal(masked.logits(adapted), expected) and len(calls) == 9
    assert torch.equal(masked.logits(adapted), unmasked) and len(calls) == 18
    assert not torch.equal(unmasked, expected)


def test_where_everything_is_kept_it_is_pefts_own_forward(pack_masks):
    """Dropout, scaling and LoRA's own bias included; the same seed drops the same inputs."""
    model = nn.Sequential(nn.Linear(32, 24))
    adapted = lora(model, target_modules=["0"], lora_dropout=0.5, lora_bias=True, init_lora_weights=False).train()
    x, outputs = torch.randn(7, 32), []
    for ratio in (None, 0.0, 0.5):
        torch.manual_seed(1)
        if ratio is None:
            outputs.append(adapted(x))
            continue
        with mask_adapters(adapted, pack_masks({"0.weight": torch.rand(24, 32).ge(ratio)})):
            torch.manual_seed(1)
            outputs.append(adapted(x))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert (outputs[0] - outputs[2]).abs().max() > 0.1
    assert (outputs[0] - adapted.eval()(x)).abs().max() > 0.1


def test_adapters_without_a_maskable_delta_are_refused_by_name(masked):
    model, masks = masked.model, masked.masks
    where = r"^'base_model.model.model.transformer.blocks.0.q_proj' "
    refused = {
        r"uses \w*Dora\w*|uses DoRA": peft.LoraConfig(target_modules=TARGETS, use_dora=True),
        "is Linear, not LoRA": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    }
    for reason, settings in refused.items():
        adapted = peft.get_peft_model(copy.deepcopy(model), settings)
        before = copy.deepcopy(adapted.state_dict())
        message = f"{where}({reason}): its delta cannot be masked, use plain LoRA there$"
        with pytest.raises(UserError, match=message), mask_adapters(adapted, masks):
            pass
        with pytest.raises(UserError, match=where):
            merge_adapters(adapted, masks)
        assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
