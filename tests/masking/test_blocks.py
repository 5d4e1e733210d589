"""One block's masks from hand-made statistics, their refit, and putting them in place."""

from types import SimpleNamespace

import pytest
import torch

from structprune.config import MaskingSettings, ReconstructSettings
from structprune.errors import UserError
from structprune.masking.blocks import install, mask_readers, refit_linears
from structprune.masking.scores.linears import Linears, Removal
from structprune.masking.scores.ria import ria_scores
from structprune.masking.scores.sparsegpt import factorise, sparsegpt
from structprune.masking.scores.table import SCORES
from structprune.models.adapter import READERS, Adapter
from structprune.refit.products import InputProducts

CPU = torch.device("cpu")
ROLES = [role for roles in READERS.values() for role in roles]
READ = {role: name for name, roles in READERS.items() for role in roles}


def rows(block, name: str, count: int = 200, seed: int = 0) -> torch.Tensor:
    """Correlated inputs (R, C) of one statistic, fp64."""
    size = block[READERS[name][0]].in_features
    generator = torch.Generator().manual_seed(seed + list(READERS).index(name))
    x = torch.randn(count, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return x.double() * torch.rand(size, generator=generator)


def statistics(block, score: str) -> dict:
    """What `mask_readers` needs: norms or Gram matrices of `rows`."""
    if score == "magnitude":
        return {}
    if score == "sparsegpt":
        return {name: (rows(block, name).T @ rows(block, name)).float() for name in READERS}
    return {name: rows(block, name).norm(dim=0) for name in READERS}


def mask_block(block, score: str, removal: Removal, measured: dict | None = None, **settings):
    """`mask_readers` of every input, one after the other: masks by role, and how Gram matrices were factored."""
    measured = measured or statistics(block, score)
    request = SimpleNamespace(score=SCORES[score], settings=MaskingSettings(**settings))  # all of it that is read
    masked, factored = {}, []
    for name in READERS:
        part, factors = mask_readers(block, name, request, removal, measured, CPU)
        masked, factored = masked | part, factored + factors
    assert measured == {}  # each is dropped when it is used
    return masked, factored


@pytest.fixture(params=["llada", "dream"])
def block(request, tiny_model):
    return Adapter(tiny_model(request.param)).blocks[1]


def test_magnitude_is_pooled_over_each_matrix(block):
    masked, factored = mask_block(block, "magnitude", Removal(0.3))
    assert list(masked) == ROLES and factored == []
    for role, (weight, keep) in masked.items():
        size = block[role].weight.detach().abs()
        assert torch.equal(keep, size > size.flatten().sort().values[int(0.3 * size.numel())])
        assert torch.equal(weight, block[role].weight * keep)


@pytest.mark.parametrize("score", ["wanda", "ria"])
def test_wanda_and_ria_go_row_by_row(block, score):
    masked, factored = mask_block(block, score, Removal(0.3))
    assert list(masked) == ROLES and factored == []
    for role, (weight, keep) in masked.items():
        dense, norm = block[role].weight.detach(), rows(block, READ[role]).norm(dim=0).float()  # its own input's
        scores = ria_scores(dense, norm) if score == "ria" else dense.abs() * norm
        count = int(0.3 * scores.shape[1])
        threshold = scores.sort(dim=1).values[:, count - 1 : count]
        assert torch.equal(keep, scores > threshold) and ((~keep).sum(1) == count).all()
        assert torch.equal(weight, dense * keep)


def test_sparsegpt_shares_one_factor_among_readers(block):
    masked, factored = mask_block(block, "sparsegpt", Removal(0.4), damping=0.02, column_block=24)
    assert list(masked) == ROLES
    assert [(each.block, each.input, each.damping, each.dead) for each in factored] == [
        (1, name, 0.02, 0) for name in READERS
    ]
    grams = statistics(block, "sparsegpt")
    for role, (weight, keep) in masked.items():
        factor = factorise(grams[READ[role]], 0.02)
        [(expected, mask)] = sparsegpt([block[role].weight.detach()], factor, 0.4, column_block=24)
        assert torch.equal(keep, mask) and torch.allclose(weight, expected, atol=1e-5)
        assert not torch.equal(weight, block[role].weight * keep)  # updated


def test_factors_tell_dead_inputs_and_raised_damping(block):
    grams = statistics(block, "sparsegpt")
    grams["mlp_input"][5] = grams["mlp_input"][:, 5] = 0
    few = rows(block, "activated", count=3)
    grams["activated"] = (few.T @ few).float()
    masked, factored = mask_block(block, "sparsegpt", Removal(0.5), grams, damping=0.0)
    by_input = {each.input: each for each in factored}
    assert by_input["mlp_input"].dead == 1 and by_input["attention_input"].dead == 0
    assert by_input["activated"].damping > 0 == by_input["attention_input"].damping
    assert masked["gate"][0][:, 5].eq(0).all() and all(torch.isfinite(weight).all() for weight, _ in masked.values())


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("nm", [(2, 4), (3, 8)])
def test_groups_whatever_the_score(block, score, nm, valid_groups):
    masked, _ = mask_block(block, score, Removal(nm[0] / nm[1], nm))
    for weight, keep in masked.values():
        assert valid_groups(keep, *nm) and (~keep).sum() == keep.numel() * nm[0] / nm[1]
        assert weight[~keep].eq(0).all()


@pytest.mark.parametrize("score", SCORES)
def test_ratio_nought_changes_nothing(block, score):
    before = {role: block[role].weight.detach().clone() for role in ROLES}
    measured = statistics(block, score)
    if score == "sparsegpt":
        measured["mixed"][3] = measured["mixed"][:, 3] = 0  # not even the weights of a dead input
    masked, factored = mask_block(block, score, Removal(0.0), measured)
    assert factored == [] and all(keep.all() for _, keep in masked.values())
    install(block, masked)
    assert all(torch.equal(block[role].weight, before[role]) for role in ROLES)


@pytest.mark.parametrize("score", SCORES)
def test_weights_in_place_are_not_touched(block, score):
    before = {role: block[role].weight.detach().clone() for role in ROLES}
    mask_block(block, score, Removal(0.5))
    assert all(torch.equal(block[role].weight, before[role]) for role in ROLES)


@pytest.mark.parametrize("score", ["wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_overflow_are_refused_in_one_line(block, score, value):
    measured = statistics(block, score)
    measured["mlp_input"].view(-1)[7] = value
    message = "^block 1, input of gate and up: its activations overflow in float32: .*; use a sound checkpoint$"
    with pytest.raises(UserError, match=message):
        mask_block(block, score, Removal(0.5), measured)
    block.module.half()
    message = "^block 1, input of gate and up: its activations overflow in float16: use model.dtype = float32$"
    measured = statistics(block, score)
    measured["mlp_input"].view(-1)[7] = value
    with pytest.raises(UserError, match=message):
        mask_block(block, score, Removal(0.5), measured)


@pytest.mark.parametrize("nm", [None, (2, 4)])
def test_weights_whose_scores_overflow_are_refused_in_one_line(block, nm):
    measured = statistics(block, "sparsegpt")
    with torch.no_grad():
        block["down"].weight.mul_(1e30)
    with pytest.raises(UserError, match="^block 1, input of down: its sparsegpt scores overflow in float32: "):
        mask_block(block, "sparsegpt", Removal(0.5, nm), measured)


def test_masks_by_scores_by_hand():
    weight, norm = torch.tensor([[4.0, -3.0, 2.0, 1.0]]), torch.tensor([1.0, 1.0, 3.0, 9.0])

    def scored(score: str, removal: Removal, statistic: torch.Tensor | None = None) -> list:
        [(masked, keep)] = SCORES[score].mask(Linears([weight], removal, statistic), MaskingSettings()).masked
        assert torch.equal(masked, weight * keep)
        return keep.tolist()

    assert scored("magnitude", Removal(0.5)) == [[True, False, False, False]]  # one more
    assert scored("wanda", Removal(0.5), norm) == [[False, False, True, True]]
    assert scored("wanda", Removal(0.5, (1, 2)), norm) == [[True, False, False, True]]
    assert scored("magnitude", Removal(0.9, (1, 2))) == [[True, False, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [True, False])
def test_installed_weights_keep_their_kind_and_exact_zeros(tiny_model, dtype, trained):
    block = Adapter(tiny_model("dream").to(dtype).requires_grad_(trained)).blocks[0]
    bias = block["query"].bias
    with torch.inference_mode():
        masked, _ = mask_block(block, "sparsegpt", Removal(0.5))
        install(block, masked)
    for role, (weight, keep) in masked.items():
        now = block[role].weight
        assert isinstance(now, torch.nn.Parameter) and now.dtype == dtype and now.device.type == "cpu"
        assert now.requires_grad == trained and not now.is_inference()
        assert torch.equal(now, torch.where(keep, weight, 0.0).to(dtype))
        zeros = now.detach()[~keep]
        assert zeros.eq(0).all() and not zeros.signbit().any()
    assert block["query"].bias is bias


def test_what_is_not_kept_is_nought_whatever_the_weight(block):
    keep = torch.rand(block["up"].weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    weight = torch.full(keep.shape, 2.0)
    install(block, {"up": (weight, keep)})
    assert torch.equal(block["up"].weight, 2.0 * keep)
    weight.fill_(5)
    assert block["up"].weight.max() == 2  # a copy


def refit_products(block, name: str, noise: float) -> tuple[InputProducts, InputProducts]:
    """Products of inputs that are disturbed by `noise`, for fit and held-out rows of the same kind."""
    parts = []
    for first in (0, 150):
        x = rows(block, name, 300)[first : first + 150]
        pruned = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(first)) * x.std()
        power = {
            role: (x @ block[role].weight.detach().double().T).pow(2).sum().item() for role in READERS[name] if first
        }
        parts.append(InputProducts((pruned.T @ pruned).float(), (x.T @ pruned).float(), power))
    return tuple(parts)


def refit_block(block, masked: dict, noise: float):
    """All linears of a block refitted, input by input."""
    refitted, fits = {}, []
    for name, roles in READERS.items():
        part = {role: masked[role] for role in roles}
        moved, chosen = refit_linears(block, part, refit_products(block, name, noise), ReconstructSettings())
        refitted, fits = refitted | moved, fits + chosen
    return refitted, fits


@pytest.mark.parametrize("score", ["magnitude", "sparsegpt"])
def test_the_refit_lowers_the_held_out_error_it_names(block, score):
    masked, _ = mask_block(block, score, Removal(0.5))
    refitted, fits = refit_block(block, masked, 0.05)
    assert [(fit.block, fit.kind) for fit in fits] == [(1, role) for role in ROLES]
    generator = torch.Generator().manual_seed(150)
    for fit in fits:
        x = rows(block, READ[fit.kind], 300)[150:]
        pruned = x + 0.05 * torch.randn(x.shape, generator=generator.manual_seed(150)) * x.std()
        target = x @ block[fit.kind].weight.detach().double().T
        errors = [
            ((pruned @ weight.double().T - target) ** 2).sum() for weight, _ in (masked[fit.kind], refitted[fit.kind])
        ]
        assert fit.error == pytest.approx((errors[1] / errors[0]).item(), rel=1e-3)
        assert fit.error < 0.95 and fit.damping in ReconstructSettings().damping
        assert refitted[fit.kind][0].dtype == torch.float32 and refitted[fit.kind][0][~masked[fit.kind][1]].eq(0).all()
        assert torch.equal(refitted[fit.kind][1], masked[fit.kind][1])


def test_the_refit_of_a_block_that_lost_nothing_leaves_it(block):
    masked, _ = mask_block(block, "wanda", Removal(0.0))
    refitted, fits = refit_block(block, masked, 0.0)
    for role in ROLES:
        assert torch.equal(refitted[role][0], block[role].weight)
    assert all(fit.damping == float("inf") and fit.error == pytest.approx(1.0) for fit in fits)
