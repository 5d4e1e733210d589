"""LLaDA2 through whole runs on a tiny checkpoint: masks in its own layout, text, and trainings that keep either."""

import json

import pytest
import torch
from safetensors.torch import load_file

import structprune
from structprune import load_model
from structprune.config import Config
from structprune.generation.generate import Options
from structprune.generation.generate import generate as denoise
from structprune.generation.samplers import generation_settings
from structprune.masking import Masks
from structprune.recovery.settings import RecoverConfig
from structprune.runs.checkpoints import mask_checkpoint
from structprune.runs.generate import generate
from structprune.runs.recover import recover

JOINED = "model.layers.1.attention.query_key_value.weight"
SHORT = {
    "model.device": "cpu", "data.length": 16, "data.held_out": 6, "data.noise": 2, "train.tokens": 16 * 8 * 6,
    "train.batch": 8, "train.pass_windows": 4, "train.learning_rate": 3e-3, "train.evaluations": 2,
}  # fmt: skip


@pytest.fixture
def config(text_path):
    """`config(**keys)` -> of a pruning of a moment."""

    def make(**keys) -> Config:
        values = {"calibration.source": str(text_path), "calibration.windows": 4, "calibration.held_out": 2}
        values |= {"calibration.length": 16, "calibration.interval": 25, "model.device": "cpu"}
        return Config.load(overrides=values | {key.replace("__", "."): value for key, value in keys.items()})

    return make


@pytest.fixture
def training(text_path) -> RecoverConfig:
    return RecoverConfig.load(overrides=SHORT | {"data.source": str(text_path)})


@pytest.mark.parametrize("offload", [False, "disk"])
def test_masks_are_written_under_the_names_of_the_files(tiny_checkpoint, tmp_path, config, offload):
    dense, out = tiny_checkpoint("llada2"), tmp_path / "out"
    keys = {"method": "nm", "masking__score": "wanda", "memory__offload": offload}
    mask_checkpoint(str(dense), out, config(**keys))
    masks, after = Masks.load(out / "masks.safetensors"), load_file(out / "model.safetensors")
    before = load_file(dense / "model.safetensors")
    assert before.keys() == after.keys() and len(masks.shapes) == 3 * 2 + 3 + 2 * 9 * 3  # joined, dense and of MLPs
    for name in masks.shapes:
        keep = masks.kept(name)
        assert torch.equal(after[name] != 0, keep) and (keep.unflatten(1, (-1, 4)).sum(-1) == 2).all(), name
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - masks.shapes.keys())
    report = json.loads((out / "report.json").read_text())
    assert {fit["kind"] for fit in report["refit"]} >= {"query", "down.shared", "down.7", "down"}
    assert report["sparsity"]["masked"] == pytest.approx(0.5)


@pytest.mark.slow
def test_training_keeps_masks_and_layout(tiny_checkpoint, tmp_path, config, training):
    dense, out, better = tiny_checkpoint("llada2"), tmp_path / "out", tmp_path / "better"
    mask_checkpoint(str(dense), out, config(method="unstructured", reconstruct__enabled=False))
    report = recover(str(out), str(dense), better, training).report
    assert report["kept"] == "trained" and report["after"]["kl"] < report["before"]["kl"]
    before, after = (load_file(each / "model.safetensors") for each in (out, better))
    assert before.keys() == after.keys() and not torch.equal(before[JOINED], after[JOINED])
    masks = Masks.load(better / "masks.safetensors")
    assert all((after[name][~masks.kept(name)] == 0).all() for name in masks.shapes) and JOINED in masks.shapes
    biases = [name for name in before if name.endswith("expert_bias")]
    assert len(biases) == 2 and all(torch.equal(before[name], after[name]) for name in biases)


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["free", "official"])
def test_a_cut_model_is_trained_back_in_its_layout(tiny_checkpoint, tmp_path, config, training, compat):
    dense, small, better = tiny_checkpoint("llada2"), tmp_path / "small", tmp_path / "better"
    keys = {"structured__ratio": 0.4, "structured__allocation": "uniform", "structured__split": 0}
    keys |= {"structured__experts": 2, "structured__score": "magnitude", "structured__shared": 8}
    keys |= {"structured__round_to": 8, "reconstruct__enabled": False, "export__compat": compat}
    structprune.prune(load_model(dense), config(**keys)).save(small)
    training = training.model_copy(update={"train": training.train.model_copy(update={"method": "lora", "rank": 4})})
    report = recover(str(small), str(dense), better, training).report
    assert report["kept"] == "trained" and report["after"]["kl"] < report["before"]["kl"]
    before, after = (load_file(each / "model.safetensors") for each in (small, better))
    assert before.keys() == after.keys() and (JOINED in after) == (compat == "official")
    assert (small / "config.json").read_bytes() == (better / "config.json").read_bytes()


def test_text_is_the_samplers_blocks(tiny_checkpoint):
    """The sampler stops at a number of tokens that is none of blocks, and reveals all that are sure."""
    model = load_model(tiny_checkpoint("llada2"))
    result = generate(model, "The server is", gen_length=10, threshold=0.02)
    prompt = torch.tensor(structprune.load_tokenizer(model.source.directory)("The server is")["input_ids"])
    settings = generation_settings(model.config, {"gen_length": 10, "steps": 10, "threshold": 0.02})
    (text,) = denoise(model, [prompt], settings)
    (cached,) = denoise(model, [prompt], settings, options=Options(cache="prefix"))
    assert torch.equal(cached, text)  # blocks that are finished do not see later ones
    assert torch.equal(text[len(prompt) :], result.ids)
    assert torch.equal(model.generate(prompt[None], gen_length=10, steps=10, threshold=0.02)[0], text)
