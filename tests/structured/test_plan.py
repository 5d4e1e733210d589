"""A plan as a file: round trip, edits by hand, and plans that do not fit."""

import json
from dataclasses import replace

import pytest
import torch

from structprune.errors import UserError
from structprune.models.adapter import Adapter, Widths
from structprune.structured.paths import RemovalPath, static_path
from structprune.structured.plan import BlockPlan, Plan, identity_plan, make_plan
from structprune.structured.surgery import apply_plan


def changed(plan: Plan, index: int = 1, **lists) -> Plan:
    """The plan with some lists of one block replaced."""
    blocks = list(plan.blocks)
    blocks[index] = replace(blocks[index], **{key: tuple(value) for key, value in lists.items()})
    return replace(plan, blocks=tuple(blocks))


def everywhere(plan: Plan, **lists) -> Plan:
    """The plan with some lists of all blocks replaced."""
    return replace(plan, blocks=tuple(replace(block, **lists) for block in plan.blocks))


@pytest.fixture
def llada(tiny_model):
    return Adapter(tiny_model("llada"))  # three blocks of 4 heads and 48 channels


@pytest.fixture
def dream(tiny_model):
    return Adapter(tiny_model("dream"))  # three blocks of 6 query heads, 2 KV heads and 48 channels


def test_round_trip(llada, tmp_path):
    plan = replace(
        changed(identity_plan(llada), channels=range(3, 20)), notes={"ratio": 0.3, "score": "obs", "arm": None}
    )
    assert plan.save(tmp_path / "plan.json") == tmp_path / "plan.json"
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads(plan.to_json())["blocks"][1]["channels"] == list(range(3, 20))
    assert Plan.load(identity_plan(llada).save(tmp_path / "plan.json")) == identity_plan(llada)  # overwrites
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_an_edited_plan_is_applied_as_edited(llada, tmp_path):
    path = identity_plan(llada).save(tmp_path / "plan.json")
    values = json.loads(path.read_text())
    values["blocks"][2] |= {"query_heads": [1, 2], "kv_heads": [1, 2], "channels": [0, 5, 47]}
    path.write_text(json.dumps(values))
    small = Adapter(apply_plan(llada.model, Plan.load(path)))
    assert [block.widths for block in small.blocks] == [Widths(4, 4, 48), Widths(4, 4, 48), Widths(2, 2, 3)]
    dense = llada.blocks[2]
    assert torch.equal(small.blocks[2]["down"].weight, dense["down"].weight[:, [0, 5, 47]])
    assert torch.equal(small.blocks[2]["query"].weight, dense["query"].weight[8:24])


