"""Text to learn from: windows of running text, and conversations of which only the answers are learnt."""

import json

import pytest
import torch

from structprune.assets import model_directory
from structprune.errors import UserError
from structprune.models.tokenizer import load_tokenizer
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.text import answer_tokens, read_recovery_text

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def tokenizer():
    result = load_tokenizer(model_directory())
    result.chat_template = TEMPLATE
    result.eos_token = result.convert_ids_to_tokens(3)
    return result


def settings(source, **changes):
    keys = {"data.source": str(source), "data.length": 16, "data.held_out": 4}
    return RecoverConfig.load(overrides=keys | {f"data.{key}": value for key, value in changes.items()}).data


def conversations(path, count=12):
    turns = lambda index: [  # noqa: E731
        {"role": "user", "content": f"What is {index} plus one?"},
        {"role": "assistant", "content": f"It is {index + 1}."},
    ]
    path.write_text("".join(json.dumps({"messages": turns(index)}) + "\n" for index in range(count)))
    return path


def test_windows_are_disjoint_and_as_many_as_the_tokens_need(text_path, tokenizer):
    text = read_recovery_text(settings(text_path), tokenizer, tokens=100)
    assert text.windows.shape == (7, 16) and text.held_out.shape == (4, 16) and text.learnt is None
    rows = {tuple(row) for row in torch.cat((text.windows, text.held_out)).tolist()}
    assert len(rows) == 11
    again = read_recovery_text(settings(text_path), tokenizer, tokens=100)
    other = read_recovery_text(settings(text_path, seed=1), tokenizer, tokens=100)
    assert text.digest == again.digest != other.digest


def test_a_short_text_repeats(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("One sentence of some length, for windows. " * 30)
    text = read_recovery_text(settings(path), tokenizer, tokens=10**6)
    assert 1 <= len(text.windows) < 100


def test_a_text_of_nothing_but_held_out_windows_is_refused(tmp_path, tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("One sentence of some length, for windows. " * 4)
    with pytest.raises(UserError, match=r"windows of 16 tokens, and 4 are held out: .* lower data.held_out"):
        read_recovery_text(settings(path), tokenizer, tokens=100)


def test_only_answers_are_learnt_and_the_end_after_the_last(tokenizer):
    turns = [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Done."},
    ]  # fmt: skip
    ids, learnt = answer_tokens(turns, settings("x.jsonl", length=40), tokenizer)
    assert ids.shape == learnt.shape == (40,)
    marked = [tokenizer.decode(part) for part in (ids[learnt & (ids != 3)], ids[~learnt])]
    assert marked[0].replace(" ", "").split() == ["So.", "Done."]
    assert "Why?" in marked[1] and "And?" in marked[1] and "So." not in marked[1]
    filling = ids == 3
    assert filling[-1] and learnt[filling].all()


def test_an_end_after_the_users_turn_is_not_an_answer(tokenizer):
    turns = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    ids, learnt = answer_tokens(turns, settings("x.jsonl", length=40), tokenizer)
    assert (ids == 3).any() and not learnt[ids == 3].any() and learnt.any()


def test_a_conversation_without_turns_is_refused(tokenizer):
    with pytest.raises(UserError, match="the chat template refuses a conversation of the data text"):
        answer_tokens([], settings("x.jsonl"), tokenizer)


def test_a_template_that_refuses_the_first_turns_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('two turns, please') if messages | length < 2 }}" + TEMPLATE
    turns = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "So."}]
    with pytest.raises(
        UserError, match=r"refuses the first turns of a conversation alone .* data.answers_only = false"
    ):
        answer_tokens(turns, settings("x.jsonl"), tokenizer)


def test_conversations_become_windows(tmp_path, tokenizer):
    path = conversations(tmp_path / "chat.jsonl")
    text = read_recovery_text(settings(path, length=48), tokenizer, tokens=48 * 5)
    assert text.windows.shape == (5, 48) and text.learnt.shape == (5, 48) and text.held_out_learnt.shape == (4, 48)
    assert text.learnt.any(1).all() and not text.learnt.all(1).any()
    whole = read_recovery_text(settings(path, length=16, answers_only=False), tokenizer, tokens=48)
    assert whole.learnt is None and whole.windows.shape == (3, 16)


def test_a_prompt_that_leaves_no_room_is_passed_over(tmp_path, tokenizer):
    path = tmp_path / "chat.jsonl"
    long = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "Yes."}]
    short = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in [long, short] * 6))
    text = read_recovery_text(settings(path, length=32), tokenizer, tokens=10**4)
    assert len(text.windows) + len(text.held_out) == 6


def test_a_template_that_writes_earlier_turns_anew_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    with pytest.raises(UserError, match=r"writes earlier turns anew .* data.answers_only = false"):
        answer_tokens([*turns, *turns], settings("x.jsonl"), tokenizer)


def test_mixed_rows_are_refused(tmp_path, tokenizer):
    path = conversations(tmp_path / "chat.jsonl", 2)
    path.write_text(path.read_text() + json.dumps({"messages": "plain text"}) + "\n")
    with pytest.raises(UserError, match="mixes text and conversations"):
        read_recovery_text(settings(path, length=48), tokenizer, tokens=10**4)
