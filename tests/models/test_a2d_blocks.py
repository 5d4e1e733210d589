"""A2D checkpoints trained as BD3LM: the same files as others, and a block size that the user gives."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from structprune import Config, UserError, load_model, save_pruned
from structprune.config import ExportSettings, ModelSettings
from structprune.generation.generate import generate
from structprune.generation.samplers import generation_settings
from structprune.models.adapter import Adapter
from structprune.models.encode import encode_rows
from structprune.models.layers_structprune import Layout
from structprune.runs.checkpoints import mask_checkpoint, prune_checkpoint
from structprune.runs.ghost import read_ghost
from structprune.runs.recover import check_pair
from tests.conftest import PARITY

RECORDED = PARITY / "a2d-qwen3"
IDS = torch.arange(22).view(2, 11)  # (B, T)


@pytest.fixture(scope="module")
def recorded():
    """What dllm's block diffusion code computed on the checkpoint, with blocks of four tokens."""
    return load_file(RECORDED / "blocks.safetensors")


@torch.no_grad()
def test_one_pass_over_pairs_is_the_released_one(recorded):
    model, clean = load_model(RECORDED, block_size=4), recorded["clean_ids"]  # (N, T)
    states = encode_rows(model, model.layout.rows(recorded["noisy_ids"], clean))  # (N, 2 T, C)
    logits = model.output_head(states[:, : clean.shape[1]])  # (N, T, V)
    assert (logits - recorded["logits"]).abs().max() < 1e-5
    whole = load_model(RECORDED)  # full attention without a size of blocks
    assert type(whole.layout) is Layout
    assert (whole(recorded["noisy_ids"]).logits - recorded["logits"]).abs().max() > 0.1


def test_tokens_are_those_of_the_released_sampler(recorded):
    """For prompts of whole blocks; the random model also writes its mask token, which stays."""
    model = load_model(RECORDED, block_size=4)
    cases = json.loads((RECORDED / "cases.json").read_text())["blocks"]["generate"]
    assert len(cases) == 3
    for case in cases:
        name = case.pop("name")
        prompts, texts = recorded[f"{name}/prompt"], recorded[f"{name}/output"]
        assert torch.equal(generate(model, prompts, generation_settings(model.config, case)), texts), name
        assert torch.equal(model.generate(prompts, **case), texts), name


@pytest.mark.parametrize("family, kind", [("a2d-qwen3", "qwen3"), ("a2d-llama", "llama"), ("a2d-qwen2", "qwen2")])
def test_what_is_written_knows_its_blocks(tiny_checkpoint, tmp_path, family, kind):
    model = load_model(tiny_checkpoint(family), block_size=4)
    assert Adapter(model).family.name == f"a2d-{kind}-blocks" and model.layout.size == 4
    for compat in ("free", "official"):
        directory = save_pruned(model, tmp_path / compat, export=ExportSettings(compat=compat))
        values = json.loads((directory / "config.json").read_text())
        assert values["block_size"] == 4
        assert values["model_type"] == (family if compat == "official" else f"structprune_a2d_{kind}_blocks")
        again = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        with torch.no_grad():
            expected = model(IDS).logits  # (B, T, V)
            assert torch.equal(again(IDS).logits, expected)
            assert torch.equal(load_model(directory, block_size=4)(IDS).logits, expected)
            assert torch.equal(load_model(directory)(IDS).logits, expected)


def test_a_run_that_is_told_the_size(tiny_checkpoint, text_path, tmp_path):
    keys = {
        "model.block_size": 4, "model.device": "cpu", "calibration.source": str(text_path), "calibration.windows": 3,
        "calibration.held_out": 2, "calibration.length": 15, "calibration.interval": 25, "structured.ratio": 0.3,
    }  # fmt: skip
    prune_checkpoint(str(tiny_checkpoint("a2d-qwen3")), tmp_path / "out", Config.load(overrides=keys))
    model = load_model(tmp_path / "out")
    assert model.layout.size == 4 and Adapter(model).family.name == "a2d-qwen3-blocks"
    (text,) = generate(model, [IDS[0]], generation_settings(model.config, {"gen_length": 6, "steps": 6}))
    assert torch.equal(text, model.generate(IDS[:1], gen_length=6, steps=6)[0])


def test_a_teacher_is_told_the_size_too(tiny_checkpoint, tmp_path):
    dense = tiny_checkpoint("a2d-qwen3")
    small = save_pruned(load_model(dense, block_size=4), tmp_path / "small")
    student, teacher = (read_ghost(folder, ModelSettings()) for folder in (small, dense))
    with pytest.raises(UserError, match="'small' works in blocks, and 'a2d-qwen3-tiny' .*: give --block-size 4"):
        check_pair(student, teacher)
    check_pair(student, read_ghost(dense, ModelSettings(block_size=4)))


def test_masks_are_told_the_size(tiny_checkpoint, text_path, tmp_path):
    """The source's files are written again, but config.json has the size."""
    dense = tiny_checkpoint("a2d-qwen3")
    keys = {
        "method": "unstructured", "masking.ratio": 0.5, "model.block_size": 4, "calibration.source": str(text_path),
        "calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 15, "model.device": "cpu",
    }  # fmt: skip
    mask_checkpoint(str(dense), tmp_path / "out", Config.load(overrides=keys))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (dense, tmp_path / "out"))
    assert after == before | {"block_size": 4} and load_model(tmp_path / "out").layout.size == 4


@pytest.mark.parametrize(
    "family, size, changes, reason",
    [
        ("a2d-qwen3", 0, {}, r"--block-size 0 \(model.block_size\) is not a number of tokens below the model's 64"),
        ("a2d-qwen3", 64, {}, "--block-size 64 .* is not a number of tokens below the model's 64 positions"),
        ("a2d-qwen3", True, {}, "--block-size True .* is not a number of tokens"),
        ("a2d-qwen3", 8, {"block_size": 4}, "config.json has block_size = 4: leave out --block-size 8"),
        ("a2d-qwen3", 8, {"right_shift_logits": True}, "right_shift_logits = True is not supported"),
        ("sdar", 8, {}, "config.json has block_size = 4: leave out --block-size 8"),
        ("llada", 8, {}, "--block-size 8 .* is for block diffusion models, and 'llada' is none: leave it out"),
        ("dream", 8, {}, "and 'Dream' is none: leave it out"),
    ],
)
def test_a_size_that_cannot_be(tiny_checkpoint, family, size, changes, reason):
    with pytest.raises(UserError, match=reason):
        load_model(tiny_checkpoint(family, **changes), block_size=size)
