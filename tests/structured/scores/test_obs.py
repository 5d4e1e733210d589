"""The greedy optimal brain surgeon against explicit least squares."""

import itertools

import pytest
import torch

from structprune.structured.scores.obs import (
    cheapest,
    damped_inverse,
    eliminate,
    group_costs,
    obs_path,
    remaining,
    remove_columns,
)

DAMPING = 0.05


def case(outputs: int, columns: int, rows: int = 60, seed: int = 0):
    """Correlated inputs: weight (O, C), gram (C, C), and the damped Hessian."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = x.double().T @ x.double() / rows
    hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(columns).double()
    return torch.randn(outputs, columns, generator=generator).double(), gram, hessian


def least_rise(weight, hessian, removed):
    """min over W' with W'[:, removed] = 0 of ½ tr((W' - W) H (W' - W)ᵀ), by lstsq on a square root of H; and its W'."""
    keep = [c for c in range(weight.shape[1]) if c not in removed]
    root = torch.linalg.cholesky(hessian).T  # (C, C): rootᵀ root = H
    solution = torch.linalg.lstsq(root[:, keep], root @ weight.T).solution.T  # (O, K)
    best = torch.zeros_like(weight)
    best[:, keep] = solution
    gap = (best - weight) @ root.T
    return 0.5 * gap.pow(2).sum(), solution


@pytest.mark.parametrize("width", [1, 2, 3])
def test_cost_of_a_group_is_the_least_rise_of_the_damped_error(width):
    weight, gram, hessian = case(5, 12)
    costs = group_costs(weight, damped_inverse(gram, DAMPING), width)
    for unit in range(12 // width):
        removed = range(unit * width, (unit + 1) * width)
        assert costs[unit].item() == pytest.approx(least_rise(weight, hessian, removed)[0].item(), rel=1e-8)


def test_removal_compensates_by_least_squares():
    weight, gram, hessian = case(4, 9, seed=1)
    removed = [2, 5, 6]
    updated, inverse, cost = remove_columns(weight, damped_inverse(gram, DAMPING), torch.tensor(removed))
    expected, solution = least_rise(weight, hessian, removed)
    assert cost.item() == pytest.approx(expected.item(), rel=1e-8)
    assert torch.allclose(updated, solution, rtol=1e-8)
    keep = [c for c in range(9) if c not in removed]
    assert torch.allclose(inverse, torch.linalg.inv(hessian[keep][:, keep]), rtol=1e-8)


def test_uncorrelated_inputs_by_hand():
    gram = torch.diag(torch.tensor([1.0, 4.0, 100.0]))  # mean 35, so λ = 3.5 at damping 0.1
    weight = torch.tensor([[3.0, 1.0, 0.1], [0.0, 1.0, 0.1]])
    path = obs_path(weight, gram, [[0, 1, 2]], damping=0.1)
    # ½ ‖w_c‖² (d_c + λ): ½·9·4.5, ½·2·7.5, ½·0.02·103.5
    assert path.steps == ((2,), (1,), (0,))
    assert path.cost.tolist()[:2] == pytest.approx([1.035, 7.5], rel=1e-6)
    assert path.cost[2] == float("inf")


@pytest.mark.parametrize("width", [1, 2])
def test_the_path_is_greedy_and_rescored_after_every_step(width):
    weight, gram, hessian = case(3, 8, seed=2)
    units, removed, total = 8 // width, [], 0.0
    path = obs_path(weight, gram, [list(range(units))], DAMPING)
    columns = lambda chosen: [c for unit in chosen for c in range(unit * width, (unit + 1) * width)]  # noqa: E731
    for step, cost in zip(path.steps[:-1], path.cost[:-1]):
        rises = {
            u: least_rise(weight, hessian, columns([*removed, u]))[0].item() for u in range(units) if u not in removed
        }
        best = min(rises, key=rises.get)
        assert step == (best,)
        assert cost.item() == pytest.approx(rises[best] - total, rel=1e-6)  # costs add up to the joint rise
        removed, total = [*removed, best], rises[best]
    assert path.cost[-1] == float("inf") and sorted(u for step in path.steps for u in step) == list(range(units))


def test_rescoring_sees_that_one_of_two_twins_must_stay():
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]  # channels 0 and 1 carry the same feature, 2 another
    weight = torch.tensor([[1.0, 1.0, 0.9]])
    gram = x.T @ x / 400
    path = obs_path(weight, gram, [[0, 1, 2]], damping=1e-3)
    assert path.steps[0][0] in (0, 1) and path.steps[1] == (2,)  # then the other twin carries both
    at_once = obs_path(weight, gram, [[0, 1, 2]], damping=1e-3, rounds=1)
    assert {step[0] for step in at_once.steps[:2]} == {0, 1}  # scored once, both twins look free


