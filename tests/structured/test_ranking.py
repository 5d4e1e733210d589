"""The drivers: every score's removal paths against a plain computation on hooked activations or gradients."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from structprune.config import SinkSettings, StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.statistics import activations, rows
from structprune.statistics.rows import scan_rows
from structprune.statistics.scan import Limits, Scan
from structprune.structured.paths import static_path
from structprune.structured.ranking import rank_units
from structprune.structured.scores.obs import obs_path
from structprune.structured.scores.table import SCORES, Score
from structprune.structured.units import Units, block_groups, block_tensors, coupled_slices

MASK, LENGTH = 2047, 12
SINK = SinkSettings(alpha=0.7, kappa=0.5)
ROLE = {"attention": "attention_output", "channels": "down"}
ARMS = ("clean", "masked", "masked+sink", "clean+sink")


def plain_rows(adapter, calibration, arm):
    """ids (R, T) and ω (R, T) of an arm."""
    fed = scan_rows(Scan(adapter, calibration, SINK), arm)
    return fed.ids, torch.ones(fed.ids.shape) if fed.weight is None else fed.weight


def consumer_inputs(adapter, ids):
    """(block, kind) -> the consumer's input (R*T, C), and the residual stream it is added to (R*T, hidden)."""
    inputs, x, rotary = {}, adapter.model.embedding(ids), adapter.model.rotary(ids.shape[1], "cpu")
    for block in adapter.blocks:
        for kind, role in ROLE.items():
            read = block.module.mix(x, rotary) if kind == "attention" else block.module.activate(x)
            inputs[block.index, kind] = read.flatten(0, 1).double(), x.flatten(0, 1).double()
            x = x + block[role](read)
    return inputs


def check_static(path, unit_cost, groups):
    """A path whose every step takes the cheapest unit left in each group, and costs their sum."""
    for number, (step, cost) in enumerate(zip(path.steps, path.cost.tolist())):
        for unit, group in zip(step, groups):
            assert unit == sorted(group, key=unit_cost.tolist().__getitem__)[number]
        assert cost == pytest.approx(unit_cost[list(step)].sum().item(), rel=1e-3)


