"""Streamed weights: one layer's copy at the device at a time, the originals untouched, the same numbers."""

import time
from dataclasses import replace

import pytest
import torch

from structprune.config import Config, MemorySettings, ModelSettings
from structprune.errors import UserError
from structprune.models import placement
from structprune.models.loading import load_model
from structprune.models.placement import compute_device, pick_device, streamed, synchronise
from structprune.models.resources import Resources, resolve_resources
from structprune.runs.prune import prune
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import resolve_structured

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_every_weight_goes_along(family, tiny_model):
    """On the meta device nothing may meet a weight that stayed behind."""
    model = tiny_model(family)
    before = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    ids = torch.randint(2048, (2, 8), device="meta")  # (B, T)
    with streamed(model, torch.device("meta")), torch.inference_mode():
        assert compute_device(model).type == "meta"
        assert model(ids).logits.device.type == "meta"
    assert compute_device(model) == CPU
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_layer_is_there_only_while_it_computes(tiny_model):
    model, seen = tiny_model(), {}
    home = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    ids = torch.randint(2048, (1, 8), generator=torch.Generator().manual_seed(0))  # (B, T)
    plain = model(ids).logits

    def look(module, args):
        away = {name for name, weight in model.named_parameters() if weight.data_ptr() != home[name]}
        seen[id(module)] = (away, {f"{prefix}.weight" for prefix, other in model.named_modules() if other is module})

    with streamed(model, CPU):
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        handles = [linear.register_forward_pre_hook(look) for linear in linears]
        assert torch.equal(model(ids).logits, plain)
        for handle in handles:
            handle.remove()
    assert len(seen) == len(linears) and all(away == own for away, own in seen.values())


def test_an_exception_brings_the_weights_home(tiny_model):
    model = tiny_model()
    home = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    with pytest.raises(IndexError), streamed(model, CPU):
        model(torch.full((1, 4), 9999))
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == home


@pytest.mark.slow
def test_large_layers_share_one_room(monkeypatch):
    """Each copy has the layer's values while it computes; a room is neither too small nor much too large."""
    room, old = placement._Room(), torch.arange(8.0).view(2, 4)  # (O, C)
    with torch.inference_mode():
        first = room.copy(old, torch.float64)
        assert torch.equal(first, old.double()) and not first.is_inference()
    second = room.copy(old[:1] + 5, torch.float64)
    assert second.data_ptr() == first.data_ptr() and torch.equal(second, old[:1].double() + 5)
    sizes = []
    for weight, dtype in ((torch.ones(9), torch.float64), (torch.ones(2), torch.float64), (torch.ones(2), torch.half)):
        assert torch.equal(room.copy(weight, dtype), weight.to(dtype))
        sizes.append((room._numbers.numel(), room._numbers.dtype))
    assert sizes == [(9, torch.float64), (2, torch.float64), (2, torch.half)]


@pytest.mark.parametrize("score", ["obs", "wanda", "fluctuation"])
def test_a_streamed_run_gives_the_same_model(score, tiny_checkpoint, text_path, cpu_accelerator, monkeypatch):
    monkeypatch.setattr(placement, "SMALL_WEIGHT", 100)  # so that layers share a room
    result = []
    for offload in (False, True):
        config = Config.load(overrides={
            "structured.ratio": 0.4, "structured.score": score, "structured.arm": "masked+sink",
            "memory.offload": offload, "calibration.source": str(text_path), "calibration.windows": 3,
            "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
            "structured.split_candidates": 2, "structured.split_windows": 2, "reconstruct.constant": score == "obs",
        })  # fmt: skip
        result.append(prune(load_model(tiny_checkpoint(name=f"{score}-{offload}")), config))
    assert result[0].plan == result[1].plan
    ours, theirs = (pruned.model.state_dict() for pruned in result)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(module._forward_hooks for module in result[1].model.modules())


MASKS = {
    "sparsegpt, refit": {"masking.score": "sink-sparsegpt"},
    "sink-wanda, one pass": {"masking.score": "sink-wanda", "masking.order": "one-shot", "reconstruct.enabled": False},
    "owl": {"masking.score": "magnitude", "masking.allocation": "owl", "reconstruct.enabled": False},
}


@pytest.mark.parametrize("case", MASKS)
def test_streamed_masks_are_the_same(case, tiny_checkpoint, text_path, cpu_accelerator):
    result = []
    for offload in (False, True):
        config = Config.load(overrides=MASKS[case] | {
            "method": "unstructured", "memory.offload": offload, "calibration.source": str(text_path),
            "calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
        })  # fmt: skip
        made = prune(load_model(tiny_checkpoint(name=f"masks-{offload}")), config)
        result.append(made.model.state_dict())
        assert not any(module._forward_hooks for module in made.model.modules())
    assert all(torch.equal(result[0][name], result[1][name]) for name in result[0])
    assert sum(int((value == 0).sum()) for value in result[0].values()) > 1000


