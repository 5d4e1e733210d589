"""Masked checkpoints in the layout of their source: what changes, and that all else is the same bytes, never run."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from structprune import Plan, UserError, apply_plan, load_model, save_pruned
from structprune.checkpoint import masked
from structprune.checkpoint.masked import save_masked
from structprune.checkpoint.output import check_output
from structprune.structured.plan import BlockPlan

CODE = "raise SystemExit('code of a checkpoint was run')\n"
IDS = torch.arange(12)[None]  # (1, T)
INV_FREQ = "model.transformer.blocks.0.rotary_emb.inv_freq"


def up(block: int) -> str:
    return f"model.transformer.blocks.{block}.up_proj.weight"


CHANGED = (up(0), up(2), "model.transformer.blocks.1.q_proj.weight")


def mask(model, names=CHANGED):
    """Every other weight of `names` becomes zero, the others grow by a factor that no dtype rounds."""
    state = model.state_dict()
    for name in names:
        state[name].mul_(2)[:, ::2] = 0  # (out, in)
    return model


def folder_bytes(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def shard(directory, dtypes: dict):
    """The source's weights as three shards, with an index and metadata of their own, some in another dtype."""
    state = load_file(directory / "model.safetensors") | {INV_FREQ: torch.rand(4)}
    state |= {name: state[name].to(dtype) for name, dtype in dtypes.items()}
    (directory / "model.safetensors").unlink()
    first = {up(0): 1, up(1): 3, up(2): 3}  # the second shard has nothing of what is changed
    places = {name: f"model-0000{first.get(name, i % 3 + 1)}-of-00003.safetensors" for i, name in enumerate(state)}
    places[CHANGED[2]] = places[up(0)]
    for file in set(places.values()):
        tensors = {name: tensor for name, tensor in state.items() if places[name] == file}
        save_file(tensors, directory / file, metadata={"format": "pt", "note": file})
    index = {"weight_map": places, "metadata": {"total_size": 1, "kept": "as it was"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def source(tiny_checkpoint):
    """A bf16 LLaDA in three shards, some tensors in other dtypes, with files of every kind beside it."""
    directory = tiny_checkpoint("llada", torch_dtype="bfloat16")
    shard(directory, {"model.transformer.ln_f.weight": torch.float32, up(2): torch.float16, up(1): torch.float32})
    values = json.loads((directory / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"}
    (directory / "config.json").write_text(json.dumps(values) + " \n")
    (directory / "code").mkdir()
    for name, text in {
        "modeling_llada.py": CODE, "code/__init__.py": CODE, "generation_config.json": '{"eos_token_id":2046}',
        "chat_template.jinja": "{{ messages }}\r\n", "LICENSE": "MIT\n", "README.md": "the source's card",
    }.items():  # fmt: skip
        (directory / name).write_bytes(text.encode())
    return directory


def test_only_the_changed_bytes_differ(source, tmp_path):
    before = folder_bytes(source)
    model = mask(load_model(source))
    out = save_masked(model, tmp_path / "deep" / "out", changed=iter(CHANGED), files={"report.json": {"a": 1}})
    after = folder_bytes(out)
    assert set(after) == set(before) | {"report.json"}
    assert json.loads(after["report.json"]) == {"a": 1}
    weights = [name for name in before if name.endswith(".safetensors")]
    changed = {"model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"}
    assert len(weights) == 3 and {name for name in before if before[name] != after[name]} == changed
    for name in weights:
        old, new = load_file(source / name), load_file(out / name)
        assert list(old) == list(new)
        with safe_open(out / name, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "note": name}
        for key, tensor in new.items():
            assert tensor.dtype == old[key].dtype
            target = model.state_dict()[key].to(tensor.dtype) if key in CHANGED else old[key]
            assert torch.equal(tensor.view(torch.uint8), target.view(torch.uint8)), key  # bit by bit
    assert folder_bytes(source) == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # no draft beside it


def test_zeros_are_exact_and_the_rest_is_the_models(source, tmp_path):
    model = mask(load_model(source))
    again = load_model(save_masked(model, tmp_path / "out", changed=CHANGED))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert not torch.equal(again(IDS).logits, load_model(source)(IDS).logits)
    for name in CHANGED:
        weight = again.state_dict()[name]  # (out, in)
        assert (weight[:, ::2] == 0).all() and weight[:, 1::2].ne(0).all()


def test_what_is_not_named_is_the_sources(source, tmp_path):
    model = mask(load_model(source), [up(1)])
    out = save_masked(model, tmp_path / "out", changed=[])
    assert folder_bytes(out) == folder_bytes(source)


def test_one_file_of_another_family(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("dream")
    name = "model.layers.1.mlp.down_proj.weight"
    model = mask(load_model(source), [name])
    out = save_masked(model, tmp_path / "out", changed=[name])
    assert set(folder_bytes(out)) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    with torch.no_grad():
        assert torch.equal(load_model(out)(IDS).logits, model(IDS).logits)


def test_what_is_left_behind(source, tmp_path):
    kept = set(folder_bytes(source))
    names = (
        ".git/HEAD", ".cache/huggingface/x", ".gitattributes", "code/.hidden", "code/__pycache__/x.pyc",
        "consolidated.00.pth", "pytorch_model.bin", "pytorch_model.bin.index.json", "old.safetensors", "x.GGUF",
        "onnx/model.onnx", "tf_model.h5", "calibration.safetensors", "masks.safetensors", "report.json", "plan.json",
        "demo.json", "original/x.safetensors", "original/model.safetensors.index.json",
    )  # fmt: skip
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("no")
    (source / "code" / "report.json").write_text("{}")  # somebody's own, in a folder
    (source / "code" / "up").symlink_to(source)  # would never end
    os.mkfifo(source / "pipe")  # would never end either
    out = save_masked(mask(load_model(source)), tmp_path / "out", changed=CHANGED)
    assert set(folder_bytes(out)) == kept | {"code/report.json"}


def test_links_are_followed(source, tmp_path):
    """As in a Hub cache: every file of a snapshot is a link to a blob; some also link folders."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    source.rename(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = folder_bytes(blobs)
    out = save_masked(mask(load_model(snapshot)), tmp_path / "out", changed=CHANGED)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert set(folder_bytes(out)) == set(before)
    assert (out / "code" / "__init__.py").read_text() == CODE
    assert folder_bytes(blobs) == before


def test_a_link_to_nowhere_is_an_incomplete_download(source, tmp_path):
    model = load_model(source)
    (source / "consolidated.00.pth").symlink_to(tmp_path / "gone")  # not carried, so no matter
    save_masked(model, tmp_path / "out", changed=CHANGED)
    (source / "modeling.py").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="modeling.py cannot be read: finish the download"):
        save_masked(model, tmp_path / "fresh", changed=CHANGED)
    assert not (tmp_path / "fresh").exists()


def test_files_replace_the_sources(source, tmp_path):
    def weights(path):
        save_file({"mask": torch.ones(3, dtype=torch.uint8)}, path)

    files = {"README.md": "card", "report.json": {"sparsity": 0.5}, "masks.safetensors": weights}
    out = save_masked(load_model(source), tmp_path / "out", changed=[], files=files)
    assert (out / "README.md").read_text() == "card"
    assert load_file(out / "masks.safetensors")["mask"].tolist() == [1, 1, 1]
    again = save_masked(load_model(out), tmp_path / "again", changed=[])  # an output is a source like any other
    assert set(folder_bytes(out)) - set(folder_bytes(again)) == {"masks.safetensors", "report.json"}


def pickle(directory, shards: int = 1, legacy: bool = False) -> dict[str, torch.Tensor]:
    """The source's weights as `.bin` shards, two tensors of one of them sharing memory."""
    state = load_file(directory / "model.safetensors") | {INV_FREQ: torch.arange(4)}
    state[up(1)] = state[up(1)].double()
    state[up(2)] = state[up(0)] = state[up(0)].t().contiguous().t()
    (directory / "model.safetensors").unlink()
    names = ["pytorch_model.bin"] if shards == 1 else [f"pytorch_model-{i}.bin" for i in range(shards)]
    places = {name: names[i * shards // len(state)] for i, name in enumerate(state)}
    for file in names:
        tensors = {name: state[name] for name in state if places[name] == file}
        torch.save(tensors, directory / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return state


@pytest.mark.parametrize("shards, legacy", [(1, False), (3, False), (2, True)])
def test_pickled_source(tiny_checkpoint, tmp_path, shards, legacy):
    source = tiny_checkpoint("llada", torch_dtype="bfloat16")
    state = pickle(source, shards, legacy)
    model = mask(load_model(source, allow_pickle=True), CHANGED)
    out = save_masked(model, tmp_path / "out", changed=CHANGED)
    assert set(folder_bytes(out)) == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    stored = load_file(out / "model.safetensors")
    assert set(stored) == set(state)
    for name, tensor in stored.items():
        target = model.state_dict()[name].to(state[name].dtype) if name in CHANGED else state[name]
        assert tensor.dtype == target.dtype and torch.equal(tensor, target), name
    with torch.no_grad():
        assert torch.equal(load_model(out)(IDS).logits, model(IDS).logits)


def test_pickled_source_as_shards(tiny_checkpoint, tmp_path, monkeypatch):
    source = tiny_checkpoint("llada", torch_dtype="bfloat16")
    state = pickle(source, 2)
    monkeypatch.setattr(masked, "write_shards", lambda *given, inner=masked.write_shards: inner(*given, "100KB"))
    out = save_masked(load_model(source, allow_pickle=True), tmp_path / "out", changed=[])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    count = len(set(index["weight_map"].values()))
    assert count > 2
    assert set(index["weight_map"].values()) == {f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], state[name])
    assert not list(out.glob("*.bin*"))


def test_source_that_structprune_wrote(tiny_checkpoint, tmp_path):
    heads = [(0, 1, 2), (3,), (0, 1, 2, 3)]
    blocks = tuple(BlockPlan(kept, kept, tuple(range(8 * (index + 1)))) for index, kept in enumerate(heads))
    small = apply_plan(load_model(tiny_checkpoint("llada")), Plan("llada", blocks), output_bias=True)
    source = save_pruned(small, tmp_path / "small", files={"plan.json": {}, "report.json": {}})
    model = mask(load_model(source))
    out = save_masked(model, tmp_path / "out", changed=CHANGED)
    before, after = folder_bytes(source), folder_bytes(out)
    assert set(before) - set(after) == {"plan.json", "report.json"} and "modeling_structprune.py" in after
    assert {name for name in after if before[name] != after[name]} == {"model.safetensors"}
    with torch.no_grad():
        assert torch.equal(load_model(out)(IDS).logits, model(IDS).logits)


def test_a_tie_that_llada_does_not_read_stays(tiny_checkpoint, tmp_path):
    """The config is the source's own, whose code ties by `weight_tying`; our loader reads a separate head too."""
    source = tiny_checkpoint("llada", tie_word_embeddings=True)
    out = save_masked(mask(load_model(source)), tmp_path / "out", changed=CHANGED)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    head, stored = load_model(out).output_head.weight, load_file(source / "model.safetensors")  # (V, C)
    assert torch.equal(head, stored["model.transformer.ff_out.weight"])


def test_overwrite_knows_both_kinds_of_output(source, tmp_path):
    model, out = mask(load_model(source)), tmp_path / "out"
    files = {"masks.safetensors": "x", "mark": "old"}
    save_masked(model, out, changed=CHANGED, files=files)
    with pytest.raises(UserError, match="exists: choose another, or add --overwrite"):
        save_masked(model, out, changed=CHANGED)
    save_masked(model, out, changed=CHANGED, files={"masks.safetensors": "x"}, overwrite=True)
    assert not (out / "mark").exists()
    save_pruned(model, out, overwrite=True)
    save_masked(model, out, changed=CHANGED, overwrite=True)  # that replaced one of `save_pruned`
    with pytest.raises(UserError, match="holds something other than an earlier output"):
        check_output(out, source, overwrite=True)  # without its masks it looks as the source does
    with pytest.raises(UserError, match="lies inside the input checkpoint"):
        save_masked(model, source / "out", changed=CHANGED)


@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_failure_leaves_everything_as_it_was(source, tmp_path, error):
    def fails(path):
        path.write_text("half")
        raise error

    model = mask(load_model(source))
    out = save_masked(model, tmp_path / "out", changed=CHANGED, files={"masks.safetensors": "x"})
    before = folder_bytes(tmp_path)
    expected = UserError if isinstance(error, OSError) else type(error)
    for place in ("out", "fresh", "deep/fresh"):
        with pytest.raises(expected, match="no space left while writing" if expected is UserError else None):
            save_masked(model, tmp_path / place, changed=[], files={"masks.safetensors": fails}, overwrite=True)
    assert folder_bytes(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {source.name, out.name}


def test_no_space_left_is_known_before_writing(source, tmp_path, monkeypatch):
    needed = sum(map(len, folder_bytes(source).values()))
    (source / "old.safetensors").write_bytes(bytes(100))  # not in the index: needs no space
    model = load_model(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match="are free there"):
        save_masked(model, tmp_path / "out", changed=[])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    save_masked(model, tmp_path / "out", changed=[])


def test_the_output_is_not_called_quantised(tiny_checkpoint, tmp_path):
    """A config.json may ask its loader to quantise; what is written says what its weights are."""
    source = tiny_checkpoint("llada", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    out = save_masked(mask(load_model(source)), tmp_path / "out", changed=CHANGED)
    values = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert values[0].pop("quantization_config") and values[0] == values[1]
