"""The first stage of a recovery, block by block: its targets, what it gains, keeps and refuses, and how it goes on."""

import json
from dataclasses import replace

import pytest
import torch

from structprune.checkpoint.save import save_pruned
from structprune.config import Config
from structprune.errors import UserError
from structprune.masking.masks import Masks
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.progress import untracked
from structprune.recovery.blocks import (
    BlockRows,
    BlockStage,
    block_rows,
    dense_spans,
    inside,
    load_blocks,
    remaining_blocks,
)
from structprune.recovery.folder import block_path, has_learnt, open_folder, training_folder
from structprune.recovery.text import RecoveryText
from structprune.runs.checkpoints import mask_checkpoint
from structprune.runs.recover import recover
from structprune.structured.plan import BlockPlan, identity_plan
from structprune.structured.surgery import apply_plan

CPU, STEP = torch.device("cpu"), 16 * 8  # tokens of a step
ONLY = {  # a training block by block alone
    "blocks__tokens": 6 * STEP, "train__tokens": 0, "train__method": "lora", "train__learning_rate": 5e-4,
    "train__evaluations": 10, "blocks__learning_rate": 1e-3,
}  # fmt: skip


class Killed(BaseException):
    """A run that ends at once."""


def weights(directory):
    return load_model(directory, device="cpu").state_dict()


@pytest.fixture
def stage(tiny_model, recover_config):
    """`stage(student, dense, remaining, **changes)` -> a stage over seeded rows, and these rows."""

    def make(student, dense, remaining, **changes):
        config = recover_config(**{"blocks__tokens": 4 * STEP, "blocks__learning_rate": 1e-3} | changes)
        text = RecoveryText(*torch.randint(0, 2000, (2, 6, 16), generator=torch.Generator().manual_seed(4)))
        rows = block_rows(text, student, config)
        return BlockStage((student, dense), remaining, rows, config, CPU), rows

    return make


@pytest.fixture
def shallow(tmp_path, tiny_checkpoint):
    """Directories of a dense model of four blocks, and of one that lost the second and half the channels."""
    dense = tiny_checkpoint(n_layers=4)
    model = load_model(dense, device="cpu")
    plan = identity_plan(Adapter(model))
    blocks = [replace(each, channels=each.channels[::2]) for each in plan.blocks]
    blocks[1] = BlockPlan((), (), ())
    plan = replace(plan, blocks=tuple(blocks))
    small = save_pruned(apply_plan(model, plan), tmp_path / "shallow")
    plan.save(small / "plan.json")
    return dense, small


@torch.no_grad()
def relative_error(student, dense, rows: BlockRows):
    """Of the streams before the final norm, over the held-out rows, in whole forward passes."""
    ids, weight = rows.ids[rows.learnt :], rows.weight[rows.learnt :]
    streams = []
    for model in (student, dense):
        norm, model.model.transformer["ln_f"] = model.final_norm, torch.nn.Identity()
        streams.append(model.encode(ids))  # (n, T, C)
        model.model.transformer["ln_f"] = norm
    own, target = streams
    error = ((own - target) ** 2).sum(-1) / (target**2).sum(-1)  # (n, T)
    return float((error * weight).sum() / weight.sum())


def test_spans_of_dense_blocks():
    assert dense_spans((0, 1, 2), 3) == [range(0, 1), range(1, 2), range(2, 3)]
    # the first also stands for block 0, the second for 3, and the last for 5 and 6
    assert dense_spans((1, 2, 4), 7) == [range(0, 2), range(2, 4), range(4, 7)]


def test_remaining_blocks_are_those_of_the_plan(shallow, tiny_checkpoint):
    dense, small = (Adapter(load_model(path, device="cpu")) for path in shallow)
    assert remaining_blocks(shallow[1], small, dense) == (0, 2, 3)
    assert remaining_blocks(shallow[0], dense, dense) == (0, 1, 2, 3)
    (shallow[1] / "plan.json").unlink()
    with pytest.raises(
        UserError, match="has 3 blocks and the teacher 4, and no plan.json .* leave blocks.tokens and loss.streams out"
    ):
        remaining_blocks(shallow[1], small, dense)
    wide = Adapter(load_model(tiny_checkpoint(name="wide", d_model=64), device="cpu"))
    with pytest.raises(UserError, match="stream has 32 features and the teacher's 64"):
        remaining_blocks(shallow[1], small, wide)


def test_rows_are_the_first_of_the_training_and_noisy_held_out_windows(tiny_model, recover_config):
    text = RecoveryText(torch.arange(96).view(6, 16), torch.arange(200, 296).view(6, 16))
    rows = block_rows(text, tiny_model(), recover_config(blocks__tokens=2 * STEP + 5, blocks__visible=0.0))
    assert rows.learnt == 16 and rows.ids.shape == rows.weight.shape == (16 + 6 * 2, 16)
    masked = rows.ids == 2047
    assert torch.equal(rows.weight, 2.0 * masked) and 0.3 < masked.float().mean() < 0.7
    clean = [ids[~each] for ids, each in zip(rows.ids, masked)]
    assert all((each < 96).all() for each in clean[:16]) and all((each >= 200).all() for each in clean[16:])


