"""Whole runs that make masks, on tiny models of both families: exact zeros, and every option does what it says."""

from itertools import product

import pytest
import torch

from structprune import Config, UserError, load_model, prune
from structprune.calibration.batches import Calibration
from structprune.models.adapter import READERS, Adapter
from structprune.runs.mask import mask, unshared
from structprune.statistics.rows import measure_mass
from structprune.statistics.scan import Scan

ARMS = ("clean", "masked", "masked+sink", "clean+sink")
PATTERNS = ("unstructured", "2:4", "4:8", "3:4")
PLAIN = {"reconstruct.enabled": False}
WANDA = {"masking.score": "wanda", "masking.arm": "clean", **PLAIN}
ONE_SHOT = {"masking.order": "one-shot"}


@pytest.fixture(scope="module", params=["llada", "dream"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(shared_checkpoint, tiny_calibration):
    """`loaded(family)` -> (dense model, its calibration), made once."""
    made = {}

    def get(family: str = "llada"):
        if family not in made:
            dense = load_model(shared_checkpoint(family))
            made[family] = dense, tiny_calibration(dense)
        return made[family]

    return get


def settings(pattern: str = "unstructured", **changes) -> Config:
    nm = {"method": "unstructured"} if pattern == "unstructured" else {"method": "nm", "masking.nm": pattern}
    return Config.load(None, nm | changes)


def weights(model) -> dict[str, torch.Tensor]:
    """Name -> weight of every projection, in order."""
    return {f"{block.names[role]}.weight": block[role].weight.detach() for block, role in roles(model)}


def roles(model):
    return [(block, role) for block in Adapter(model).blocks for name in READERS for role in READERS[name]]


def same(one, other) -> bool:
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


def differ(one, other, *names: str) -> set[int]:
    """Blocks in which the masks of the named projections (default all) differ."""
    result = set()
    for block, role in roles(one.model):
        name = f"{block.names[role]}.weight"
        if (not names or role in names) and not torch.equal(one.masks.kept(name), other.masks.kept(name)):
            result.add(block.index)
    return result


def check_exact(made, dense, step: int = 128) -> None:
    """Zeros where the masks say so, and as many as the method promises; `step`: SparseGPT's column block."""
    report = made.report
    nm = report["config"]["masking"]["nm"] if report["config"]["method"] == "nm" else None
    assert len(made.masks.packed) == 7 * len(dense.blocks)
    for block, role in roles(made.model):
        name, weight, ratio = f"{block.names[role]}.weight", block[role].weight, report["block_ratios"][block.index]
        kept, (rows, columns) = made.masks.kept(name), weight.shape
        gone = ~kept
        assert torch.isfinite(weight).all() and torch.equal(weight != 0, kept), name
        if nm:
            removed, group = map(int, nm.split(":"))
            assert (gone.unflatten(1, (-1, group)).sum(-1) == removed).all(), name
        elif report["score"] in ("wanda", "ria"):
            assert (gone.sum(1) == int(columns * ratio)).all(), name
        elif report["score"] == "magnitude":
            assert gone.sum() == int(rows * columns * ratio) + 1, name
        else:
            for part in gone.split(step, dim=1):
                assert part.sum() == int(part.numel() * ratio) + 1, name
        assert report["sparsity"]["tensors"][name] == gone.double().mean().item()
        if report["score"] != "sparsegpt" and not report["config"]["reconstruct"]["enabled"]:
            assert torch.equal(weight, torch.where(kept, weights(dense)[name], 0.0)), name
    for name, value in made.model.state_dict().items():
        assert name in made.masks.packed or torch.equal(value, dense.state_dict()[name]), name


CHOICES = list(product(("sequential", "one-shot"), ARMS, (True, False)))
SCORES = ("wanda", "ria", "sparsegpt")
CELLS = [
    (s, p, CHOICES[(5 * i + k) % len(CHOICES)]) for i, (s, p) in enumerate(product(SCORES, PATTERNS)) for k in (0, 8)
]


def test_the_chosen_combinations_cover_what_they_should():
    assert {choice for _, _, choice in CELLS} == set(CHOICES)
    for score in SCORES:
        assert {c[0] for s, _, c in CELLS if s == score} == {"sequential", "one-shot"}
        assert {c[1] for s, _, c in CELLS if s == score} == set(ARMS)


@pytest.mark.slow
@pytest.mark.parametrize("score, pattern, choice", CELLS, ids=str)
def test_sparsity_is_exact(score, pattern, choice, family, loaded):
    dense, calibration = loaded(family)
    order, arm, refit = choice
    keys = {"masking.score": score, "masking.order": order, "masking.arm": arm, "reconstruct.enabled": refit}
    keys |= {"masking.column_block": 16} if score == "sparsegpt" and pattern == "unstructured" else {}
    made = mask(dense, settings(pattern, **keys), calibration)
    check_exact(made, dense, step=16)
    assert (made.report["arm"], len(made.report["refit"])) == (arm, 21 if refit else 0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("refit", [True, False])
def test_sparsity_of_magnitude_is_exact(pattern, refit, family, loaded):
    dense, calibration = loaded(family)
    changes = {"masking.score": "magnitude", "reconstruct.enabled": refit}
    changes |= {"masking.ratio": 0.3} if pattern == "unstructured" else {}
    check_exact(mask(dense, settings(pattern, **changes), calibration), dense)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("order, refit", list(product(("sequential", "one-shot"), (True, False))))
def test_orders_and_refits_go_together(score, order, refit, loaded):
    dense, calibration = loaded()
    keys = {"masking.score": score, "masking.order": order, "reconstruct.enabled": refit, "masking.ratio": 0.25}
    made = mask(dense, settings(**keys), calibration)
    check_exact(made, dense)
    assert all(fit["error"] <= 1 for fit in made.report["refit"])
    assert bool(made.report["refit"]) == refit == any(fit["error"] < 0.99 for fit in made.report["refit"])


@torch.no_grad()
def norms_by_hand(model, ids, omega) -> dict[str, torch.Tensor]:
    """Name -> ‖ω X[:, c]‖ over all rows of what every projection reads, from hooks on a plain forward pass, fp64."""
    result, handles = {}, []
    for block, role in roles(model):

        def note(module, given, name=f"{block.names[role]}.weight"):
            result[name] = (given[0].double() * omega[..., None]).pow(2).sum((0, 1)).sqrt()  # (C,)

        handles.append(block[role].register_forward_pre_hook(note))
    model(ids)
    for handle in handles:
        handle.remove()
    return result


def wanda_by_hand(model, ids, omega, sequential: bool, ratio: float) -> dict[str, torch.Tensor]:
    """Masks of |W| ‖ω X‖: in sequence, every block is measured dense behind the blocks masked before it."""
    copy, kept = unshared(model), {}
    norms = norms_by_hand(copy, ids, omega)
    for block, role in roles(copy):
        name = f"{block.names[role]}.weight"
        if sequential and role == "query":
            norms = norms_by_hand(copy, ids, omega)
        score = block[role].weight.detach().double().abs() * norms[name]
        lowest = score.argsort(dim=1)[:, : int(score.shape[1] * ratio)]
        kept[name] = torch.ones_like(score, dtype=torch.bool).scatter(1, lowest, False)
        if role == "down":  # the block was measured whole
            for part, path in block.names.items():
                block[part].weight = torch.nn.Parameter(block[part].weight.detach() * kept[f"{path}.weight"])
    return kept


def omega_by_hand(model, calibration, arm: str, hard: bool) -> torch.Tensor:
    """Row weights (R, T) of an arm at alpha 0.05 and kappa 1: clean rows have the mean over their noisy copies."""
    if not arm.endswith("+sink"):
        return torch.ones(())
    mass = measure_mass(Scan(Adapter(model), calibration.fit)).double()  # (N, S, T)
    threshold = mass.mean(-1, keepdim=True) + mass.std(-1, correction=0, keepdim=True)
    omega = (mass <= threshold).double() if hard else 1 / (1 + (0.05 * (mass - threshold)).exp())
    return omega.mean(1) if arm.startswith("clean") else omega.flatten(0, 1)


@pytest.mark.parametrize("arm", [*ARMS, "masked+sink hard", "clean+sink hard"])
@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_wanda_by_hand(order, arm, family, loaded):
    dense, calibration = loaded(family)
    arm, _, hard = arm.partition(" ")
    keys = {"masking.order": order, "masking.arm": arm, "masking.ratio": 0.4}
    if arm.endswith("+sink"):
        keys |= {"sink.kappa": 1.0} | ({"sink.mask": "hard"} if hard else {"sink.alpha": 0.05})
    made = mask(dense, settings(**WANDA | keys), calibration)
    ids = calibration.fit.input_ids if arm.startswith("clean") else calibration.fit.noisy_ids.flatten(0, 1)
    omega = omega_by_hand(dense, calibration, arm, bool(hard))
    expected = wanda_by_hand(dense, ids, omega, order == "sequential", 0.4)
    assert all(torch.equal(made.masks.kept(name), kept) for name, kept in expected.items())


@pytest.mark.parametrize("score", SCORES)
def test_the_orders_agree_on_the_first_block_only(score, family, loaded):
    dense, calibration = loaded(family)
    keys = PLAIN | {"masking.score": score}
    one, other = mask(dense, settings(**keys), calibration), mask(dense, settings(**keys | ONE_SHOT), calibration)
    assert differ(one, other) and 0 not in differ(one, other)


@pytest.mark.parametrize("score", SCORES)
def test_every_arm_chooses_differently(score, loaded):
    dense, calibration = loaded()
    made = [mask(dense, settings(**PLAIN | {"masking.score": score, "masking.arm": arm}), calibration) for arm in ARMS]
    for index, one in enumerate(made):
        assert all(differ(one, other) for other in made[:index])
    assert not differ(made[1], mask(dense, settings(**PLAIN | {"masking.score": score}), calibration))  # the default


def test_hard_sinks_without_any_sink_are_the_noisy_arm(loaded):
    """Above mean + 1e6 std no position is a sink; above the mean plus one, some are."""
    dense, calibration = loaded()
    keys = PLAIN | {"masking.score": "sparsegpt"}
    sinks = {"masking.arm": "masked+sink", "sink.mask": "hard"}
    masked = mask(dense, settings(**keys), calibration)
    assert not differ(masked, mask(dense, settings(**keys | sinks | {"sink.kappa": 1e6}), calibration))
    hard = mask(dense, settings(**keys | sinks | {"sink.kappa": 1.0}), calibration)
    soft = mask(dense, settings(**keys | {"masking.arm": "masked+sink", "sink.kappa": 1.0}), calibration)
    assert differ(masked, hard) and differ(hard, soft) and differ(masked, soft)


def test_a_sink_score_is_its_arm_by_another_name(loaded):
    dense, calibration = loaded()
    for score in ("wanda", "sparsegpt"):
        named = mask(dense, settings("2:4", **PLAIN | {"masking.score": f"sink-{score}"}), calibration)
        given = {"masking.score": score, "masking.arm": "masked+sink"}
        assert same(named.model, mask(dense, settings("2:4", **PLAIN | given), calibration).model)


@pytest.mark.parametrize("changes", [WANDA, WANDA | ONE_SHOT], ids=["sequential", "one-shot"])
def test_relative_rows_concern_what_is_added_to_the_stream(changes, loaded):
    dense, calibration = loaded()
    plain = mask(dense, settings(**changes), calibration)
    relative = mask(dense, settings(**changes | {"masking.relative": True}), calibration)
    assert 0 in differ(plain, relative, "attention_output") and 0 in differ(plain, relative, "down")
    assert 0 not in differ(plain, relative, "query", "key", "value", "gate", "up")


def test_one_batch_size_is_as_good_as_another(loaded):
    dense, calibration = loaded()
    for changes in (WANDA | {"masking.arm": "masked"}, WANDA | ONE_SHOT | {"masking.arm": "masked+sink"}):
        one = mask(dense, settings(**changes), calibration)
        assert not differ(one, mask(dense, settings(**changes | {"calibration.batch": 3}), calibration))


def test_norms_are_what_they_are_called(loaded):
    """Every sequence counts by its norm, or by its square: they agree on one sequence and not on many."""
    dense, calibration = loaded()
    single = Calibration(calibration.input_ids[:3], calibration.noisy_ids[:3], None, {}, held_out=2)
    for given, agree in ((calibration, False), (single, True)):
        one = mask(dense, settings(**WANDA), given)
        assert agree == (not differ(one, mask(dense, settings(**WANDA | {"masking.norms": "summed"}), given)))


def test_structured_is_no_method_for_masks(loaded):
    with pytest.raises(UserError, match="method = structured makes no masks"):
        mask(loaded()[0], Config(), loaded()[1])
    assert prune(loaded()[0], settings(**WANDA), loaded()[1]).report["sparsity"]["total"] == 0.5
