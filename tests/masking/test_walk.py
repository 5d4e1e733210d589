"""A walk's statistics of every block against plain forward passes of whole models with hooks."""

import copy
from functools import partial

import pytest
import torch

from structprune.masking.walk import Use, Walk, WalkPlan
from structprune.models.adapter import READERS, Adapter
from structprune.models.maps import place_of
from structprune.statistics.scan import Limits

GQA = {"n_kv_heads": 2}
MODELS = {"llada": ("llada", {}), "llada-gqa": ("llada", GQA), "dream": ("dream", {})}  # Dream: 6 heads, 2 of K/V
ROWS, LENGTH = 7, 11
PLAIN, HELD_OUT = slice(0, 4), slice(4, 7)
LINEARS = {  # input -> the linears that read it, by family; the first is hooked
    "llada": {"attention_input": ("q_proj", "k_proj", "v_proj"), "mixed": ("attn_out",),
              "mlp_input": ("ff_proj", "up_proj"), "activated": ("ff_out",)},
    "dream": {"attention_input": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
              "mixed": ("self_attn.o_proj",), "mlp_input": ("mlp.gate_proj", "mlp.up_proj"),
              "activated": ("mlp.down_proj",)},
}  # fmt: skip
NORMS = {"llada": ("attn_norm", "ff_norm"), "dream": ("input_layernorm", "post_attention_layernorm")}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 2000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def omega() -> torch.Tensor:
    return torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def forward(model, family: str, index: int, ids: torch.Tensor):
    """One forward pass: what the linears of block `index` read, and the streams that two of them are added to."""
    block, read, handles = model.blocks[index], {}, []

    def note(name, module, given):
        read[name] = given[0].double()

    watched = {name: linears[0] for name, linears in LINEARS[family].items()}
    watched |= dict(zip(("before attention", "before mlp"), NORMS[family]))
    for name, path in watched.items():
        handles.append(block.get_submodule(path).register_forward_pre_hook(partial(note, name)))
    model(ids)
    for handle in handles:
        handle.remove()
    streams = {"mixed": read.pop("before attention"), "activated": read.pop("before mlp")}
    return read, streams


def weigh(x, streams, name: str, weight, relative: bool):
    """Rows (b, T, C) times ω, divided by the RMS of the stream that their output is added to."""
    x = x if weight is None else x * weight[..., None]
    if relative and name in streams:
        x = x / streams[name].pow(2).mean(-1, keepdim=True).sqrt()
    return x


def gram(x, y=None):
    return x.flatten(0, 1).T @ (x if y is None else y).flatten(0, 1)


def expected_score(plan: WalkPlan, inputs, rows: slice) -> dict:
    read, streams = inputs
    statistics = {}
    for name, x in read.items():
        x = weigh(x, {k: s[rows] for k, s in streams.items()}, name, plan.score.weight, plan.score_relative)
        by_sequence = x.pow(2).sum(1).sqrt()  # (b, C)
        joint = by_sequence.pow(2).sum(0).sqrt()
        statistics[name] = {None: gram(x), "summed": by_sequence.sum(0), "joint": joint}[plan.norms]
    return statistics