@pytest.mark.parametrize("remaining", [(0, 1, 2), (0, 2)])
def test_errors_are_those_of_whole_forward_passes(stage, tiny_model, tmp_path, remaining):
    """Each block learns on the trained prefix, and the last one's error is that of the whole model."""
    dense, student = tiny_model(), tiny_model(n_layers=len(remaining), mlp_hidden_size=24, seed=3)
    for own, index in zip(student.blocks, remaining):  # as pruned: the first half of the channels
        with torch.no_grad():
            for name, value in own.named_parameters():
                value.copy_(dict(dense.blocks[index].named_parameters())[name][tuple(map(slice, value.shape))])
    student.embedding.weight.data.copy_(dense.embedding.weight)
    run, rows = stage(student, dense, remaining)
    before = relative_error(student, dense, rows)
    run.complete(tmp_path, None, untracked)
    figures = load_blocks(tmp_path, Adapter(student))
    assert [each["block"] for each in figures] == list(remaining)
    assert all(each["after"] < 0.9 * each["before"] and each["kept"] == "trained" for each in figures)
    after = relative_error(student, dense, rows)
    assert after == pytest.approx(figures[-1]["after"], rel=1e-4) and after < 0.8 * before


def test_a_block_that_gains_nothing_keeps_its_weights(stage, tiny_model, tmp_path):
    dense, student = tiny_model(), tiny_model(mlp_hidden_size=24)
    state = {name: value.clone() for name, value in student.state_dict().items()}
    run, _ = stage(student, dense, (0, 1, 2), blocks__learning_rate=100.0, train__clip=100.0)
    run.complete(tmp_path, None, untracked)
    figures = load_blocks(tmp_path, Adapter(student))
    assert [each["kept"] for each in figures] == ["input"] * 3
    assert all(each["before"] == each["after"] for each in figures)
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


