"""Export classes: which model is of which, why not, and the config.json each is written with."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from structprune import Plan, UserError, apply_plan, load_model
from structprune.checkpoint.export import (
    CODE_FILES,
    auto_map,
    check_export,
    check_export_request,
    config_values,
    export_class,
    obstacles,
)
from structprune.checkpoint.save import save_pruned
from structprune.config import Config, ExportSettings
from structprune.models.families import DREAM, FAMILIES, LLADA
from structprune.structured.plan import BlockPlan

IDS = torch.arange(1, 13).reshape(2, 6)  # (B, T)
FULL = {"llada": (range(4), range(4)), "dream": (range(6), range(2))}
FEWER = {"llada": ((0, 3), (0, 3)), "dream": ((0, 1, 2), (0,))}


@pytest.fixture
def pruned(tiny_checkpoint):
    """`pruned(family, fewer_heads, channels per block, biases)` -> a pruned model of a tiny official checkpoint.

    A block with None channels is removed as a whole.
    """

    def make(family, fewer=False, channels=(24, 24, 24), biases=False, **changes):
        queries, kv_heads = (FEWER if fewer else FULL)[family]
        kept = BlockPlan(tuple(queries), tuple(kv_heads), ())
        blocks = tuple(
            BlockPlan((), (), ()) if count is None else replace(kept, channels=tuple(range(count)))
            for count in channels
        )
        return apply_plan(load_model(tiny_checkpoint(family, **changes)), Plan(family, blocks), biases)

    return make


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("fewer, channels, biases, result", [
    (False, (24, 24, 24), False, "official"), (True, (24, 24, 24), False, "uniform"),
    (False, (24, 24, 24), True, "free"), (True, (24, 24, 24), True, "free"), (False, (24, 20, 24), False, "free"),
])  # fmt: skip
def test_strictest_class(pruned, family, fewer, channels, biases, result):
    model = pruned(family, fewer, channels, biases)
    assert export_class(model.config, model.source.values) == result
    order = ("official", "uniform", "free")
    for compat in order:
        if order.index(compat) >= order.index(result):
            check_export(model.config, model.source.values, compat)
        else:
            message = f"export.compat = {compat} is not possible: .*; or export as {result}$"
            with pytest.raises(UserError, match=message):
                check_export(model.config, model.source.values, compat)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("fewer, channels, result", [
    (False, (24, None, 24), "official"), (False, (None, 48, 48), "official"), (True, (None, 24, None), "uniform"),
    (False, (24, None, 20), "free"), (False, (24, 0, 24), "free"), (False, (48, 48, 0), "free"),
])  # fmt: skip
def test_strictest_class_without_a_block_or_its_mlp(pruned, family, fewer, channels, result):
    """A block that is deleted leaves fewer blocks, which may be equal; half a block is of no class but free."""
    model = pruned(family, fewer, channels)
    assert len(model.blocks) == 3 - channels.count(None)
    assert export_class(model.config, model.source.values) == result
    if 0 in channels:
        reason = "some blocks lack attention or MLP (remove both, so that the whole block goes)"
        assert obstacles(model.config, model.source.values) == {"official": reason, "uniform": reason}


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_equal_blocks_without_attention_are_of_no_class_but_free(tiny_model, family):
    heads = dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads") if family == "dream" else ("n_heads", "n_kv_heads"), 0
    )
    config = tiny_model(family, per_layer_config=dict.fromkeys("012", heads)).config
    assert obstacles(config, {"model_type": "Dream" if family == "dream" else family}).keys() == {"official", "uniform"}


def test_reasons_name_the_remedy(pruned):
    model = pruned("llada", fewer=True)
    result = obstacles(model.config, model.source.values)
    features = "2 heads of 8 are not the hidden size 32"
    assert result == {"official": f"heads were removed: {features} (set structured.split to 0)"}
    model = pruned("llada", channels=(24, 16, 24))
    assert "blocks differ in width" in obstacles(model.config, model.source.values)["uniform"]
    model = pruned("llada", biases=True)
    assert "added biases" in obstacles(model.config, model.source.values)["official"]


@pytest.mark.parametrize(
    "compat, changes, reason",
    [
        ("uniform", {}, "blocks would differ in width"),
        ("uniform", {"structured.allocation": "uniform", "structured.protect_last": 1}, "blocks would differ in width"),
        ("uniform", {"structured.allocation": "uniform", "reconstruct.constant": True}, "would add biases"),
        ("uniform", {"structured.allocation": "uniform", "reconstruct.mode": "bias"}, "would add biases"),
        ("official", {"structured.allocation": "uniform"}, "heads would be removed .*; or export as uniform$"),
        ("official", {"structured.allocation": "uniform", "structured.split": 1}, "heads would be removed"),
        ("official", {"structured.allocation": "uniform", "structured.split": 0}, None),
        ("uniform", {"structured.allocation": "uniform"}, None),
        ("official", {"structured.ratio": 0}, None),
        ("free", {}, None),
    ],
)
def test_a_request_that_rules_a_class_out(compat, changes, reason):
    config = Config.load(overrides={"export.compat": compat} | changes)
    if reason is None:
        return check_export_request(config)
    with pytest.raises(UserError, match=f"export.compat = {compat} is not possible: .*{reason}"):
        check_export_request(config)


def test_a_source_that_was_ours_is_judged_by_its_shapes(pruned):
    """A pruned checkpoint in our own layout, whose heads still share out the hidden size, goes back to the family's."""
    model = pruned("llada")
    ours = model.source.values | {"model_type": "structprune_llada"}
    assert export_class(model.config, ours) == "official" == export_class(model.config, None)
    fewer = pruned("llada", fewer=True)
    assert export_class(fewer.config, ours) == "uniform" == export_class(fewer.config, None)