def close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(value.double(), expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


def cut(rows: slice, inputs):
    return {name: x[rows] for name, x in inputs[0].items()}, inputs[1]


def check_products(sums, name: str, plan: WalkPlan, use: Use, pruned, dense, family: str, block, power: bool):
    """G, C and the power of one purpose, for what reads one input of a dense block."""
    (read, streams), (source, _) = cut(use.rows, pruned), cut(use.rows, dense if plan.target_dense else pruned)
    streams = {name: stream[use.rows] for name, stream in streams.items()}
    x = weigh(read[name], streams, name, use.weight, plan.fit_relative)
    y = weigh(source[name], streams, name, use.weight, plan.fit_relative)  # by the pruned prefix's stream too
    assert close(sums.gram, gram(x)) and close(sums.cross, gram(y, x)), name
    assert len(sums.power) == (len(LINEARS[family][name]) if power else 0)
    for role, path in zip(READERS[name], LINEARS[family][name]):
        weight = block.get_submodule(path).weight.detach()
        product = sums.of(role, weight)
        assert product.gram.dtype == torch.float64 and torch.equal(product.gram, sums.gram.double())
        assert close(product.target, weight.double() @ gram(y, x))
        if power:
            output = y @ weight.double().T
            assert product.power == pytest.approx(output.pow(2).sum().item(), rel=1e-4), role


def thin(block, seed: int, paths: tuple[str, ...]) -> None:
    """Zero a third of the weights of some linears of a block, and move the rest."""
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        weight = block.get_submodule(path).weight
        weight.data.mul_(1.1 * (torch.rand(weight.shape, generator=generator) > 1 / 3))


def walk_and_check(model, family: str, plan: WalkPlan, batch: int, budget: int) -> None:
    """Measure, change and leave every block, each compared with whole models run at once."""
    dense = copy.deepcopy(model)
    adapter, original = Adapter(model), Adapter(dense)
    walk = Walk(original, adapter, plan, Limits(batch=batch, budget=budget))
    for index, view in enumerate(adapter.blocks):
        pruned, still = forward(model, family, index, plan.ids), forward(dense, family, index, plan.ids)
        if index and (plan.fit or not plan.on_dense):
            assert not close(pruned[0]["mlp_input"], still[0]["mlp_input"])  # there is something to tell apart
        measured = walk.measure(index)
        if plan.score is not None:
            inputs = cut(plan.score.rows, still if plan.on_dense else pruned)
            expected = expected_score(plan, inputs, plan.score.rows)
            assert set(measured) == set(expected)
            assert all(close(measured[name], expected[name]) for name in expected)
        else:
            assert measured == {}
        for name, paths in LINEARS[family].items():
            if plan.fit is not None:
                now = forward(model, family, index, plan.ids)  # with what the block lost already
                assert name == "attention_input" or not torch.equal(now[0][name], pruned[0][name])
                for product, use in zip(walk.products(index, name), (plan.fit, plan.check)):
                    block = dense.blocks[index]
                    check_products(product, name, plan, use, now, still, family, block, use is plan.check)
            thin(view.module, index, paths)
        walk.advance(index)


CASES = {
    "sequential grams, refit on the same rows": lambda ids, w: WalkPlan(
        ids, Use(PLAIN, w[PLAIN]), score_relative=True, fit=Use(PLAIN, None), check=Use(HELD_OUT, w[HELD_OUT])
    ),
    "sequential norms": lambda ids, w: WalkPlan(ids, Use(slice(0, ROWS), w), "joint"),
    "sequential norms of unweighted rows": lambda ids, w: WalkPlan(ids, Use(slice(0, 5), None), "summed"),
    "one-shot summed norms, refit to the layer": lambda ids, w: WalkPlan(
        ids, Use(slice(0, 2), w[:2]), "summed", score_relative=True, on_dense=True, fit=Use(slice(2, 4), w[2:4]),
        check=Use(HELD_OUT, None), fit_relative=False, target_dense=False,
    ),
    "one-shot grams": lambda ids, w: WalkPlan(ids, Use(slice(0, ROWS), w), on_dense=True, target_dense=False),
    "one-shot grams, dense refit on the same rows": lambda ids, w: WalkPlan(
        ids, Use(PLAIN, None), on_dense=True, fit=Use(PLAIN, w[PLAIN]), check=Use(HELD_OUT, w[HELD_OUT])
    ),
    "sequential norms, dense refit on other rows": lambda ids, w: WalkPlan(
        ids, Use(slice(0, 2), w[:2]), "joint", True, fit=Use(slice(2, 4), w[2:4]), check=Use(HELD_OUT, w[HELD_OUT])
    ),
    "refit alone, to the layer": lambda ids, w: WalkPlan(
        ids, fit=Use(PLAIN, w[PLAIN]), check=Use(HELD_OUT, w[HELD_OUT]), target_dense=False
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("batch, budget", [(1, 2**30), (3, 0)], ids=["memory", "files"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_whole_forward_passes(tiny_model, ids, omega, name, case, batch, budget):
    family, changes = MODELS[name]
    walk_and_check(tiny_model(family, **changes), family, CASES[case](ids, omega), batch, budget)


def test_files_and_batches_give_the_same_numbers(tiny_model, ids, omega):
    plan = CASES["sequential grams, refit on the same rows"](ids, omega)
    runs = []
    for batch, budget in ((3, 2**30), (3, 0), (1, 2**30)):
        model = tiny_model("dream")
        adapter = Adapter(model)
        walk = Walk(Adapter(copy.deepcopy(model)), adapter, plan, Limits(batch=batch, budget=budget))
        assert (place_of(walk._prefix.read(slice(0, 1))) is None) == (budget > 0)
        for view in adapter.blocks:
            score, products = walk.measure(view.index), {}
            for name, paths in LINEARS["dream"].items():
                products[name] = walk.products(view.index, name)
                thin(view.module, view.index, paths)
            walk.advance(view.index)
        runs.append((score, products))
    (one, refit), (files, same), (single, _) = runs
    for name in one:
        assert torch.equal(one[name], files[name])
        assert all(torch.equal(a.cross, b.cross) and a.power == b.power for a, b in zip(refit[name], same[name]))
        assert torch.allclose(one[name], single[name], rtol=1e-3, atol=1e-4)


def test_products_over_fit_and_held_out_rows_differ(tiny_model, ids, omega):
    model = tiny_model("llada")
    adapter, plan = Adapter(model), CASES["sequential grams, refit on the same rows"](ids, omega)
    walk = Walk(Adapter(copy.deepcopy(model)), adapter, plan, Limits(batch=2))
    for name, paths in LINEARS["llada"].items():
        fit, check = walk.products(0, name)
        assert not torch.allclose(check.gram, fit.gram)
        if name != "attention_input":  # before which nothing was lost yet
            assert not torch.allclose(check.cross, check.cross.T, rtol=1e-3)
        thin(adapter.blocks[0].module, 0, paths)


def test_streams_exist_only_where_something_reads_them(tiny_model, ids, omega):
    adapter = Adapter(tiny_model("llada"))

    def streams(case):
        walk = Walk(adapter, adapter, CASES[case](ids, omega), Limits(batch=2))
        both = (walk._prefix, walk._dense)
        return [stream and (stream.rows.start, stream.rows.stop, len(stream._states._states)) for stream in both]

    assert streams("sequential norms") == [(0, 7, 7), None]
    assert streams("one-shot grams") == [None, (0, 7, 7)]
    assert streams("one-shot summed norms, refit to the layer") == [(2, 7, 5), (0, 2, 2)]
    assert streams("sequential norms, dense refit on other rows") == [(0, 7, 7), (2, 7, 5)]