def test_what_cannot_be_streamed_is_refused(tiny_checkpoint, tiny_model):
    cpu = ModelSettings(device="cpu")
    assert resolve_resources(cpu, MemorySettings()).stream_target is None
    with pytest.raises(UserError, match="memory.offload streams weights to an accelerator, and the device is cpu"):
        resolve_resources(cpu, MemorySettings(offload=True))
    with pytest.raises(UserError, match="unknown device 'gpu0'"):
        pick_device("gpu0")
    with pytest.raises(UserError, match="unknown device 'gpu0'"):
        load_model(tiny_checkpoint(), device="gpu0")
    config = Config.load(overrides={"structured.score": "taylor", "memory.offload": True, "model.device": "cuda:0"})
    with pytest.raises(UserError, match="taylor.*memory.offload"):
        resolve_structured(config, tiny_model(), dry_run=True)


def test_resources_are_what_the_settings_say():
    """A dry run takes a device that is not on this machine, and a run refuses it; both refuse unknown names."""
    elsewhere = ModelSettings(device="cuda:99", dtype="float16")
    memory = MemorySettings(offload=True, overlap=True, budget_gb=1.5)
    result = resolve_resources(elsewhere, memory, dry_run=True)
    assert result == Resources(torch.device("cuda:99"), True, True, torch.float16, 1_500_000_000)
    assert result.accelerator and result.stream_target == result.device and result.home == CPU
    stays = resolve_resources(elsewhere, MemorySettings(), dry_run=True)
    assert stays.accelerator and stays.stream_target is None and stays.home == stays.device
    with pytest.raises(UserError, match=r"device 'cuda:99' is not on this machine \(\d+ CUDA devices\): use cpu"):
        resolve_resources(elsewhere, memory)
    for name, message in (("gpu0", "unknown device 'gpu0'"), ("meta", "device 'meta' cannot be used")):
        for dry_run in (True, False):
            with pytest.raises(UserError, match=message):
                resolve_resources(ModelSettings(device=name), memory, dry_run)


def test_the_dtype_in_memory_goes_by_the_device():
    cpu, accelerator = Resources(CPU), Resources(torch.device("cuda"))
    assert (cpu.weight_dtype(torch.bfloat16), accelerator.weight_dtype(torch.bfloat16)) == (
        torch.float32, torch.bfloat16,
    )  # fmt: skip
    assert Resources(CPU, dtype=torch.float16).weight_dtype(torch.bfloat16) == torch.float16


def test_only_cuda_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "meta", "cuda:1", "cuda"):
        synchronise(torch.device(name))
    assert waited == [torch.device("cuda:1"), torch.device("cuda")]


def test_seconds_count_what_the_device_still_does(tiny_checkpoint, text_path, monkeypatch):
    """A device that takes 5 s for work, which the call returns before."""
    clock = {"now": 0.0, "busy": 0.0}

    def wait(device):
        clock["now"], clock["busy"] = clock["now"] + clock["busy"], 0.0

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    model = load_model(tiny_checkpoint())
    request = resolve_structured(Config.load(overrides={
        "calibration.source": str(text_path), "calibration.windows": 2, "calibration.held_out": 1,
        "calibration.length": 16, "calibration.interval": 25,
    }), model)  # fmt: skip
    pruner = Pruner(model, replace(request, resources=Resources(torch.device("cuda:0"), offload=True)))

    def work(seconds):
        clock["busy"] += seconds

    work(3.0)  # untimed, and under way when the clock starts
    pruner.timed("scores", lambda: work(5.0))
    pruner.timed("scores", lambda: work(1.0))
    pruner.timed("refit", lambda: work(2.0))
    assert pruner.seconds == {"scores": 6.0, "refit": 2.0}


def test_auto_is_the_stored_dtype(tiny_checkpoint):
    directory = tiny_checkpoint(torch_dtype="bfloat16")
    assert load_model(directory).dtype == torch.float32
    assert load_model(directory, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["cuda:", "cuda:007", "cuda:99999999999", "tpu", "cuda 0"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_malformed_device_is_refused_in_a_dry_run_too(name, dry_run):
    with pytest.raises(UserError, match=f"unknown device '{name}': give cpu or cuda"):
        resolve_resources(ModelSettings(device=name), MemorySettings(), dry_run)
