"""Official checkpoints into our classes: layouts, dtypes, the mask id, tokenizers, and no code executed."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import UserError, load_model, load_tokenizer
from structprune.assets import model_directory
from tests.tiny_values import GRAPHS

MASK_ID = 2047


def logits_of(model, seed: int = 1):
    ids = torch.randint(0, 2048, (2, 12), generator=torch.Generator().manual_seed(seed))  # (B, T)
    with torch.no_grad():
        return model(ids).logits  # (B, T, V)


def rewrite(directory, **changes):
    """Change keys of a checkpoint's config.json; a value of None removes the key."""
    values = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def shard(directory, count: int, dtype=torch.float32):
    """Rewrite a checkpoint as `count` shards with an index, in `dtype`."""
    state = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {key: state[key].to(dtype).clone() for key in sorted(state)[number::count]}
        save_file(part, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return directory


@pytest.mark.parametrize("family", ["mmada", *GRAPHS])
def test_shards_in_bf16_load_as_the_whole_file_does(tiny_checkpoint, family):
    directory = tiny_checkpoint(family)
    whole = load_model(directory)
    model = load_model(shard(directory, 3, torch.bfloat16))
    assert model.source.dtype == torch.bfloat16 and model.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name].bfloat16().float()), name


def test_mmada_is_a_llada_under_another_model_type(tiny_checkpoint):
    llada, mmada = load_model(tiny_checkpoint("llada")), load_model(tiny_checkpoint("mmada"))
    assert type(mmada) is type(llada)
    assert torch.equal(logits_of(llada), logits_of(mmada))


def test_model_is_in_eval_mode_and_says_where_it_came_from(tiny_checkpoint):
    directory = tiny_checkpoint("llada", name="my-llada")
    model = load_model(directory)
    assert not model.training
    assert (model.source.name, model.source.directory) == ("my-llada", directory)
    assert model.source.values["model_type"] == "llada"


@pytest.mark.parametrize("asked, got", [
    (None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16),
])  # fmt: skip
def test_dtype_is_fp32_on_cpu_unless_asked_otherwise(tiny_checkpoint, asked, got):
    model = load_model(tiny_checkpoint("llada", torch_dtype="bfloat16"), dtype=asked)
    assert {parameter.dtype for parameter in model.parameters()} == {got}
    assert model.config.dtype == got and model.source.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bfloat17", "int8", "load"])
def test_unknown_dtype(tiny_checkpoint, name):
    with pytest.raises(UserError, match=f"unknown dtype '{name}'"):
        load_model(tiny_checkpoint("llada"), dtype=name)


def test_mask_id_from_config_argument_or_tokenizer(tiny_checkpoint):
    directory = tiny_checkpoint("llada", mask_token_id=7)
    assert load_model(directory).config.mask_token_id == 7
    assert load_model(directory, mask_id=5).config.mask_token_id == 5
    rewrite(directory, mask_token_id=None)  # from tokenizer_config.json's mask_token by tokenizer.json
    assert load_model(directory).config.mask_token_id == MASK_ID
    settings = {"mask_token": {"content": "[M]"}, "added_tokens_decoder": {"9": {"content": "[M]"}}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_model(directory).config.mask_token_id == 9


def test_no_mask_id_anywhere(tiny_checkpoint):
    directory = rewrite(tiny_checkpoint("llada", tokenizer=False), mask_token_id=None)
    with pytest.raises(UserError, match="no mask id .* --mask-id"):
        load_model(directory)
    assert load_model(directory, mask_id=3).config.mask_token_id == 3


def test_rope_parameters_of_transformers_5(tiny_checkpoint):
    plain = load_model(tiny_checkpoint("dream"))
    directory = rewrite(tiny_checkpoint("dream", name="five"), rope_theta=None, rope_parameters={"rope_theta": 10000.0})
    assert torch.equal(logits_of(load_model(directory)), logits_of(plain))
    rewrite(directory, rope_parameters={"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0})
    with pytest.raises(UserError, match="rope_type = 'yarn' is not supported"):
        load_model(directory)


@pytest.mark.parametrize("family", GRAPHS)
def test_no_code_of_the_checkpoint_runs(tiny_checkpoint, family, tmp_path):
    directory, mark = tiny_checkpoint(family), tmp_path / "executed"
    poison = f"open({str(mark)!r}, 'w').close()\nraise RuntimeError('executed')\n"
    for name in ("modeling_poison.py", "configuration_poison.py", "tokenization_poison.py", "config.py", "torch.py"):
        (directory / name).write_text(poison)
    rewrite(directory, auto_map={
        "AutoConfig": "configuration_poison.Config", "AutoModel": "modeling_poison.Model",
        "AutoModelForCausalLM": "modeling_poison.Model", "AutoTokenizer": ["tokenization_poison.Tokenizer", None],
    })  # fmt: skip
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_poison.Tokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load_model(directory)
    tokenizer = load_tokenizer(directory)
    assert not mark.exists() and not any("poison" in name for name in sys.modules)
    assert tokenizer.mask_token_id == model.config.mask_token_id == MASK_ID
    assert logits_of(model).isfinite().all()


def test_dreams_slow_tokenizer_is_read_without_its_remote_code(tiny_checkpoint):
    """Dream's repository has vocab.json and merges.txt for a class of its own, and no tokenizer.json."""
    directory = tiny_checkpoint("dream", tokenizer=False)
    whole = json.loads((model_directory() / "tokenizer.json").read_text(encoding="utf-8"))
    (directory / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in whole["model"]["merges"])])
    (directory / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    added = {str(token["id"]): token for token in whole["added_tokens"]}
    settings = {"tokenizer_class": "DreamTokenizer", "mask_token": "<|mdm_mask|>", "added_tokens_decoder": added}
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "The quick brown fox, naïve as it is."
    tokenizer, same = load_tokenizer(directory), load_tokenizer(model_directory())
    assert tokenizer(text)["input_ids"] == same(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("a<|mdm_mask|>")["input_ids"][-1] == MASK_ID


def test_no_tokenizer_to_be_read(tiny_checkpoint):
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        load_tokenizer(tiny_checkpoint("llada", tokenizer=False))
