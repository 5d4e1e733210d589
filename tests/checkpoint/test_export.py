"""Export classes: which model is of which, why not, and the config.json each is written with."""

import json

import pytest

from structprune import Plan, UserError, apply_plan, load_model
from structprune.checkpoint.export import (
    auto_map,
    check_export,
    check_export_request,
    config_values,
    export_class,
    obstacles,
)
from structprune.config import Config
from structprune.models.families import DREAM, LLADA
from structprune.structured.plan import BlockPlan

FULL = {"llada": (range(4), range(4)), "dream": (range(6), range(2))}
FEWER = {"llada": ((0, 3), (0, 3)), "dream": ((0, 2, 3, 5), (0, 1))}


@pytest.fixture
def pruned(tiny_checkpoint):
    """`pruned(family, fewer_heads, channels per block, biases)` -> a pruned model of a tiny official checkpoint."""

    def make(family, fewer=False, channels=(24, 24, 24), biases=False, **changes):
        queries, kv_heads = (FEWER if fewer else FULL)[family]
        blocks = tuple(BlockPlan(tuple(queries), tuple(kv_heads), tuple(range(count))) for count in channels)
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


def test_reasons_name_the_remedy(pruned):
    model = pruned("llada", fewer=True)
    result = obstacles(model.config, model.source.values)
    assert result == {"official": "heads were removed (set structured.split to 0)"}
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
        ("official", {"structured.allocation": "uniform"}, "heads would be removed"),
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


def test_a_source_that_was_ours_gives_no_official_export(pruned):
    model = pruned("llada")
    ours = model.source.values | {"model_type": "structprune_llada"}
    assert export_class(model.config, ours) == "uniform"
    assert export_class(model.config, None) == "uniform"


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


@pytest.mark.parametrize("compat", ["official", "free"])
def test_no_output_is_called_quantised(tiny_checkpoint, compat):
    model = load_model(tiny_checkpoint("llada", quantization_config={"load_in_8bit": True}))
    assert "quantization_config" not in config_values(model.config, model.source.values, compat, "float32")
