"""Models and their text: what kind a checkpoint is, and how windows and prompts are made."""

import pytest
import torch

from structprune.config import ModelSettings
from structprune.errors import UserError
from structprune.sinks.subjects import Subject, describe_subject, find_kind, prompt_of, windows_of


class Letters:
    """A tokenizer of single letters that puts a BOS (1) before a text."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True, **options):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def subject(positions=16):
    return Subject("letters", True, None, Letters(), positions, None)


def test_windows_begin_with_a_bos_where_the_tokenizer_puts_one(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijklmnopqrst")
    windows = windows_of(subject(), text, 2, 8, seed=0)
    assert windows.shape == (2, 8) and windows[:, 0].tolist() == [1, 1]
    assert (windows[:, 1:].diff(dim=1) == 1).all()  # 7 neighbouring letters
    assert torch.equal(windows, windows_of(subject(), text, 2, 8, seed=0))
    with pytest.raises(UserError, match="has 20 tokens for letters, too short for 3 windows of 7"):
        windows_of(subject(), text, 3, 8, seed=0)
    with pytest.raises(UserError, match="--length = 17 exceeds the 16 positions of letters: lower it"):
        windows_of(subject(), text, 1, 17, seed=0)


def test_a_prompt_and_what_is_generated_must_fit():
    assert prompt_of(subject(), "ab", 13).tolist() == [[1, 97, 98]]
    message = "the prompt's 3 tokens and --gen-length 14 make 17 tokens, which exceeds the 16"
    with pytest.raises(UserError, match=message):
        prompt_of(subject(), "ab", 14)
    assert prompt_of(subject(None), "ab", 99).shape == (1, 3)  # a model that names no limit
    with pytest.raises(UserError, match="--prompt is empty"):
        prompt_of(subject(), "", 4)


def test_kinds_are_told_before_weights_are_read(tmp_path, tiny_checkpoint, causal_checkpoint):
    for folder, causal in ((tiny_checkpoint("dream"), False), (causal_checkpoint("Qwen2"), True)):
        (folder / "model.safetensors").unlink()
        assert find_kind(str(folder)) == (folder, causal)
    (tmp_path / "a.gguf").touch()
    assert find_kind(str(tmp_path / "a.gguf")) == (tmp_path / "a.gguf", True)


def test_models_carry_their_names_and_limits(tiny_checkpoint, causal_checkpoint):
    ours, theirs = (
        describe_subject(str(folder), ModelSettings()) for folder in (tiny_checkpoint(), causal_checkpoint())
    )
    assert (ours.name, ours.causal, ours.positions, ours.mask_id) == ("llada-tiny", False, 64, 2047)
    assert (theirs.name, theirs.causal, theirs.positions, theirs.mask_id) == ("llama", True, 64, None)
