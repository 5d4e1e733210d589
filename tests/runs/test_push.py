"""Uploading, to a stand-in for the Hub on this machine: what arrives, and what is said where it refuses."""

import json
from pathlib import Path

import pytest

from structprune import UserError, load_model, save_pruned
from structprune.runs.push import check_push, push_directory


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    files = {"README.md": 'from_pretrained("PATH")\n', "report.json": {"ratio": 0.5}}
    return save_pruned(load_model(tiny_checkpoint()), tmp_path / "small", files=files)


@pytest.mark.slow
def test_a_directory_arrives_whole_with_its_place_in_the_card(hub, checkpoint, tmp_path):
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "x").write_text("left out")
    done = hub.structprune("export", str(checkpoint), "--push", "me/small", "--private")
    assert done.returncode == 0, done.stderr
    [made] = hub.made
    assert (made["name"], made["organization"]) == ("small", "me") and f"Uploaded {checkpoint} to" in done.stdout
    assert made.get("private") is True or made.get("visibility") == "private"  # by the release of the client
    names = {path.name for path in checkpoint.iterdir() if path.is_file()}
    assert set(hub.files) == names and "model.safetensors" in names
    assert hub.files["README.md"] == b'from_pretrained("me/small")\n'
    assert (checkpoint / "README.md").read_text() == 'from_pretrained("PATH")\n'
    assert all(hub.files[name] == (checkpoint / name).read_bytes() for name in names - {"README.md"})


@pytest.mark.slow
def test_other_files_stay_and_old_weights_go(hub, checkpoint):
    """Secrets beside a checkpoint are no part of it; transformers would read the old single file first."""
    (checkpoint / "id_rsa").write_text("secret")
    (checkpoint / "LICENSE").write_text("MIT")
    hub.files |= {"pytorch_model.bin": b"old", "model.q8_0.gguf": b"theirs"}
    done = hub.structprune("export", str(checkpoint), "--push", "me/small")
    assert done.returncode == 0, done.stderr
    assert "Not uploaded: id_rsa (no files of a checkpoint)" in done.stdout
    assert "pytorch_model.bin" not in hub.files and hub.files["model.q8_0.gguf"] == b"theirs"
    assert "id_rsa" not in hub.files and hub.files["LICENSE"] == b"MIT" and "config.json" in hub.files


@pytest.mark.slow
def test_what_structprune_does_not_read_is_not_uploaded(hub, tmp_path):
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "config.json").write_text("{}")
    done = hub.structprune("export", str(tmp_path / "junk"), "--push", "me/small")
    assert done.returncode == 2 and "unknown model_type" in done.stderr and not hub.made
    hub.server_close()
    done = hub.structprune("export", str(tmp_path / "junk"), "--push", "me/small")
    assert done.returncode == 2 and "the Hub cannot be reached" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_export_is_uploaded(hub, checkpoint, tmp_path):
    done = hub.structprune(
        "export", str(checkpoint), "--out", str(tmp_path / "out"), "--compat", "official", "--push", "me/x"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(hub.files["config.json"])["model_type"] == "llada"


@pytest.mark.slow
def test_a_wrong_token_is_refused_before_anything_is_written(hub, checkpoint, tmp_path):
    done = hub.structprune(
        "export", str(checkpoint), "--out", str(tmp_path / "out"), "--push", "me/x", token="hf_wrong"
    )
    assert done.returncode == 2 and "the Hub does not know you" in done.stderr and "hf auth login" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists() and not hub.files


def test_a_hub_id_has_no_directory():
    with pytest.raises(UserError, match="--push uploads a directory, and 'me/dense' is none: give one, or add --out"):
        check_push("me/small", Path("me/dense"), contacts=False)


def test_what_is_no_checkpoint_is_not_uploaded(tmp_path):
    with pytest.raises(UserError, match="--push uploads a checkpoint directory, and .* is none"):
        push_directory(tmp_path, "me/small")