FORMS = [("llada", "query_heads"), ("dream", "query_heads"), ("dream", "kv_groups")]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("family, form", FORMS)
@torch.no_grad()
def test_wanda_and_fluctuation(tiny_model, calibration, family, form, arm):
    adapter = Adapter(tiny_model(family))
    ids, omega = plain_rows(adapter, calibration, arm)
    square = omega.flatten().double()[:, None] ** 2  # (R*T, 1)
    paths = {
        score: rank_units(Scan(adapter, calibration, SINK), StructuredSettings(score=score, gqa=form), arm)
        for score in ("wanda", "fluctuation")
    }
    for (index, kind), (x, _) in consumer_inputs(adapter, ids).items():
        block = adapter.blocks[index]
        groups = block_groups(block, kind, form)
        weight = block[ROLE[kind]].weight.double()
        units = sum(map(len, groups))
        power = (square * x**2).sum(0) * weight.pow(2).sum(0)  # (C,)
        check_static(paths["wanda"][index, kind], power.view(units, -1).sum(1), groups)
        mean = (square * x).sum(0) / square.sum()
        columns = (square * (x - mean) ** 2).sum(0) / square.sum() * weight.pow(2).sum(0)  # (C,)
        check_static(paths["fluctuation"][index, kind], columns.view(units, -1).sum(1), groups)
        scores = ((columns - columns.mean()) / columns.std(correction=0)).view(units, -1).mean(1)  # (U,)
        path = paths["fluctuation"][index, kind]
        expected = torch.stack([scores[list(step)].mean() for step in path.steps])
        assert torch.allclose(path.rank, expected, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("relative", [True, False, None])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("family, form", FORMS)
@torch.no_grad()
def test_obs_grams(tiny_model, calibration, family, form, arm, relative):
    adapter = Adapter(tiny_model(family))
    settings = StructuredSettings(score="obs", gqa=form, relative=relative, damping=0.05, rounds=5)
    paths = rank_units(Scan(adapter, calibration, SINK, Limits(windows=2)), settings, arm)
    ids, omega = plain_rows(adapter, calibration, arm)
    for (index, kind), (x, stream) in consumer_inputs(adapter, ids).items():
        weight = omega.flatten().double()
        if relative is not False:  # the default is relative
            weight = weight / stream.pow(2).mean(1).sqrt()
        scaled = x * weight[:, None]
        gram = scaled.T @ scaled / weight.pow(2).sum()
        groups = block_groups(adapter.blocks[index], kind, form)
        rounds = 5 if kind == "channels" else None
        expected = obs_path(adapter.blocks[index][ROLE[kind]].weight, gram, groups, 0.05, rounds)
        path = paths[index, kind]
        assert path.steps == expected.steps
        assert torch.allclose(path.cost, expected.cost, rtol=1e-2)


@torch.no_grad()
def test_obs_is_the_same_from_a_file_of_states(tiny_model, calibration):
    adapter, settings = Adapter(tiny_model()), StructuredSettings(score="obs")
    memory, file = (
        rank_units(Scan(adapter, calibration, SINK, Limits(1, budget)), settings, "masked+sink")
        for budget in (2**30, 0)
    )
    for key in memory:
        assert memory[key].steps == file[key].steps and torch.equal(memory[key].cost, file[key].cost)


@pytest.mark.parametrize("score, passes", [("obs", {3}), ("wanda", {6}), ("taylor", {3})])
@torch.no_grad()
def test_a_pass_has_so_many_tokens_unless_it_needs_whole_windows(tiny_model, calibration, score, passes, monkeypatch):
    adapter, sizes = Adapter(tiny_model()), {"mass": set(), "score": set()}
    scan, settings = Scan(adapter, calibration, SINK, Limits(3)), StructuredSettings(score=score)
    whole = rank_units(scan, settings, "masked+sink")

    def count(module, args, output):
        sizes["score"].add(len(output))

    measure = rows.mass_of
    monkeypatch.setattr("structprune.statistics.scan.PASS_TOKENS", 4 * LENGTH - 1)
    monkeypatch.setattr(rows, "mass_of", lambda adapter, ids: sizes["mass"].add(len(ids)) or measure(adapter, ids))
    handle = adapter.blocks[0]["gate"].register_forward_hook(count)
    paths = rank_units(scan, settings, "masked+sink")
    handle.remove()
    assert sizes["mass"] == ({3} if score != "wanda" else set())
    assert sizes["score"] == passes  # taylor's mass pass, which goes through the gate too, is of as many
    for key, path in paths.items():
        assert path.steps == whole[key].steps and torch.allclose(path.cost, whole[key].cost, rtol=1e-4)


@torch.no_grad()
def test_obs_needs_half_of_a_gram(tiny_model, calibration, monkeypatch):
    """Tiles below the diagonal are not computed, and filled in before anything is scored."""
    scan, settings, tiles = Scan(Adapter(tiny_model()), calibration, SINK), StructuredSettings(score="obs"), []
    whole = rank_units(scan, settings, "masked+sink")
    monkeypatch.setitem(activations.PRODUCT_TILE, "cpu", (8, 64))
    add = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor, "addmm_", lambda total, *args, **more: tiles.append(total.shape) or add(total, *args, **more)
    )
    paths = rank_units(scan, settings, "masked+sink")
    assert {(8, 32), (8, 24), (8, 16), (8, 8)} <= set(tiles)
    for key, path in paths.items():
        assert path.steps == whole[key].steps and torch.allclose(path.cost, whole[key].cost, rtol=1e-4)


@pytest.mark.parametrize("family, form", FORMS)
@torch.no_grad()
def test_magnitude(tiny_model, family, form):
    adapter = Adapter(tiny_model(family))
    paths = rank_units(Scan(adapter, None), StructuredSettings(score="magnitude", gqa=form), None)
    for block in adapter.blocks:
        check_static(
            paths[block.index, "attention"], attention_sums(block, form, lambda w: w**2), unit_groups(block, form)
        )
        rows = sum(block[role].weight.pow(2).sum(1) for role in ("gate", "up"))
        check_static(paths[block.index, "channels"], rows + block["down"].weight.pow(2).sum(0), [range(48)])


def unit_groups(block, form):
    """Step groups of attention units, written out."""
    if form == "kv_groups":
        return [range(block.widths.kv_heads)]
    mha = block.widths.query_heads == block.widths.kv_heads
    return [range(block.widths.query_heads)] if mha else [range(3), range(3, 6)]