REFUSALS = {
    "family": (lambda plan: replace(plan, family="dream"), "the plan is for family 'dream', the model is of 'llada'"),
    "depth": (lambda plan: replace(plan, blocks=plan.blocks[:2]), "the plan has 2 blocks, the model 3"),
    "range": (lambda plan: changed(plan, channels=[0, 48]), "block 1: channels names 48, but the model has 48"),
    "negative": (lambda plan: changed(plan, channels=[-1, 2]), "block 1: channels names -1, but the model has 48"),
    "duplicate": (
        lambda plan: changed(plan, channels=[2, 2, 5]),
        "block 1: channels is not sorted and free of repeats",
    ),
    "unsorted": (lambda plan: changed(plan, channels=[5, 2]), "block 1: channels is not sorted and free of repeats"),
    "no query heads": (lambda plan: changed(plan, query_heads=[]), "block 1 keeps KV heads but no query heads"),
    "no KV heads": (lambda plan: changed(plan, kv_heads=[]), "block 1 keeps query heads but no KV heads: empty both"),
    "no MLP": (lambda plan: everywhere(plan, channels=()), "the plan leaves no block with an MLP: keep it in one"),
    "no attention": (
        lambda plan: everywhere(plan, query_heads=(), kv_heads=()),
        "the plan leaves no block with attention: keep it in one",
    ),
    "nothing": (
        lambda plan: everywhere(plan, query_heads=(), kv_heads=(), channels=()),
        "the plan leaves no block with attention",
    ),
    "kv of another head": (
        lambda plan: changed(plan, query_heads=[0, 1], kv_heads=[0, 2]),
        "query head 1 stays but its KV",
    ),
    "kv without a query": (
        lambda plan: changed(plan, query_heads=[0], kv_heads=[0, 2]),
        "unequal numbers of query heads",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_plans_that_do_not_fit_are_refused(llada, name):
    edit, message = REFUSALS[name]
    plan = edit(identity_plan(llada))
    with pytest.raises(UserError, match=message) as caught:
        apply_plan(llada.model, plan)
    assert "\n" not in str(caught.value)


def test_an_empty_list_removes_attention_mlp_or_block(llada, tmp_path):
    plan = changed(identity_plan(llada), 0, channels=[])
    plan = changed(changed(plan, 1, query_heads=[], kv_heads=[], channels=[]), 2, query_heads=[], kv_heads=[])
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan and json.loads(plan.to_json())["format"] == 1
    assert [block.kinds for block in again.blocks] == [("attention",), (), ("channels",)]
    assert again.remaining == (0, 2) and identity_plan(llada).remaining == (0, 1, 2)
    small = Adapter(apply_plan(llada.model, again))
    assert [block.widths for block in small.blocks] == [Widths(4, 4, 0), Widths(0, 0, 48)]
    assert small.model.config.n_layers == small.model.config.num_hidden_layers == 2


def test_what_a_model_lacks_cannot_be_kept(tiny_model, gaps):
    adapter = Adapter(tiny_model(**gaps()))
    plan = identity_plan(adapter)
    assert [block.kinds for block in plan.blocks] == [block.kinds for block in adapter.blocks]
    plan.check(adapter)
    with pytest.raises(UserError, match=r"block 0: channels names 3, but that block of the model has none: give \[\]$"):
        changed(plan, 0, channels=[3]).check(adapter)
    with pytest.raises(UserError, match="block 2: query_heads names 0, but that block of the model has none"):
        changed(plan, 2, query_heads=[0], kv_heads=[0]).check(adapter)


def test_grouped_heads_must_stay_equal(dream):
    plan = identity_plan(dream)
    changed(plan, query_heads=[0, 2, 3, 4]).check(dream)  # two of each group
    changed(plan, query_heads=[1], kv_heads=[0]).check(dream)  # one of one group
    with pytest.raises(UserError, match=r"block 1: KV heads keep unequal numbers of query heads \(\{0: 2, 1: 1\}\)"):
        changed(plan, query_heads=[0, 2, 3]).check(dream)
    with pytest.raises(UserError, match="query head 3 stays but its KV head 1 goes"):
        changed(plan, query_heads=[0, 1, 2, 3], kv_heads=[0]).check(dream)


FILES = {
    "text": ("not json", "plan.json"),
    "another format": ('{"format": 2, "blocks": []}', "not a structprune plan of format 1"),
    "no blocks": ('{"format": 1, "blocks": 3}', "not a structprune plan"),
    "a missing list": (
        '{"format": 1, "blocks": [{"query_heads": [0], "kv_heads": [0]}]}',
        "block 0 has no list .*channels",
    ),
    "not integers": (
        '{"format": 1, "blocks": [{"query_heads": [0.5], "kv_heads": [0], "channels": [1]}]}',
        "query_heads",
    ),
    "booleans": ('{"format": 1, "blocks": [{"query_heads": [true], "kv_heads": [0], "channels": [1]}]}', "query_heads"),
    "a block that is a list": ('{"format": 1, "blocks": [[1]]}', "block 0 has no list"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_plan(tmp_path, name):
    text, message = FILES[name]
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no plan file at"):
        Plan.load(tmp_path / "plan.json")


def channel_path(first: list[int]) -> RemovalPath:
    cost = torch.arange(48.0) + 100
    cost[first] = torch.arange(len(first)).float()
    return static_path(cost, [list(range(48))])


def test_counts_and_paths_make_a_plan_of_heads(llada):
    paths = {(1, "attention"): static_path(torch.tensor([4.0, 1.0, 3.0, 2.0]), [[0, 1, 2, 3]])}
    paths[1, "channels"] = channel_path([7, 3])
    plan = make_plan(llada, paths, {(1, "attention"): 2, (1, "channels"): 2}, "query_heads", {"ratio": 0.2})
    plan.check(llada)
    kept = tuple(channel for channel in range(48) if channel not in (3, 7))
    assert plan.blocks[1] == BlockPlan((0, 2), (0, 2), kept)
    assert plan.blocks[0] == identity_plan(llada).blocks[0] and plan.notes == {"ratio": 0.2}


@pytest.mark.parametrize("form", ["query_heads", "kv_groups"])
def test_counts_of_all_steps_remove_attention_or_mlp(dream, form):
    groups, costs = ([[0, 1, 2], [3, 4, 5]], 6) if form == "query_heads" else ([[0, 1]], 2)
    paths = {(0, "attention"): static_path(torch.arange(float(costs)), groups), (2, "channels"): channel_path([])}
    plan = make_plan(dream, paths, {(0, "attention"): costs // len(groups), (2, "channels"): 48}, form)
    plan.check(dream)
    whole = identity_plan(dream).blocks
    assert plan.blocks == (replace(whole[0], query_heads=(), kv_heads=()), whole[1], replace(whole[2], channels=()))


@pytest.mark.parametrize("form, heads, kv", [("query_heads", (1, 2, 3, 5), (0, 1)), ("kv_groups", (3, 4, 5), (1,))])
def test_counts_and_paths_make_a_plan_of_grouped_heads(dream, form, heads, kv):
    if form == "query_heads":
        path = static_path(torch.tensor([1.0, 2.0, 3.0, 5.0, 4.0, 6.0]), [[0, 1, 2], [3, 4, 5]])
    else:
        path = static_path(torch.tensor([1.0, 2.0]), [[0, 1]])
    paths = {(0, "attention"): path, (0, "channels"): channel_path([])}
    plan = make_plan(dream, paths, {(0, "attention"): 1, (0, "channels"): 0}, form)
    plan.check(dream)
    assert plan.blocks[0] == BlockPlan(heads, kv, tuple(range(48)))
