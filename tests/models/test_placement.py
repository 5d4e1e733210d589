"""Streamed weights: one layer's copy at the device at a time, the originals untouched, the same numbers."""

import pytest
import torch

from structprune.config import Config
from structprune.errors import UserError
from structprune.models.loading import load_model
from structprune.models.placement import compute_device, pick_device, stream_target, streamed, synchronise
from structprune.runs import mask as mask_pipeline
from structprune.runs import prune as pipeline

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llada", "dream"])
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


@pytest.mark.parametrize("score", ["obs", "wanda", "fluctuation"])
def test_a_streamed_run_gives_the_same_model(score, tiny_checkpoint, text_path, monkeypatch):
    monkeypatch.setattr(pipeline, "stream_target", lambda offload, device: CPU if offload else None)
    found = []
    for offload in (False, True):
        config = Config.load(overrides={
            "structured.ratio": 0.4, "structured.score": score, "structured.arm": "masked+sink",
            "memory.offload": offload, "calibration.source": str(text_path), "calibration.windows": 3,
            "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
            "structured.split_candidates": 2, "structured.split_windows": 2, "reconstruct.constant": score == "obs",
        })  # fmt: skip
        found.append(pipeline.prune(load_model(tiny_checkpoint(name=f"{score}-{offload}")), config))
    assert found[0].plan == found[1].plan
    ours, theirs = (pruned.model.state_dict() for pruned in found)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(module._forward_hooks for module in found[1].model.modules())


MASKS = {
    "sparsegpt, refit": {"masking.score": "sink-sparsegpt"},
    "sink-wanda, one pass": {"masking.score": "sink-wanda", "masking.order": "one-shot", "reconstruct.enabled": False},
    "owl": {"masking.score": "magnitude", "masking.allocation": "owl", "reconstruct.enabled": False},
}


@pytest.mark.parametrize("case", MASKS)
def test_streamed_masks_are_the_same(case, tiny_checkpoint, text_path, monkeypatch):
    monkeypatch.setattr(mask_pipeline, "stream_target", lambda offload, device: CPU if offload else None)
    found = []
    for offload in (False, True):
        config = Config.load(overrides=MASKS[case] | {
            "method": "unstructured", "memory.offload": offload, "calibration.source": str(text_path),
            "calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
        })  # fmt: skip
        made = pipeline.prune(load_model(tiny_checkpoint(name=f"masks-{offload}")), config)
        found.append(made.model.state_dict())
        assert not any(module._forward_hooks for module in made.model.modules())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert sum(int((value == 0).sum()) for value in found[0].values()) > 1000


def test_what_cannot_be_streamed_is_refused(tiny_checkpoint, monkeypatch):
    assert stream_target(False, "cpu") is None
    with pytest.raises(UserError, match="memory.offload streams weights to an accelerator, and the device is cpu"):
        stream_target(True, "cpu")
    with pytest.raises(UserError, match="unknown device 'gpu0'"):
        pick_device("gpu0")
    with pytest.raises(UserError, match="unknown device 'gpu0'"):
        load_model(tiny_checkpoint(), device="gpu0")
    monkeypatch.setattr(pipeline, "stream_target", lambda offload, device: CPU)
    config = Config.load(overrides={"structured.score": "taylor", "memory.offload": True})
    with pytest.raises(UserError, match="taylor.*memory.offload"):
        pipeline.check_request(load_model(tiny_checkpoint()), config)


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
    monkeypatch.setattr(pipeline, "stream_target", lambda offload, device: torch.device("cuda:0"))
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: clock["now"])
    pruner = pipeline.Pruner(load_model(tiny_checkpoint()), Config.load(overrides={
        "calibration.source": str(text_path), "calibration.windows": 2, "calibration.held_out": 1,
        "calibration.length": 16, "calibration.interval": 25,
    }))  # fmt: skip

    def work(seconds):
        clock["busy"] += seconds

    work(3.0)  # untimed, and under way when the clock starts
    pruner._timed("scores", lambda: work(5.0))
    pruner._timed("scores", lambda: work(1.0))
    pruner._timed("refit", lambda: work(2.0))
    assert pruner.seconds == {"scores": 6.0, "refit": 2.0}


def test_auto_is_the_stored_dtype(tiny_checkpoint):
    directory = tiny_checkpoint(torch_dtype="bfloat16")
    assert load_model(directory).dtype == torch.float32
    assert load_model(directory, dtype="auto").dtype == torch.bfloat16