def attention_sums(block, form, function, tensors=None):
    """Σ function over every slice that goes with one attention unit, by plain indexing: (U,)."""
    tensors = block_tensors(block) if tensors is None else tensors
    dim, heads, kv = block.head_dim, block.widths.query_heads, block.widths.kv_heads
    whole = form == "kv_groups" or heads == kv
    units = kv if whole else heads
    sums = torch.zeros(units)
    for unit in range(units):
        members = range(unit * heads // units, (unit + 1) * heads // units)
        for head in members:
            rows = slice(head * dim, (head + 1) * dim)
            sums[unit] += function(tensors["query", "weight"][rows]).sum()
            sums[unit] += function(tensors["attention_output", "weight"][:, rows]).sum()
            if ("query", "bias") in tensors:
                sums[unit] += function(tensors["query", "bias"][rows]).sum()
        if whole:
            rows = slice(unit * dim, (unit + 1) * dim)
            for key in [key for key in tensors if key[0] in ("key", "value")]:
                sums[unit] += function(tensors[key][rows]).sum()
    return sums


def plain_loss(adapter, calibration, omega):
    """Σ ω CE / p over masked tokens / tokens, one position at a time; Dream's position i predicts token i + 1."""
    total = 0.0
    for window in range(calibration.windows):
        for level in range(calibration.levels):
            noisy = calibration.noisy_ids[window, level]
            logits = adapter.model(noisy[None]).logits[0]
            for position in (noisy == MASK).nonzero().flatten().tolist():
                source = max(position - 1, 0) if adapter.model.shifted else position
                nats = F.cross_entropy(logits[source], calibration.input_ids[window, position])
                p = calibration.mask_probability[window, level]
                total = total + omega[window * calibration.levels + level, position] * nats / p
    return total / calibration.noisy_ids.numel()


@pytest.mark.parametrize("arm", ["masked", "masked+sink"])
@pytest.mark.parametrize("family, form", FORMS)
def test_taylor(tiny_model, calibration, family, form, arm):
    adapter = Adapter(tiny_model(family))
    scan = Scan(adapter, calibration, SINK, Limits(windows=2))
    paths = rank_units(scan, StructuredSettings(score="taylor", gqa=form), arm)
    _, omega = plain_rows(adapter, calibration, arm)
    adapter.model.zero_grad()
    plain_loss(adapter, calibration, omega).backward()
    for block in adapter.blocks:
        products = {key: value.grad * value.detach() for key, value in block_tensors(block).items()}
        expected = attention_sums(block, form, torch.abs, products)
        check_static(paths[block.index, "attention"], expected, unit_groups(block, form))
        expected = sum(products[role, "weight"].abs().sum(1) for role in ("gate", "up"))
        expected = expected + products["down", "weight"].abs().sum(0)
        check_static(paths[block.index, "channels"], expected, [range(48)])


@torch.no_grad()
def test_taylor_gradient_is_the_slope_of_the_loss(tiny_model, calibration):
    adapter = Adapter(tiny_model())
    weight, omega = adapter.blocks[2]["down"].weight, plain_rows(adapter, calibration, "masked+sink")[1]
    with torch.enable_grad():
        slope = torch.autograd.grad(plain_loss(adapter, calibration, omega), weight)[0]
    direction, step = torch.sign(slope), 1e-3
    weight += step * direction
    above = plain_loss(adapter, calibration, omega)
    weight -= 2 * step * direction
    below = plain_loss(adapter, calibration, omega)
    assert ((above - below) / (2 * step)).item() == pytest.approx((slope * direction).sum().item(), rel=0.02)


def test_taylor_leaves_the_model_as_it_was(tiny_model, calibration):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rank_units(Scan(Adapter(model), calibration, SINK), StructuredSettings(score="taylor"), "masked")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_taylor_without_mask_probabilities_is_refused(tiny_model, calibration):
    scan = Scan(Adapter(tiny_model()), replace(calibration, mask_probability=None), SINK)
    with pytest.raises(UserError, match="'taylor' needs mask probabilities"):
        rank_units(scan, StructuredSettings(score="taylor"), "masked")


def test_a_gram_matrix_that_cannot_be_factored_is_named_with_the_setting(tiny_model, calibration):
    """36 rows cannot span 48 channels, so that only damping makes the matrix positive definite."""
    scan = Scan(Adapter(tiny_model()), calibration, SINK)
    message = "^block 0, MLP channels: its Gram matrix cannot be factored with structured.damping = 1e-30: raise it$"
    with pytest.raises(UserError, match=message):
        rank_units(scan, StructuredSettings(damping=1e-30), "clean")
    assert len(rank_units(scan, StructuredSettings(damping=1e-6), "clean")) == 6


@pytest.mark.parametrize("needs, arm", [("weights", None), ("moments", "masked")])
@pytest.mark.parametrize("rank", [False, True])
def test_a_score_that_is_no_number_is_named(tiny_model, calibration, monkeypatch, needs, arm, rank):
    def path(units, statistic, settings):
        good, bad = torch.ones(units.count), torch.full((units.count,), float("nan"))
        return static_path(*((good, units.groups, bad) if rank else (bad, units.groups)))

    monkeypatch.setitem(SCORES, "magnitude", Score(needs, path))
    message = "block 0, attention heads: score 'magnitude' is not a finite number: choose another structured.score"
    with pytest.raises(UserError, match=message):
        rank_units(Scan(Adapter(tiny_model()), calibration, SINK), StructuredSettings(score="magnitude"), arm)


def test_slices_of_shared_kv_heads_stay_out_of_query_head_units(tiny_model):
    block = Adapter(tiny_model("dream")).blocks[0]

    def width(form: str) -> int:
        return sum(part.shape[1] for part in coupled_slices(Units.of(block, "attention", form), block_tensors(block)))

    assert width("query_heads") == 8 * 32 + 8 + 8 * 32  # q rows, q bias, output columns of one head of dim 8
    assert width("kv_groups") == 3 * width("query_heads") + 2 * (8 * 32 + 8)  # three of those, and k and v
