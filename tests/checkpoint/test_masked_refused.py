"""What a masked checkpoint cannot be written from: one line that says why, and nothing written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import Plan, UserError, apply_plan, load_model
from structprune.checkpoint.masked import save_masked
from structprune.structured.plan import BlockPlan

UP = [f"model.transformer.blocks.{block}.up_proj.weight" for block in range(3)]
INV_FREQ = "model.transformer.blocks.0.rotary_emb.inv_freq"


@pytest.fixture
def source(tiny_checkpoint):
    """A bf16 LLaDA with one tensor in float16 and one that the model does not have."""
    path = tiny_checkpoint("llada", torch_dtype="bfloat16") / "model.safetensors"
    state = load_file(path)
    save_file(state | {UP[2]: state[UP[2]].half(), INV_FREQ: torch.rand(4)}, path)
    return path.parent


def refused(model, tmp_path, changed=(UP[0],)) -> str:
    """What save_masked says, checked to be one line and to leave nothing."""
    here = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as caught:
        save_masked(model, tmp_path / "deep" / "out", changed=changed)
    assert "\n" not in str(caught.value) and {path.name for path in tmp_path.iterdir()} == here
    return str(caught.value)


def test_names_that_cannot_be_changed(source, tmp_path):
    model = load_model(source)
    assert "has no weight 'blocks.0.up': only stored weights" in refused(model, tmp_path, ["blocks.0.up", UP[0]])
    assert f"the model has no weight '{INV_FREQ}'" in refused(model, tmp_path, [INV_FREQ])


def test_model_without_source(tiny_model, tmp_path):
    assert "no source checkpoint: load it with" in refused(tiny_model(), tmp_path)


def test_source_that_is_gone(source, tmp_path):
    model = load_model(source)
    source.rename(tmp_path / "elsewhere")
    assert f"the source checkpoint '{source}' is gone" in refused(model, tmp_path)


def test_source_that_changed_since_loading(source, tmp_path):
    model, path = load_model(source), source / "model.safetensors"
    state = load_file(path)
    save_file(state | {UP[1]: torch.zeros(47, 32)}, path)
    said = refused(model, tmp_path)
    assert f"{UP[1]} is (47, 32), but (48, 32) in the model): load it again" in said
    del state[UP[1]]
    save_file(state, path)
    assert f"{UP[1]} is not there, but (48, 32) in the model" in refused(model, tmp_path)
    path.write_bytes(b"cut")
    assert "model.safetensors is cut short" in refused(model, tmp_path)
    path.unlink()
    assert "has no weights" in refused(model, tmp_path)
    (source / "config.json").write_text("{}")
    assert "config.json changed since the model was loaded" in refused(model, tmp_path)
    (source / "config.json").unlink()
    assert "config.json is missing" in refused(model, tmp_path)


def test_a_stored_dtype_that_masks_are_not_written_in(source, tmp_path):
    model, path = load_model(source), source / "model.safetensors"
    state = load_file(path)
    save_file(state | {UP[0]: state[UP[0]].to(torch.float8_e4m3fn)}, path)
    assert f"{UP[0]} is stored in a dtype that masks cannot be written in" in refused(model, tmp_path)
    out = save_masked(model, tmp_path / "out", changed=[UP[1]])
    assert load_file(out / "model.safetensors")[UP[0]].dtype == torch.float8_e4m3fn


def test_a_restructured_model_is_refused(source, tmp_path):
    blocks = tuple(BlockPlan((0,), (0,), (0, 1)) for _ in range(3))
    said = refused(apply_plan(load_model(source), Plan("llada", blocks)), tmp_path, [UP[0]])
    assert "is not what the model was loaded from" in said


@pytest.mark.slow
@pytest.mark.parametrize("value, name", [(float("nan"), UP[0]), (1e6, UP[2])])
def test_values_that_the_stored_dtype_cannot_hold(source, tmp_path, value, name):
    model = load_model(source)
    model.state_dict()[name][0, 0] = value  # float16 ends at 65,504
    assert f"{name} has values that {'bfloat16' if name == UP[0] else 'float16'}" in refused(model, tmp_path, [name])
    save_masked(model, tmp_path / "out", changed=[UP[1]])


def test_an_index_that_names_files_elsewhere(source, tmp_path):
    """Its names become names of files to write."""
    model = load_model(source)
    path = source / "model.safetensors.index.json"
    (source / "model.safetensors").rename(source / "weights.safetensors")
    for name in ("../llada-tiny/weights.safetensors", "model.bin"):
        path.write_text(json.dumps({"weight_map": {"a": name}}))
        assert f"names '{name}', not a .safetensors file in its folder" in refused(model, tmp_path)


def test_an_index_left_over_from_a_sharded_save_is_not_copied(source, tmp_path):
    """It names other shards; transformers would read model.safetensors all the same, other tools the index."""
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    out = save_masked(load_model(source), tmp_path / "out", changed=[UP[0]])
    assert (out / "model.safetensors").exists() and not (out / "model.safetensors.index.json").exists()