def test_a_uniform_export_is_not_taken_for_an_official_one(pruned, tmp_path):
    """Its config.json names the family, and as many heads as the model has."""
    out = save_pruned(pruned("llada", fewer=True), tmp_path / "out", ExportSettings(compat="uniform"))
    model = load_model(out)
    assert model.source.values["model_type"] == "llada"
    assert export_class(model.config, model.source.values) == "uniform"


@pytest.mark.parametrize("family", [LLADA, DREAM])
@pytest.mark.parametrize("ours", [True, False])
def test_uniform_config_has_the_familys_keys_and_a_head_size(pruned, family, ours):
    """Also of a source in our own layout; then with what other code does not take for granted."""
    model = pruned(family.name, fewer=True)
    values = config_values(model.config, None if ours else model.source.values, "uniform", "float32")
    assert (values["model_type"], values["architectures"]) == (family.model_types[0], [family.architecture])
    heads = len(FEWER[family.name][0]), len(FEWER[family.name][1])
    assert values["head_dim"] == 8 and values[family.width_keys["channels"]] == 24
    assert tuple(values[family.width_keys[role]] for role in ("query_heads", "kv_heads")) == heads
    strange = {"num_hidden_layers", "num_attention_heads", "hidden_size", "attention_output_bias", "published", "dtype"}
    assert not strange & set(values) if family is LLADA else "attention_output_bias" not in values
    stored = {} if ours else model.source.values
    assert all(values[key] == stored.get(key, allowed[0]) for key, allowed in family.supported.items() if key in values)
    fixed = {key for key, allowed in family.supported.items() if allowed != (None,)}
    assert not ours or fixed <= set(values)


@pytest.mark.parametrize("family, key, kind", [
    ("llada", "mlp_hidden_size", "llada"), ("dream", "intermediate_size", "Dream"),
])  # fmt: skip
def test_official_config_keeps_the_familys_own_keys(pruned, family, key, kind):
    model = pruned(family, dtype="float32", init_fn="mitchell", use_cache=False)
    values = config_values(model.config, model.source.values, "official", "bfloat16")
    source = {name: value for name, value in model.source.values.items() if name not in (key, "torch_dtype", "dtype")}
    assert {name: values[name] for name in source} == source  # all of them, whatever they mean
    assert (values["model_type"], values[key], values["torch_dtype"]) == (kind, 24, "bfloat16")
    assert "dtype" not in values and "per_layer_config" not in values
    assert set(values) - set(source) == {key, "torch_dtype", "auto_map"}


@pytest.mark.parametrize("family, key", [("llada", "n_layers"), ("dream", "num_hidden_layers")])
@pytest.mark.parametrize("compat", ["official", "uniform", "free"])
def test_the_depth_is_that_of_the_remaining_blocks(pruned, family, key, compat):
    """Under all names that the source has for it; a source may also carry widths that no remaining block has."""
    model = pruned(family, channels=(24, None, 24), num_hidden_layers=3, per_layer_config={"1": {}})
    values = config_values(model.config, model.source.values, compat, "float32")
    assert values[key] == values["num_hidden_layers"] == 2 and "per_layer_config" not in values
    ours = config_values(model.config, None, compat, "float32")
    assert ours[key] == 2 and ("num_hidden_layers" in ours) == (family == "dream" or compat == "free")