def test_rounds_take_several_steps_and_share_the_joint_cost():
    weight, gram, hessian = case(3, 12, seed=3)
    path = obs_path(weight, gram, [list(range(12))], DAMPING, rounds=4)  # 3 steps in each of the rounds
    single = group_costs(weight, damped_inverse(gram, DAMPING), 1)
    first = single.argsort()[:3].tolist()
    assert [step[0] for step in path.steps[:3]] == first
    joint = least_rise(weight, hessian, first)[0].item()
    assert path.cost[:3].sum().item() == pytest.approx(joint, rel=1e-8)
    assert torch.allclose(path.cost[:3] / path.cost[0], single[first] / single[first[0]])
    assert len(path.steps) == 12 and path.cost[:-1].isfinite().all() and path.cost[-1] == float("inf")


def test_a_step_takes_one_head_of_every_group():
    weight, gram, _ = case(4, 12, seed=4)
    path = obs_path(weight, gram, [[0, 1, 2], [3, 4, 5]], DAMPING)  # six heads of two columns
    single = group_costs(weight, damped_inverse(gram, DAMPING), 2)
    assert path.steps[0] == (int(single[:3].argmin()), 3 + int(single[3:].argmin()))
    assert len(path.steps) == 3 and all(a < 3 <= b for a, b in path.steps)


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.diag(torch.tensor([0.0, 1.0, 0.0, 2.0]))])
def test_dead_inputs_cost_next_to_nothing_and_go_first(gram):
    path = obs_path(torch.ones(2, 4), gram, [[0, 1, 2, 3]], damping=0.01)
    assert path.cost[:-1].isfinite().all()
    if gram.any():
        assert {step[0] for step in path.steps[:2]} == {0, 2}


def test_greedy_is_near_the_best_subset():
    weight, gram, hessian = case(3, 8, seed=5)
    path = obs_path(weight, gram, [list(range(8))], DAMPING)
    best = min(least_rise(weight, hessian, removed)[0].item() for removed in itertools.combinations(range(8), 3))
    assert best <= path.cost[:3].sum().item() * (1 + 1e-9) <= 1.5 * best


@pytest.mark.parametrize("width, groups, size", [(1, 1, 3), (2, 3, 1)])
def test_the_host_reads_nothing_while_units_go(width, groups, size):
    """On the meta device whatever looks at a number raises."""
    columns = 12 * width
    weight, gram = (torch.empty(rows, columns, dtype=torch.float64, device="meta") for rows in (5, columns))
    member = torch.empty(12, dtype=torch.int64, device="meta")
    rounds, rest = eliminate(weight, gram, DAMPING, member, groups, size)
    sizes = [len(units) for units, _, _ in rounds]
    assert sum(sizes) == 12 // groups - 1 and max(sizes) == size and rest.shape == (groups,)


def test_remaining_by_hand():
    assert remaining(torch.tensor([4, 0, 2]), 6).tolist() == [1, 3, 5]
    assert remaining(torch.tensor([], dtype=torch.int64), 2).tolist() == [0, 1]


def test_cheapest_of_every_group_by_hand():
    single = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 1.0, 1.0, 0.5])
    member = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])  # group 0: 3, 2, 1, 1; group 1: 1, 5, 4, 0.5
    assert cheapest(single, member, 2, 3).tolist() == [[5, 7], [6, 1], [2, 4]]  # of equal ones the first


@pytest.mark.parametrize("width, groups", [(1, [list(range(8))]), (2, [[0, 1], [2, 3]])])
def test_inputs_that_are_always_zero_cost_next_to_nothing(width, groups):
    weight, _, _ = case(3, 8)
    path = obs_path(weight, torch.zeros(8, 8), groups, DAMPING)
    assert (path.cost[:-1] > 0).all() and path.cost[:-1].sum() < 1e-30 and path.cost[-1] == float("inf")
    sizes = weight.double().pow(2).sum(0).view(-1, width).sum(1)  # (U,)
    for number, group in enumerate(groups):  # with nothing else to go by, small weights go first
        assert [step[number] for step in path.steps] == sorted(group, key=sizes.tolist().__getitem__)
    still = obs_path(torch.zeros(3, 8), torch.zeros(8, 8), groups, DAMPING)
    assert still.cost[:-1].tolist() == [0.0] * (len(groups[0]) - 1)


@pytest.mark.parametrize("width", [1, 2])
def test_what_is_not_positive_definite_is_an_error_as_before(width, monkeypatch):
    weight, gram, _ = case(3, 8)
    broken = -torch.eye(8, dtype=torch.float64)  # H⁻¹ of no Gram matrix
    monkeypatch.setattr("structprune.structured.scores.obs.damped_inverse", lambda gram, damping: broken)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        obs_path(weight, gram, [list(range(8 // width))], DAMPING)
    with pytest.raises(torch.linalg.LinAlgError):
        damped_inverse(-gram, DAMPING)


def test_singular_parts_cost_nan():
    inverse = torch.eye(4, dtype=torch.float64)
    inverse[2:, 2:] = 1.0
    assert group_costs(torch.ones(1, 4).double(), inverse, 2).isnan().tolist() == [False, True]
    assert remove_columns(torch.ones(1, 4).double(), inverse - 2, torch.tensor([0]))[2].isnan()