def test_streams_in_files_and_in_memory_give_the_same(stage, tiny_model, tmp_path):
    results = []
    for budget in (1e-9, 1.0):
        student = tiny_model(mlp_hidden_size=24)
        run, _ = stage(student, tiny_model(), (0, 1, 2), blocks__budget_gb=budget)
        run.complete(tmp_path / str(budget), None, untracked)
        results.append(student.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_masks_inside_a_block():
    packed = {name: torch.tensor([[1]], dtype=torch.uint8) for name in ("blocks.1.up.weight", "blocks.10.up.weight")}
    own = inside(Masks(packed, dict.fromkeys(packed, (1, 1))), "blocks.1.")
    assert list(own.packed) == list(own.shapes) == ["up.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_killed_stage_goes_on_at_its_block_to_the_same_weights(pair, recover_config, tmp_path, monkeypatch, block):
    dense, small = pair()
    config = recover_config(blocks__tokens=4 * STEP, blocks__learning_rate=1e-3, train__tokens=2 * STEP)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    report = recover(str(small), str(dense), whole, config).report
    learn, learnt = BlockStage._learn, []

    def mortal(self, view, *args):
        if view.index == block and len(learnt) == block:
            learnt.append("killed")
            raise Killed
        learnt.append(view.index)
        return learn(self, view, *args)

    monkeypatch.setattr(BlockStage, "_learn", mortal)
    with pytest.raises(Killed):
        recover(str(small), str(dense), cut, config)
    assert has_learnt(training_folder(cut)) == (block > 0) and not cut.exists()
    again = recover(str(small), str(dense), cut, config).report
    assert learnt == [*range(block), "killed", *range(block, 3)]
    assert again["blocks"]["layers"] == report["blocks"]["layers"] and again["blocks"]["resumed_at"] == block
    assert again["history"] == report["history"] and again["after"] == report["after"]
    assert (f" s from block {block} on, after" in (cut / "README.md").read_text(encoding="utf-8")) == (block > 0)
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(cut).items())


def test_finished_blocks_belong_to_their_training(tmp_path):
    folder = open_folder(tmp_path / "out", {"of": "this"}, False)
    block_path(folder, 0).parent.mkdir()
    block_path(folder, 0).touch()
    assert open_folder(tmp_path / "out", {"of": "this"}, False) == folder and block_path(folder, 0).exists()
    with pytest.raises(UserError, match="holds another training"):
        open_folder(tmp_path / "out", {"of": "that"}, False)


def test_a_damaged_block_is_learnt_again(stage, tiny_model, tmp_path):
    student = tiny_model(mlp_hidden_size=24)
    run, _ = stage(student, tiny_model(), (0, 1, 2))
    run.complete(tmp_path, None, untracked)
    path = block_path(tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    again = tiny_model(mlp_hidden_size=24)
    assert len(load_blocks(tmp_path, Adapter(again))) == 1
    stage(again, tiny_model(), (0, 1, 2))[0].complete(tmp_path, None, untracked)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_recovery_block_by_block_alone(shallow, recover_config, tmp_path):
    dense, small = shallow
    report = recover(str(small), str(dense), tmp_path / "out", recover_config(**ONLY)).report
    assert report["tokens"] == report["blocks"]["tokens"] == 6 * STEP and report["learnt"]["steps"] == 0
    assert [each["block"] for each in report["blocks"]["layers"]] == [0, 2, 3] and report["history"] == []
    assert report["kept"] == "trained" and report["after"] == report["blocks"]["held_out"]
    before, after = weights(small), weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "blocks." in name}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "768 tokens of `text.txt` (768 of them block by block, in all weights of each)" in card
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["recoveries"][0]
    assert written["blocks"]["layers"] == report["blocks"]["layers"] and not training_folder(tmp_path / "out").exists()


LORA = {  # family -> steps and learning rate
    **dict.fromkeys(("llada", "dream", "a2d-qwen3", "llada2"), (4, 2e-3)),
    **dict.fromkeys(("a2d-qwen3-blocks", "sdar"), (12, 2e-3)), "llada-moe": (24, 1e-3),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", LORA)
def test_lora_goes_on_from_the_blocks(pair, recover_config, tmp_path, family):
    """The first steps of block diffusion, and of experts that few tokens see, lose a little before they gain."""
    (dense, small), (steps, rate) = pair(family), LORA[family]
    config = recover_config(
        blocks__tokens=4 * STEP, blocks__learning_rate=1e-3, train__method="lora", train__rank=4,
        train__tokens=steps * STEP, train__learning_rate=rate,
    )  # fmt: skip
    report = recover(str(small), str(dense), tmp_path / "out", config).report
    assert report["tokens"] == (4 + steps) * STEP and report["blocks"]["held_out"]["kl"] < report["before"]["kl"]
    assert report["kept"] == "trained" and report["after"]["kl"] < report["blocks"]["held_out"]["kl"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_second_stage_that_gains_nothing_is_left_out(pair, recover_config, tmp_path, method):
    dense, small = pair()
    config = recover_config(
        blocks__tokens=4 * STEP, blocks__learning_rate=1e-3, train__method=method, train__tokens=2 * STEP,
        train__learning_rate=10.0, train__clip=100.0,
    )  # fmt: skip
    report = recover(str(small), str(dense), tmp_path / "out", config).report
    assert report["kept"] == "blocks" and report["after"] == report["blocks"]["held_out"]
    assert report["after"]["kl"] < report["before"]["kl"] < min(each["kl"] for each in report["history"])
    before, after = weights(small), weights(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "blocks." in name
    }
    assert "are those of the first, block by block" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_zeros_of_a_masked_checkpoint_stay(tiny_checkpoint, recover_config, tmp_path, text_path):
    dense, sparse = tiny_checkpoint(), tmp_path / "sparse"
    keys = {
        "method": "unstructured", "masking.ratio": 0.5, "calibration.source": str(text_path), "calibration.windows": 3,
        "calibration.held_out": 2, "calibration.length": 16, "model.device": "cpu",
    }  # fmt: skip
    mask_checkpoint(str(dense), sparse, Config.load(overrides=keys))
    report = recover(str(sparse), str(dense), tmp_path / "out", recover_config(**ONLY)).report
    assert report["kept"] == "trained"
    before, after = weights(sparse), weights(tmp_path / "out")
    for name in Masks.load(tmp_path / "out" / "masks.safetensors").packed:
        assert torch.equal(before[name] == 0, after[name] == 0) and not torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"blocks__tokens": 100}, "blocks.tokens = 100 is less than a step of .* = 128 tokens"),
        ({"blocks__learning_rate": 0.1}, "blocks.learning_rate = 0.1 has no effect without blocks.tokens above 0"),
        ({"blocks__budget_gb": 1.0}, "blocks.budget_gb = 1.0 has no effect without blocks.tokens above 0"),
        ({"blocks__tokens": STEP, "blocks__offload": True}, "blocks.offload = true has no effect on a CPU"),
        (ONLY | {"train__method": "full"}, "train.method = full has no effect without train.tokens above 0"),
        (ONLY | {"train__patience": 2}, "train.patience = 2 has no effect without train.tokens above 0"),
        (ONLY | {"loss__temperature": 2}, "loss.temperature = 2.0 has no effect without train.tokens above 0"),
        ({"train__tokens": 0}, "train.tokens = 0 is less than a step"),
    ],
)
def test_contradictions_are_refused(pair, recover_config, tmp_path, keys, reason):
    dense, small = pair()
    with pytest.raises(UserError, match=reason):
        recover(str(small), str(dense), tmp_path / "out", recover_config(**keys))
    assert not list(tmp_path.glob("out*"))