@pytest.mark.parametrize("compat", ["official", "uniform", "free"])
def test_fewer_blocks_have_fewer_layer_types(pruned, tmp_path, compat):
    """transformers refuses a list of another length than the depth."""
    model = pruned("dream", channels=(24, None, 24), layer_types=["full_attention"] * 3)
    out = save_pruned(model, tmp_path / "out", ExportSettings(compat=compat))
    values = json.loads((out / "config.json").read_text())
    assert values["num_hidden_layers"] == 2 and values["layer_types"] == ["full_attention"] * 2
    assert len(load_model(out).blocks) == 2


def test_official_config_has_the_mask_id_that_was_given(tiny_checkpoint):
    directory = tiny_checkpoint("llada", tokenizer=False)
    values = json.loads((directory / "config.json").read_text())
    del values["mask_token_id"]
    (directory / "config.json").write_text(json.dumps(values))
    model = load_model(directory, mask_id=5)
    assert config_values(model.config, model.source.values, "official", "float32")["mask_token_id"] == 5


@pytest.mark.parametrize("compat", ["free", "uniform", "official"])
def test_a_tie_that_the_model_does_not_have_is_not_written(pruned, compat):
    """The head is separate, and LLaDA's own code reads `weight_tying`; transformers 4 would tie it by this key."""
    model = pruned("llada", tie_word_embeddings=True)
    assert model.config.tie_word_embeddings is False
    values = config_values(model.config, model.source.values, compat, "float32")
    assert values["tie_word_embeddings"] is False
    assert values.get("weight_tying") is False


@pytest.mark.parametrize("family", [LLADA, DREAM])
def test_a_tied_head_is_refused_by_the_configuration(family):
    with pytest.raises(ValueError, match="^tie_word_embeddings=True is not possible: .*, use False$"):
        family.config_class(tie_word_embeddings=True)
    assert family.config_class(tie_word_embeddings=None).tie_word_embeddings is False


@pytest.mark.parametrize("family", [LLADA, DREAM])
def test_free_config_is_our_own_type(pruned, family):
    model = pruned(family.name, True, (24, 24, 8))
    values = config_values(model.config, model.source.values, "free", "float32")
    assert values["model_type"] == f"structprune_{family.name}"
    assert values["architectures"] == [family.model_class.__name__]
    assert values["head_dim"] == 8 and values["torch_dtype"] == "float32" and "dtype" not in values
    assert values["per_layer_config"] == {"2": {family.width_keys["channels"]: 8}}
    assert values[family.width_keys["channels"]] == 24
    json.dumps(values)


@pytest.mark.parametrize("family", [LLADA, DREAM])
def test_auto_map_leads_to_the_files_beside_the_weights(family):
    name = family.model_class.__name__
    entries = auto_map(family)["auto_map"]
    assert entries.pop("AutoConfig") == f"configuration_structprune.{name}Config"
    assert set(entries.values()) == {f"modeling_structprune.{name}"}
    masked = {"AutoModelForMaskedLM"} if family is LLADA else set()  # whose logits Dream's are not: they are shifted
    assert set(entries) == {"AutoModel", "AutoModelForCausalLM"} | masked


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_file_that_a_class_needs_is_named_by_its_own(family):
    """transformers 4 copies a local checkpoint's files by the imports of the class's file alone, not by theirs."""
    for cls in (family.config_class, family.model_class, family.layout_class or family.model_class):
        file = inspect.getfile(cls)
        named = {Path(file).with_name(f"{name}.py") for name in get_relative_imports(file)}
        assert {Path(path) for path in get_relative_import_files(file)} == named
        assert {path.name for path in named} <= {*CODE_FILES, *(path.name for path in family.code)}


@pytest.mark.parametrize("compat", ["official", "free"])
def test_no_output_is_called_quantised(tiny_checkpoint, compat):
    model = load_model(tiny_checkpoint("llada", quantization_config={"load_in_8bit": True}))
    assert "quantization_config" not in config_values(model.config, model.source.values, compat, "float32")


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("fewer, channels, own", [(False, (24, 24, 24), False), (True, (24, 24, 8), True)])
def test_save_pretrained_keeps_the_familys_layout_where_it_can(pruned, tmp_path, family, fewer, channels, own):
    """A model that was loaded from it and trained stays readable by what read it before."""
    model = pruned(family, fewer, channels)
    model.save_pretrained(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    source = model.source.values
    kind = f"structprune_{family}" if own else source["model_type"]
    assert values["model_type"] == kind and "published" not in values
    assert values["architectures"] == ([type(model).__name__] if own else source["architectures"])
    assert torch.equal(load_model(tmp_path / "out")(IDS).logits, model(IDS).logits)
