"""Residual streams that a student learns beside predictions: their error by hand, what is compared, what is refused."""

import pytest
import torch

from structprune.bench.recovery_memory import recovery_memory
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.recovery.blocks import stream_ends
from structprune.recovery.checks import check_settings
from structprune.recovery.objectives import stream_error, streams_error
from structprune.recovery.settings import LossSettings, RecoverConfig
from structprune.recovery.student import Lesson, learning, masked_tokens
from structprune.recovery.teacher import LiveTeacher
from structprune.runs.recover import recover

LENGTH, MASK = 12, 2047


@pytest.fixture
def batch():
    """input_ids and noisy_ids (B, T), every third token masked, and rate (B,)."""
    ids = torch.randint(0, 90, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, ids.masked_fill(torch.arange(LENGTH) % 3 == 1, MASK), torch.full((2,), 0.5)


def loss(student, batch, predictions, **settings):
    ids, noisy, rate = batch
    with learning(student):
        lesson = Lesson(LossSettings(**settings), predictions, 0.5)
        return student(input_ids=ids, noisy_ids=noisy, rate=rate, lesson=lesson)["loss"]


def streams(model, batch) -> list[torch.Tensor]:
    """Behind every block, (B, S, C) each; the last one normed."""
    ids, noisy, _ = batch
    rows, inputs = model.layout.rows(noisy, ids), []
    final = model.encode(rows, keep=inputs, context=model.layout.context(model, rows.shape, rows.device))
    return [*inputs[1:], final]


def test_the_error_by_hand():
    dense = [torch.tensor([[[3.0, 4.0], [1.0, 1.0]]]), torch.ones(1, 2, 2)]  # 2 x (B, T, C)
    student = [torch.tensor([[[3.0, 4.0], [1.0, 2.0]]]), torch.zeros(1, 2, 2)]
    # tokens of the first block: 0 / 12.5 and 0.5 / 1; of the second: 1 and 1
    assert streams_error(student, dense).item() == pytest.approx((0.25 + 1) / 2)
    with pytest.raises(ValueError):
        streams_error(student, dense[:1])


def test_blocks_are_compared_behind_those_whose_work_they_do():
    assert stream_ends((0, 1, 2), 3) == [0, 1]
    assert stream_ends((0, 2, 3), 5) == [1, 2] and stream_ends((1,), 3) == []


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_the_loss_and_its_gradient_by_hand(tiny_model, batch, family):
    student, teacher = tiny_model(family, seed=1), tiny_model(family)
    ids, noisy, _ = batch
    masked, depth = masked_tokens(student, ids, noisy), len(teacher.blocks)
    plain = LiveTeacher(teacher).predict((ids, noisy), masked, None)
    live = LiveTeacher(teacher, range(depth - 1)).predict((ids, noisy), masked, None)
    assert torch.allclose(live.states, plain.states, atol=1e-5) and len(live.streams) == depth - 1
    own = loss(student, batch, live, streams=3.0)
    own.backward()
    gradients = [each.grad.clone() for each in student.blocks[0].parameters()]
    student.zero_grad()
    with torch.no_grad():
        targets = streams(teacher, batch)
    errors = [stream_error(one, other).mean() for one, other in zip(streams(student, batch)[:-1], targets)]
    expected = loss(student, batch, plain) + 3 * sum(errors) / (depth - 1)
    assert own.item() == pytest.approx(expected.item(), rel=1e-5) and float(errors[0].detach()) > 0
    expected.backward()
    for one, parameter in zip(gradients, student.blocks[0].parameters()):
        assert torch.allclose(one, parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_dense_student_has_no_error(tiny_model, batch):
    model = tiny_model("llada")
    ids, noisy, _ = batch
    live = LiveTeacher(model, [0, 1]).predict((ids, noisy), masked_tokens(model, ids, noisy), None)
    assert loss(model, batch, live, streams=5.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_recovery_learns_from_streams(pair, recover_config, tmp_path, method):
    dense, small = pair()
    results = {}
    for weight in (0.0, 2.0):
        config = recover_config(loss__streams=weight, train__method=method, train__checkpointing=True)
        results[weight] = recover(str(small), str(dense), tmp_path / f"out-{weight}", config).report
    assert results[2.0]["after"]["kl"] != results[0.0]["after"]["kl"]
    assert all(report["after"]["kl"] < report["before"]["kl"] for report in results.values())


def test_what_cannot_learn_streams_is_refused(pair, tiny_checkpoint, recover_config, tmp_path):
    dense, small = pair()
    cases = {
        "teacher.cache = .* keeps predictions alone: leave it out, or loss.streams = 1": {
            "teacher__cache": str(tmp_path / "cache")
        },
        "loss.streams = 1.0 has no effect without loss.kl above 0": {"loss__kl": 0.0, "loss__cross_entropy": 1.0},
    }
    for reason, keys in cases.items():
        with pytest.raises(UserError, match=reason):
            recover(str(small), str(dense), tmp_path / "out", recover_config(loss__streams=1.0, **keys))
    only_blocks = {"loss.streams": 1.0, "train.tokens": 0, "blocks.tokens": 2**14}
    with pytest.raises(UserError, match=r"loss.streams = 1.0 has no effect without train.tokens above 0"):
        check_settings(RecoverConfig.load(overrides=only_blocks))
    one = tiny_checkpoint("llada", name="one", n_layers=1)
    with pytest.raises(UserError, match="loss.streams = 1 is of all blocks but the last, and 'one' has one: leave"):
        recover(str(one), str(one), tmp_path / "out", recover_config(loss__streams=1.0))
    assert not list(tmp_path.glob("out*"))


def test_their_memory_by_hand(tiny_model):
    student, teacher = Adapter(tiny_model(mlp_hidden_size=24)), Adapter(tiny_model())
    keys = {"data.length": 16, "train.pass_windows": 2}
    dtypes = (torch.float32, torch.bfloat16)
    with_streams = recovery_memory(student, teacher, RecoverConfig.load(overrides=keys | {"loss.streams": 1.0}), dtypes)
    without = recovery_memory(student, teacher, RecoverConfig.load(overrides=keys), dtypes)
    assert with_streams["streams of a pass"] == 2 * 16 * 2 * 32 * (2 + 4)  # two of three blocks
    assert with_streams["peak"] - without["peak"] == with_streams["streams of a pass"]
