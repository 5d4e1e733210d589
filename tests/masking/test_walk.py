"""A walk's statistics of every block against plain forward passes of whole models with hooks."""

import copy
from functools import partial

import pytest
import torch

from structprune.masking.walk import Use, Walk, Wanted
from structprune.models.adapter import Adapter

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
ROLES = ("query", "key", "value", "attention_output", "gate", "up", "down")  # in the order of LINEARS


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


def expected_score(wanted: Wanted, seen, rows: slice) -> dict:
    read, streams = seen
    found = {}
    for name, x in read.items():
        x = weigh(x, {k: s[rows] for k, s in streams.items()}, name, wanted.score.weight, wanted.score_relative)
        by_sequence = x.pow(2).sum(1).sqrt()  # (b, C)
        joint = by_sequence.pow(2).sum(0).sqrt()
        found[name] = {None: gram(x), "summed": by_sequence.sum(0), "joint": joint}[wanted.norms]
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


def cut(rows: slice, seen):
    return {name: x[rows] for name, x in seen[0].items()}, seen[1]


def check_products(found, wanted: Wanted, use: Use, hat, dense, family: str, block, power: dict | None):
    """G, C and the power of one purpose."""
    (read, streams), (aim, _) = cut(use.rows, hat), cut(use.rows, dense if wanted.target_dense else hat)
    streams = {name: stream[use.rows] for name, stream in streams.items()}
    for name, linears in LINEARS[family].items():
        x = weigh(read[name], streams, name, use.weight, wanted.fit_relative)
        y = weigh(aim[name], streams, name, use.weight, wanted.fit_relative)  # by the pruned prefix's stream too
        assert close(found[name][0], gram(x)) and close(found[name][1], gram(y, x)), name
        if power is not None:
            for path in linears:
                role = ROLES[[path for group in LINEARS[family].values() for path in group].index(path)]
                output = y @ block.get_submodule(path).weight.detach().double().T
                assert power[role] == pytest.approx(output.pow(2).sum().item(), rel=1e-4), role


