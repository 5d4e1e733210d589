"""The losses of a recovery, by hand."""

import math

import pytest
import torch

from structprune.recovery.objectives import (
    cross_entropy,
    forward_kl,
    log_predictions,
    moving_target,
    stream_error,
    stream_weights,
    teacher_share,
    token_weights,
)

LOG2 = math.log(2)


def logs(*rows):
    return torch.tensor(rows).log()


def test_predictions_are_in_fp32_at_a_temperature():
    logits = torch.tensor([[math.log(1.0), math.log(9.0)]], dtype=torch.bfloat16)
    assert log_predictions(logits).dtype == torch.float32
    # at temperature 2 the odds 9 : 1 become 3 : 1
    assert torch.allclose(log_predictions(logits, 2.0).exp(), torch.tensor([[0.25, 0.75]]), atol=2e-3)


def test_kl_by_hand():
    log_p, log_q = logs([0.5, 0.5, 0.0], [1.0, 0.0, 0.0]), logs([0.25, 0.5, 0.25], [0.5, 0.25, 0.25])
    # 0.5 log(0.5 / 0.25) + 0.5 log 1; and log(1 / 0.5)
    assert torch.allclose(forward_kl(log_p, log_q), torch.tensor([0.5 * LOG2, LOG2]))
    assert torch.allclose(forward_kl(log_p, log_q, 3.0), 9 * forward_kl(log_p, log_q))


def test_the_gradient_of_kl_is_the_difference_of_predictions():
    teacher, student = torch.tensor([[1.0, -1.0, 0.5]]), torch.tensor([[0.2, 0.3, -0.4]], requires_grad=True)
    forward_kl(log_predictions(teacher), log_predictions(student)).sum().backward()
    assert torch.allclose(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), atol=1e-6)


def test_a_moving_target_lies_between_both_and_has_no_gradient():
    log_p = logs([1.0, 0.0])
    log_q = logs([0.5, 0.5]).requires_grad_()
    target = moving_target(log_p, log_q, 0.25)
    # 0.25 · (1, 0) + 0.75 · (0.5, 0.5)
    assert torch.allclose(target.exp(), torch.tensor([[0.625, 0.375]])) and not target.requires_grad
    assert torch.allclose(moving_target(log_p, log_q, 1.0).exp(), log_p.exp())
    assert torch.allclose(moving_target(log_p, log_q, 0.0), log_q.detach())
    by_row = moving_target(log_p.expand(2, 2), log_q.expand(2, 2), torch.tensor([0.0, 1.0]))
    assert torch.allclose(by_row.exp(), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))


def test_the_teachers_share_grows_and_is_less_where_much_is_masked():
    p = torch.tensor([0.0, 0.5, 1.0])
    assert teacher_share(0.0, p, 0.4, 0.0).tolist() == pytest.approx([0.4, 0.4, 0.4])
    assert teacher_share(0.0, p, 0.4, 0.5).tolist() == pytest.approx([0.4, 0.3, 0.2])
    assert teacher_share(0.5, p, 0.4, 0.5).tolist() == pytest.approx([0.7, 0.7 * 0.875, 0.7 * 0.75])
    assert teacher_share(1.0, p, 0.4, 0.5).tolist() == [1.0, 1.0, 1.0]


def test_weights_of_tokens():
    p = torch.tensor([0.5, 0.25, 0.01])
    assert token_weights(p, "uniform", 0.1).tolist() == [2.0, 2.0, 2.0]
    assert token_weights(p, "nelbo", 0.1).tolist() == pytest.approx([2.0, 4.0, 10.0])


def test_cross_entropy_by_hand():
    assert torch.allclose(
        cross_entropy(logs([0.5, 0.5], [0.25, 0.75]), torch.tensor([0, 0])).exp(), torch.tensor([2.0, 4.0])
    )


def test_the_error_of_a_stream_by_hand():
    dense = torch.tensor([[[3.0, 4.0], [0.5, 0.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    student = torch.tensor([[[3.0, 2.0], [0.0, 0.5], [0.0, 0.0]]], requires_grad=True)
    error = stream_error(student, dense)
    # 4 / 25; (0.25 + 0.25) / 0.25, however small the stream; nothing to be wrong about
    assert error.dtype == torch.float32 and torch.allclose(error, torch.tensor([[0.16, 2.0, 0.0]]))
    assert torch.allclose(stream_error(torch.zeros(1, 1, 2), dense[:, :1]), torch.ones(1, 1))
    error[0, 0].backward()
    assert torch.allclose(student.grad[0, 0], torch.tensor([0.0, 2 * -2 / 25]))


def test_weights_of_a_stream_are_one_on_average():
    masked = torch.tensor([[True, False, True, False]])
    assert stream_weights(masked, 1.0).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert stream_weights(masked, 0.0).tolist() == [[2.0, 0.0, 2.0, 0.0]]
    assert stream_weights(masked, 0.25)[0].tolist() == pytest.approx([1.6, 0.4, 1.6, 0.4])
