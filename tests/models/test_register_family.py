"""A family from outside the package: loading, pruning, saving, generation and evaluation know it by its row."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import structprune
from structprune.assets import model_directory
from structprune.errors import UserError
from structprune.generation.generate import generate
from structprune.generation.samplers import DreamGeneration, LLaDAGeneration
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.families import FAMILIES, LLADA, Family, family_named, family_of, register_family
from structprune.models.modeling_structprune import StructpruneLLaDA
from structprune.runs.evaluate import evaluate

MASK_ID = 2045

# LLaDA's architecture under GPT-2's key names, with Dream's sampler
NAMES = {"d_model": "n_embd", "n_heads": "n_head", "n_kv_heads": "n_kv_head", "n_layers": "n_layer",
         "mlp_hidden_size": "n_inner", "max_sequence_length": "n_positions"}  # fmt: skip


class ToyConfig(StructpruneLLaDAConfig):
    model_type = "structprune_toy"  # of pruned checkpoints
    attribute_map = NAMES | {name: NAMES[key] for name, key in StructpruneLLaDAConfig.attribute_map.items()}

    def __init__(self, **values):
        ours = {theirs: ours for ours, theirs in NAMES.items()}
        super().__init__(**{ours.get(key, key): value for key, value in values.items()})


class ToyLM(StructpruneLLaDA):
    config_class = ToyConfig


TOY = Family(
    name="toy", model_types=("toy",), architecture="ToyForMaskedLM", config_class=ToyConfig, model_class=ToyLM,
    blocks="model.transformer.blocks", embedding="model.transformer.wte.weight",
    width_keys={"query_heads": "n_head", "kv_heads": "n_kv_head", "channels": "n_inner"},
    keys={"hidden": "n_embd", "depth": "n_layer", "vocabulary": "vocab_size", "positions": "n_positions"},
    required=("n_embd", "n_head", "n_layer", "n_inner", "vocab_size"),
    schedule="levels", sampler="timesteps", likelihood="fixed_count",
)  # fmt: skip


@pytest.fixture
def toy():
    register_family(TOY)
    yield TOY
    FAMILIES.remove(TOY)


@pytest.fixture
def checkpoint(toy, tmp_path) -> Path:
    """An official directory of the family with random weights."""
    directory = tmp_path / "toy"
    directory.mkdir()
    sizes = {"n_embd": 32, "n_head": 4, "n_kv_head": 4, "n_layer": 3, "n_inner": 48, "vocab_size": 2048}
    values = sizes | {"n_positions": 128, "rope_theta": 10000.0, "mask_token_id": MASK_ID}
    torch.manual_seed(0)
    state = {name: tensor.clone() for name, tensor in ToyLM(ToyConfig(**values)).state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "toy", "architectures": ["ToyModelLM"], **values}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_directory() / name, directory / name)
    return directory


def test_the_toy_takes_at_most_thirty_lines():
    names = ("NAMES", "ToyConfig", "ToyLM", "TOY")
    nodes = [
        node
        for node in ast.parse(Path(__file__).read_text()).body
        if getattr(node, "name", None) in names or (isinstance(node, ast.Assign) and node.targets[0].id in names)
    ]
    assert len(nodes) == 4
    assert sum(node.end_lineno - node.lineno + 1 for node in nodes) <= 30


def test_an_official_config_is_read(checkpoint):
    model = structprune.load_model(checkpoint)
    assert type(model) is ToyLM and family_of(model.config) is TOY is family_named("toy")
    assert (model.config.n_embd, model.config.d_model, model.config.mask_token_id) == (32, 32, MASK_ID)
    (checkpoint / "config.json").write_text(json.dumps(json.loads((checkpoint / "config.json").read_text())
                                                       | {"rope_scaling": {"type": "linear"}}))  # fmt: skip
    with pytest.raises(UserError, match="rope_scaling = .* is not supported"):
        structprune.load_model(checkpoint)


@pytest.fixture
def pruned(checkpoint, text_path, small_run):
    config = structprune.Config.load(overrides=[*small_run, "structured.ratio=0.2", f"calibration.source={text_path}"])
    return structprune.prune(structprune.load_model(checkpoint), config)


def test_it_is_pruned_saved_and_loaded_again(pruned, tmp_path):
    out = tmp_path / "small"
    pruned.save(out)
    values = json.loads((out / "config.json").read_text())
    assert values["model_type"] == "structprune_toy" and values["architectures"] == ["ToyLM"]
    assert "auto_map" not in values  # the files beside the weights do not define ToyLM
    assert "position i predicts token i." in (out / "README.md").read_text()
    again = structprune.load_model(out, dtype="float32")
    assert type(again) is ToyLM and again.num_parameters() == pruned.model.num_parameters()
    assert 0.1 < pruned.report["ratio"] < 0.3 and pruned.report["family"] == "toy"
    ids = torch.arange(40).view(2, 20)  # (B, T)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, pruned.model(ids).logits)
    pruned.save(out, overwrite=True)


def test_files_that_define_the_classes_are_written_with_the_weights(toy, pruned, tmp_path):
    FAMILIES[FAMILIES.index(toy)] = replace(toy, code=(Path(__file__),))
    try:
        pruned.save(tmp_path / "small")
    finally:
        FAMILIES[-1] = toy
    entries = json.loads((tmp_path / "small" / "config.json").read_text())["auto_map"]
    assert entries["AutoConfig"] == "test_register_family.ToyConfig"
    assert entries["AutoModel"] == "test_register_family.ToyLM"
    assert (tmp_path / "small" / "test_register_family.py").read_bytes() == Path(__file__).read_bytes()


def test_it_generates_with_the_sampler_of_its_row(checkpoint):
    model = structprune.load_model(checkpoint)
    [tokens] = generate(model, [torch.arange(5)], DreamGeneration(8, 4))
    assert len(tokens) == 13
    with pytest.raises(UserError, match="LLaDAGeneration is not for a model of family toy: use DreamGeneration"):
        generate(model, [torch.arange(5)], LLaDAGeneration(8, 4, 4))


def test_it_is_evaluated(checkpoint, text_path, piqa, eval_settings, tmp_path):
    settings = eval_settings(text_path, [f"piqa:{piqa}"])
    result = evaluate([str(checkpoint)], settings, tmp_path / "results").summary["checkpoints"]["toy"]
    assert 6 < result["text.txt"]["metrics"]["nelbo"]["value"] < 9  # log 2048 = 7.6
    assert result[f"piqa:{piqa.name}"]["items"] == 6


@pytest.mark.parametrize("changes, message", [
    ({"name": "llada"}, "family 'llada': name 'llada' belongs to family 'llada': rename it"),
    ({"model_types": ("toy", "Dream")}, "family 'toy': model_type 'Dream' belongs to family 'dream': rename it"),
    ({"config_class": StructpruneLLaDAConfig}, "model_type 'structprune_llada' belongs to family 'llada'"),
    ({"config_class": type("StructpruneLLaDAConfig", (ToyConfig,), {"model_type": "x"})},
     "config class 'StructpruneLLaDAConfig' belongs to family 'llada'"),
])  # fmt: skip
def test_what_is_taken_is_refused(changes, message):
    families = list(FAMILIES)
    with pytest.raises(UserError, match=message) as caught:
        register_family(replace(TOY, **changes))
    assert families == FAMILIES and "\n" not in str(caught.value)


def test_registering_twice_is_refused(toy):
    with pytest.raises(UserError, match="name 'toy' belongs to family 'toy'"):
        register_family(TOY)


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"unknown family 'lada' \(did you mean 'llada'\?\)"):
        family_named("lada")
    assert family_named("llada") is LLADA