def thin(block, seed: int) -> None:
    """Zero a third of every weight of a block, and move the rest."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in block.named_parameters():
        if weight.dim() == 2:
            weight.data.mul_(1.1 * (torch.rand(weight.shape, generator=generator) > 1 / 3))


def walk_and_check(model, family: str, wanted: Wanted, batch: int, budget: int) -> None:
    """Measure, change and leave every block, each compared with whole models run at once."""
    dense, adapter = copy.deepcopy(model), Adapter(model)
    walk = Walk(adapter, wanted, batch, budget)
    for index, view in enumerate(adapter.blocks):
        hat, still = forward(model, family, index, wanted.ids), forward(dense, family, index, wanted.ids)
        if index and (wanted.fit or not wanted.on_dense):
            assert not close(hat[0]["mlp_input"], still[0]["mlp_input"])  # there is something to tell apart
        found = walk.measure(view)
        if wanted.score is not None:
            expected = expected_score(
                wanted, cut(wanted.score.rows, still if wanted.on_dense else hat), wanted.score.rows
            )
            assert set(found.score) == set(expected)
            assert all(close(found.score[name], expected[name]) for name in expected)
        else:
            assert found.score == {}
        if wanted.fit is not None:
            check_products(found.fit, wanted, wanted.fit, hat, still, family, view.module, None)
            check_products(found.check, wanted, wanted.check, hat, still, family, view.module, found.power)
        else:
            assert found.fit == found.check == found.power == {}
        thin(view.module, index)
        walk.advance(view)


CASES = {
    "sequential grams, refit on the same rows": lambda ids, w: Wanted(
        ids, Use(PLAIN, w[PLAIN]), score_relative=True, fit=Use(PLAIN, None), check=Use(HELD_OUT, w[HELD_OUT])
    ),
    "sequential norms": lambda ids, w: Wanted(ids, Use(slice(0, ROWS), w), "joint"),
    "sequential norms of unweighted rows": lambda ids, w: Wanted(ids, Use(slice(0, 5), None), "summed"),
    "one-shot summed norms, refit to the layer": lambda ids, w: Wanted(
        ids, Use(slice(0, 2), w[:2]), "summed", score_relative=True, on_dense=True, fit=Use(slice(2, 4), w[2:4]),
        check=Use(HELD_OUT, None), fit_relative=False, target_dense=False,
    ),
    "one-shot grams": lambda ids, w: Wanted(ids, Use(slice(0, ROWS), w), on_dense=True, target_dense=False),
    "one-shot grams, dense refit on the same rows": lambda ids, w: Wanted(
        ids, Use(PLAIN, None), on_dense=True, fit=Use(PLAIN, w[PLAIN]), check=Use(HELD_OUT, w[HELD_OUT])
    ),
    "sequential norms, dense refit on other rows": lambda ids, w: Wanted(
        ids, Use(slice(0, 2), w[:2]), "joint", True, fit=Use(slice(2, 4), w[2:4]), check=Use(HELD_OUT, w[HELD_OUT])
    ),
    "refit alone, to the layer": lambda ids, w: Wanted(
        ids, fit=Use(PLAIN, w[PLAIN]), check=Use(HELD_OUT, w[HELD_OUT]), target_dense=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch, budget", [(1, 2**30), (3, 0)], ids=["memory", "files"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_whole_forward_passes(tiny_model, ids, omega, name, case, batch, budget):
    family, changes = MODELS[name]
    walk_and_check(tiny_model(family, **changes), family, CASES[case](ids, omega), batch, budget)


def test_files_and_batches_give_the_same_numbers(tiny_model, ids, omega):
    wanted = CASES["sequential grams, refit on the same rows"](ids, omega)
    found = []
    for batch, budget in ((3, 2**30), (3, 0), (1, 2**30)):
        adapter = Adapter(tiny_model("dream"))
        walk = Walk(adapter, wanted, batch, budget)
        assert (walk._prefix._states._file is None) == (budget > 0)
        for view in adapter.blocks:
            last = walk.measure(view)
            thin(view.module, view.index)
            walk.advance(view)
        found.append(last)
    for name in found[0].score:
        assert torch.equal(found[0].score[name], found[1].score[name])
        assert torch.equal(found[0].fit[name][1], found[1].fit[name][1])
        assert torch.allclose(found[0].score[name], found[2].score[name], rtol=1e-3, atol=1e-4)
    assert found[0].power == found[1].power


def test_products_are_of_the_weights_in_place(tiny_model, ids, omega):
    adapter = Adapter(tiny_model("llada"))
    wanted = CASES["sequential grams, refit on the same rows"](ids, omega)
    walk = Walk(adapter, wanted, 2, 2**30)
    walk.measure(adapter.blocks[0])
    thin(adapter.blocks[0].module, 0)
    walk.advance(adapter.blocks[0])
    block = adapter.blocks[1]
    found = walk.measure(block)
    fit, check = found.products(block, "mixed", "attention_output")
    weight = block["attention_output"].weight.detach().double()
    for product, (own, cross) in ((fit, found.fit["mixed"]), (check, found.check["mixed"])):
        assert product.gram.dtype == torch.float64 and torch.equal(product.gram, own.double())
        assert torch.allclose(product.wanted, weight @ cross.double())
        assert product.power == found.power["attention_output"]
    assert not torch.allclose(check.gram, fit.gram) and not torch.allclose(cross, cross.T, rtol=1e-3)


def test_streams_exist_only_where_something_reads_them(tiny_model, ids, omega):
    def streams(case):
        walk = Walk(Adapter(tiny_model("llada")), CASES[case](ids, omega), 2, 2**30)
        return [stream and stream._first for stream in (walk._prefix, walk._dense)]

    assert streams("sequential norms") == [0, None]
    assert streams("one-shot grams") == [None, 0]
    assert streams("one-shot summed norms, refit to the layer") == [2, 0]
    assert streams("sequential norms, dense refit on other rows") == [0, 2]
