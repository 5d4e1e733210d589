"""A checkpoint's content tells it apart, its place does not."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from structprune.models.fingerprint import fingerprint


def test_a_copy_is_the_same(tiny_checkpoint, tmp_path):
    one = tiny_checkpoint()
    shutil.copytree(one, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("notes")
    assert fingerprint(one) == fingerprint(tmp_path / "copy") and len(fingerprint(one)) == 16


def test_other_weights_or_settings_are_another(tiny_checkpoint):
    one, two = tiny_checkpoint(), tiny_checkpoint(seed=1, name="other")
    assert fingerprint(one) != fingerprint(two)
    before = fingerprint(one)
    values = json.loads((one / "config.json").read_text()) | {"rope_theta": 5000.0}
    (one / "config.json").write_text(json.dumps(values))
    assert fingerprint(one) != before


def test_the_tokenizer_counts(tiny_checkpoint):
    one = tiny_checkpoint()
    before = fingerprint(one)
    (one / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(one) != before


def test_every_tensor_is_looked_at(tiny_checkpoint):
    """Also the smallest: each, changed alone, is seen, and so is the file's last byte."""
    one = tiny_checkpoint()
    before, path = fingerprint(one), one / "model.safetensors"
    state = load_file(path)
    for name in state:
        changed = state | {name: state[name].clone()}
        changed[name].view(-1)[0] += 1
        save_file(changed, path, metadata={"format": "pt"})
        assert fingerprint(one) != before, name
    save_file(state, path, metadata={"format": "pt"})
    assert fingerprint(one) == before
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(one) != before


def test_random_weights_of_another_seed_differ(tiny_checkpoint):
    one = tiny_checkpoint()
    before, path = fingerprint(one), one / "model.safetensors"
    state = {name: torch.randn_like(value) for name, value in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    assert fingerprint(one) != before
