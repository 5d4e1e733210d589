"""The written directory: what is in it, and that it appears complete or not at all."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from structprune import Plan, UserError, apply_plan, load_model, load_tokenizer, save_pruned
from structprune.checkpoint import atomic, output, save, swap
from structprune.checkpoint.export import CODE_FILES
from structprune.checkpoint.output import check_output
from structprune.config import ExportSettings
from structprune.models.checkpoint_files import shard_names
from structprune.models.headers import read_headers
from structprune.structured.plan import BlockPlan


@pytest.fixture
def small(tiny_checkpoint):
    """A pruned LLaDA of a tiny official checkpoint, with another width in every block and biases."""
    directory = tiny_checkpoint("llada", torch_dtype="bfloat16")
    (directory / "generation_config.json").write_text('{"eos_token_id": 2046}')
    heads = [(0, 1, 2), (3,), (0, 1, 2, 3)]
    blocks = tuple(BlockPlan(kept, kept, tuple(range(8 * (index + 1)))) for index, kept in enumerate(heads))
    return apply_plan(load_model(directory), Plan("llada", blocks), output_bias=True)


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_is_written(small, tmp_path):
    files = {"report.json": {"ratio": 0.5}, "README.md": "card", "extra.bin": lambda path: path.write_bytes(b"12")}
    out = save_pruned(small, tmp_path / "deep" / "out", files=files)
    names = {
        "config.json", "model.safetensors", *CODE_FILES, "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "report.json", "README.md", "extra.bin",
    }  # fmt: skip
    assert set(contents(out)) == names
    assert json.loads((out / "report.json").read_text()) == {"ratio": 0.5}
    assert ((out / "README.md").read_text(), (out / "extra.bin").read_bytes()) == ("card", b"12")
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 2046}
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "file").write_text("x")
    assert out.stat().st_mode == plain.stat().st_mode  # not the draft's private one
    assert (out / "model.safetensors").stat().st_mode == (plain / "file").stat().st_mode
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # no draft beside it


def test_weights_are_the_models_in_the_checkpoints_dtype(small, tmp_path):
    stored = load_file(save_pruned(small, tmp_path / "out") / "model.safetensors")
    state = small.state_dict()
    assert set(stored) == set(state)
    for name, tensor in stored.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, state[name].bfloat16()), name
    wide = load_file(save_pruned(small, tmp_path / "wide", ExportSettings(dtype="float32")) / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in wide.items())


def test_shards(small, tmp_path):
    out = save_pruned(small, tmp_path / "out", ExportSettings(max_shard_size="100KB", dtype="float32"))
    names = shard_names(out)
    assert len(names) > 2 and not (out / "model.safetensors").exists()
    headers = read_headers(out, names)
    assert set(headers) == set(small.state_dict())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: header.shard for name, header in headers.items()}
    assert index["metadata"]["total_size"] == 4 * small.num_parameters()
    again = load_model(out)
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_transformers_own_save_writes_the_code_too(small, tmp_path):
    """What a trainer saves must load as well: transformers 4 copies the code of registered classes only."""
    small.save_pretrained(tmp_path / "trained")
    values = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert values["auto_map"]["AutoModelForCausalLM"] == "modeling_structprune.StructpruneLLaDA"
    assert values["auto_map"]["AutoConfig"] == "configuration_structprune.StructpruneLLaDAConfig"
    assert set(CODE_FILES) <= set(contents(tmp_path / "trained"))
    again = load_model(tmp_path / "trained")
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_saved_model_can_be_loaded_and_pruned_again(small, tmp_path):
    out = save_pruned(small, tmp_path / "out", ExportSettings(dtype="float32"))
    again = load_model(out)
    assert again.config.mask_token_id == 2047 and again.config.attention_output_bias
    blocks = tuple(BlockPlan((0,), (0,), (0, 1)) for _ in range(3))
    twice = save_pruned(apply_plan(again, Plan("llada", blocks)), tmp_path / "twice")
    ids = torch.arange(8)[None]  # (1, T)
    with torch.no_grad():
        assert torch.equal(load_model(out)(ids).logits, small(ids).logits)
        assert load_model(twice)(ids).logits.isfinite().all()
    assert "per_layer_config" not in json.loads((twice / "config.json").read_text())


@pytest.mark.parametrize("settings", [
    {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["x.X", None]}}, {"tokenizer_class": "TokenizersBackend"},
])  # fmt: skip
def test_tokenizer_class_that_not_everyone_has_is_replaced(small, tmp_path, settings):
    path = small.source.directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    out = save_pruned(small, tmp_path / "out")
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in written
    assert load_tokenizer(out).mask_token_id == 2047


def test_a_plain_tokenizer_config_is_carried_as_it_is(small, tmp_path):
    out = save_pruned(small, tmp_path / "out")
    name = "tokenizer_config.json"
    assert (out / name).read_bytes() == (small.source.directory / name).read_bytes()


def test_existing_output(small, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save_pruned(small, out)  # an empty directory is no obstacle
    (out / "mark").write_text("old")
    before = contents(out)
    with pytest.raises(UserError, match="exists: choose another, or add --overwrite"):
        save_pruned(small, out)
    assert contents(out) == before
    save_pruned(small, out, overwrite=True, files={"new": "text"})
    assert (out / "new").exists() and not (out / "mark").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "llada-tiny"}


def fail_on(name, monkeypatch, error):
    """Make the step `name` of saving raise `error`."""

    def fails(*args, **kwargs):
        raise error

    module = next(module for module in (save, output, atomic) if hasattr(module, name))
    monkeypatch.setattr(module, name, fails)


@pytest.mark.parametrize("step", ["_write_weights", "write_json", "_carry", "write_content", "_put_in_place"])
@pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
def test_a_failure_leaves_everything_as_it_was(small, tmp_path, monkeypatch, step, error):
    out = save_pruned(small, tmp_path / "out", files={"mark": "old"})
    before = contents(out)
    fail_on(step, monkeypatch, error)
    with pytest.raises(type(error)):
        save_pruned(small, out, overwrite=True, files={"a": "b"})
    with pytest.raises(type(error)):
        save_pruned(small, tmp_path / "fresh", files={"a": "b"})
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "llada-tiny"}


@pytest.mark.parametrize("which", [1, 2])
def test_a_failing_swap_brings_the_old_directory_back(small, tmp_path, monkeypatch, which):
    """The first rename moves the old directory away, the second the draft into place."""
    monkeypatch.setattr(swap, "_rename_at_once", lambda *arguments, **options: False)  # as an old file system
    out = save_pruned(small, tmp_path / "out", files={"mark": "old"})
    before, rename, calls = contents(out), os.rename, []

    def one_fails(source, target):
        calls.append(target)
        if len(calls) == which:
            raise OSError(errno.EIO, "device gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", one_fails)
    with pytest.raises(UserError, match=r"is refused \(device gone\): the finished run is kept in '.*/out.new'"):
        save_pruned(small, out, overwrite=True, files={"mark": "new"})
    assert contents(out) == before and contents(tmp_path / "out.new") == before | {"mark": b"new"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.new", "llada-tiny"}


def test_no_space_left_is_known_before_writing(small, tmp_path, monkeypatch):
    needed = 2 * small.num_parameters()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match="needs 0.00 GB, but 0.00 GB are free"):
        save_pruned(small, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"llada-tiny"}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    save_pruned(small, tmp_path / "out")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_disk_that_fills_up_while_writing(small, tmp_path, monkeypatch, error):
    fail_on("_write_weights", monkeypatch, error)
    with pytest.raises(UserError, match="no space left while writing"):
        save_pruned(small, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"llada-tiny"}


def test_other_errors_are_not_called_no_space(small, tmp_path, monkeypatch):
    fail_on("_write_weights", monkeypatch, OSError(errno.EIO, "device gone"))
    with pytest.raises(OSError, match="device gone"):
        save_pruned(small, tmp_path / "out")


def test_output_inside_the_input(small, tmp_path):
    source = small.source.directory
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "out", source / "a" / "b", tmp_path / "link" / "out"):
        with pytest.raises(UserError, match="lies inside the input checkpoint"):
            save_pruned(small, out, overwrite=True)
    check_output(tmp_path / (source.name + "-small"), source)  # a name that starts alike is another directory


def test_overwriting_a_directory_that_holds_the_input(small, tmp_path):
    with pytest.raises(UserError, match="holds the input checkpoint .* --overwrite would erase"):
        save_pruned(small, tmp_path, overwrite=True)
    assert (small.source.directory / "config.json").exists()


def test_only_an_earlier_output_is_ever_replaced(small, tmp_path):
    out = tmp_path / "home"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds something other than an earlier output"):
        save_pruned(small, out, overwrite=True)
    assert contents(out) == {"letter.txt": b"dear"}
    (out / "config.json").write_text("{}")  # another checkpoint, perhaps the only copy of it
    with pytest.raises(UserError, match="holds something other than an earlier output"):
        save_pruned(small, out, overwrite=True)
    assert contents(out) == {"letter.txt": b"dear", "config.json": b"{}"}


def test_output_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file", None)
    with pytest.raises(UserError, match=r"file/out' cannot be written \(Not a directory\): choose another place"):
        check_output(tmp_path / "file" / "out", None)
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
        check_output(tmp_path / ("x" * 256), None)
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="link' is a broken link: choose another"):
        check_output(tmp_path / "link", None)
    (tmp_path / "link").unlink()
    with pytest.raises(UserError, match="output '/' exists"):
        check_output("/", None)
    assert check_output(tmp_path / "new" / "out", None) and contents(tmp_path) == {"file": b"x"}

    def refuse(folder, *arguments):  # as a file system that is read-only, to the superuser too
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), folder)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        check_output(tmp_path / "out", None)


def test_class_that_the_model_does_not_allow(small, tmp_path):
    with pytest.raises(UserError, match="export.compat = official is not possible"):
        save_pruned(small, tmp_path / "out", ExportSettings(compat="official"))
    assert not (tmp_path / "out").exists()
