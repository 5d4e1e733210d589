"""Hub ids, with the Hub client replaced: what is downloaded, and headers without weights."""

import json
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from structprune import UserError, load_model
from structprune.cli.main import main
from structprune.config import Config
from structprune.models.checkpoint_files import locate
from structprune.models.headers import read_header, stored_headers
from structprune.runs.inspect import inspect_checkpoint

HUB_ID = "GSAI-ML/LLaDA-tiny"
FOREIGN = ("consolidated.00.pth", "x.gguf", "pytorch_model.bin", "tf_model.h5")  # not read, or only where asked for


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`hub(remote)` makes `remote` the contents of HUB_ID; returns the snapshot's place and the downloads' patterns."""

    def serve(remote):
        here, asked = tmp_path / "cache" / "snapshots" / "0123abcd", []

        def snapshot_download(repo_id, allow_patterns=("*",), ignore_patterns=()):
            assert repo_id == HUB_ID
            asked.append(list(allow_patterns))
            here.mkdir(parents=True, exist_ok=True)
            for path in remote.iterdir():
                allowed, ignored = (
                    any(fnmatch(path.name, pattern) for pattern in patterns)
                    for patterns in (allow_patterns, ignore_patterns)
                )
                if allowed and not ignored:
                    shutil.copyfile(path, here / path.name)
            return str(here)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
        return here, asked

    def metadata(repo_id):
        raise OSError("offline")

    return serve


@pytest.fixture
def remote(tiny_checkpoint):
    directory = tiny_checkpoint("llada", name="remote")
    (directory / "modeling_llada.py").write_text("raise RuntimeError")
    return directory


def test_no_python_file_is_downloaded(hub, remote):
    here, _ = hub(remote)
    assert locate(HUB_ID) == here
    names = {path.name for path in here.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_code_comes_only_where_asked_for_and_is_not_run(hub, remote):
    here, _ = hub(remote)
    for name in ("LICENSE", "README.md", *FOREIGN):
        (remote / name).write_text(name)
    load_model(HUB_ID)
    assert not (here / "modeling_llada.py").exists() and not (here / "LICENSE").exists()
    shutil.rmtree(here)
    locate(HUB_ID, weights=False, code=True)
    settings = {"config.json", "tokenizer.json", "tokenizer_config.json", "modeling_llada.py", "LICENSE", "README.md"}
    assert {path.name for path in here.iterdir()} == settings
    assert load_model(HUB_ID, code=True, allow_pickle=True).source.directory == here
    assert {path.name for path in here.iterdir()} == settings | {"model.safetensors"}


def test_code_comes_with_pickles_too(hub, remote):
    here, _ = hub(remote)
    for name in FOREIGN:
        (remote / name).write_text(name)
    torch.save(load_file(remote / "model.safetensors"), remote / "pytorch_model.bin")
    (remote / "model.safetensors").unlink()
    load_model(HUB_ID, code=True, allow_pickle=True)
    names = {path.name for path in here.iterdir()}
    assert {"pytorch_model.bin", "modeling_llada.py"} <= names and not names & {*FOREIGN} - {"pytorch_model.bin"}


def test_without_weights_only_settings_come(hub, remote):
    here, asked = hub(remote)
    locate(HUB_ID, weights=False, allow_pickle=True)
    assert asked == [["*.json", "*.txt", "*.jinja", "*.model", "README.md"]]
    assert not list(here.glob("*.safetensors"))


def test_pickles_come_where_allowed_and_needed(hub, remote):
    here, asked = hub(remote)
    locate(HUB_ID, allow_pickle=True)  # safetensors are there: no pickle is asked for
    assert not any("*.bin" in patterns for patterns in asked)
    torch.save(load_file(remote / "model.safetensors"), remote / "pytorch_model.bin")
    for directory in (remote, here):
        (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(HUB_ID)
    assert not list(here.glob("*.bin"))
    assert load_model(HUB_ID, allow_pickle=True).source.directory == here
    assert "*.bin" in asked[-1]


def test_model_is_named_by_its_hub_id(hub, remote):
    hub(remote)
    assert load_model(HUB_ID).source.name == HUB_ID


def test_inspect_downloads_no_weights_and_shows_the_hub_id(hub, remote):
    here, asked = hub(remote)
    result = inspect_checkpoint(HUB_ID, Config.load(None, {"structured.ratio": 0.3, "calibration.length": 32}))
    assert result["source"] == HUB_ID and result["stored_dtype"] == "float32"
    assert "*.safetensors" not in sum(asked, []) and not list(here.glob("*.safetensors"))


def served(remote, dtype=None, **shapes):
    """What get_safetensors_metadata gives for `remote`, with some tensors' shapes changed."""
    headers = read_header(remote / "model.safetensors")
    tensors = {
        name: SimpleNamespace(shape=list(shapes.get(name.split(".")[-2], header.shape)), dtype=dtype or header.dtype)
        for name, header in headers.items()
    }
    shard = SimpleNamespace(tensors=tensors)
    return lambda repo_id: SimpleNamespace(files_metadata={"model-00001-of-00001.safetensors": shard})


def test_headers_of_a_hub_id_come_by_range_requests(hub, remote, monkeypatch):
    here, _ = hub(remote)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", served(remote, dtype="BF16"))
    (remote / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    result = inspect_checkpoint(HUB_ID, Config.load(None, {"structured.ratio": 0.3, "calibration.length": 32}))
    assert result["stored_dtype"] == "bfloat16"  # the header's, where config.json says float32
    headers = stored_headers(HUB_ID, here)
    assert headers["model.transformer.wte.weight"].shape == (2048, 32)
    assert headers["model.transformer.wte.weight"].shard == "model-00001-of-00001.safetensors"


def test_headers_of_a_hub_id_are_checked_against_its_config(hub, remote, monkeypatch):
    hub(remote)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", served(remote, up_proj=(47, 32)))
    with pytest.raises(UserError, match=r"up_proj.weight is \(47, 32\), but config.json asks for \(48, 32\)"):
        inspect_checkpoint(HUB_ID, Config())


def test_downloaded_shards_are_read_instead_of_the_hub(hub, remote):
    here, _ = hub(remote)
    locate(HUB_ID)
    (here / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cut short"):
        inspect_checkpoint(HUB_ID, Config())


def test_hub_that_cannot_be_reached(monkeypatch):
    def refuse(repo_id, allow_patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"'org/name' is neither a directory nor a Hub checkpoint .*\(no route\)$"):
        locate("org/name")
    with pytest.raises(UserError, match="no checkpoint directory at 'a/b/c'"):
        locate("a/b/c")


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_pruned_and_trained_back_from_an_id_that_is_not_here_yet(
    together, hub, remote, prune_command, text_path, tmp_path
):
    """What both keep is known by the id's revision, before its weights come."""
    here, _ = hub(remote)
    small, out, keys = tmp_path / "small", tmp_path / "out", ("data.length=16", "data.held_out=4", "train.tokens=256")
    keys += ("train.batch=4", "train.pass_windows=4", "train.method=full", "train.evaluations=1")
    if together:
        sets = [f"--recover-set={key}" for key in keys]
        assert main(prune_command(HUB_ID, out, text_path, "--device", "cpu", "--recover", *sets)) == 0
    else:
        assert main(prune_command(HUB_ID, small, text_path, "--device", "cpu")) == 0
        shutil.rmtree(here)
        sets = [f"--set={key}" for key in keys]
        places = ["--teacher", HUB_ID, "--out", str(out), "--data", str(text_path), "--device", "cpu"]
        assert main(["recover", str(small), *places, *sets]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["recoveries"][-1]["teacher"] == HUB_ID
