"""Tokens of contexts and continuations: the published split, Dream's BOS and EOS, the chat template."""

import pytest
import torch

from structprune.assets import model_directory
from structprune.errors import UserError
from structprune.evaluation.texts import Texts, chat_warning, model_names
from structprune.models.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
EOS, MASK = 2046, 2047


@pytest.fixture
def tokenizer():
    return load_tokenizer(model_directory())


@pytest.fixture
def dream_tokenizer(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    return tokenizer


def test_llada_adds_no_token(tokenizer):
    prompt, target = Texts.of(tokenizer, "none").pair("Question: why?\nAnswer:", " because")
    whole = tokenizer("Question: why?\nAnswer: because", add_special_tokens=False)["input_ids"]
    assert torch.cat((prompt, target)).tolist() == whole
    assert tokenizer.decode(target) == " because" and prompt.dtype == target.dtype == torch.int64


def test_spaces_at_the_end_of_a_context_go_to_the_continuation(tokenizer):
    texts = Texts.of(tokenizer, "none")
    assert all(map(torch.equal, texts.pair("the cat ", "sat"), texts.pair("the cat", " sat")))
    assert tokenizer.decode(texts.pair("the cat \n", "sat")[1]) == " \nsat"


def test_the_cut_is_at_as_many_tokens_as_the_context_has(tokenizer):
    """`com` is one token and so is `comm`: the whole's tokens, not the parts', are scored, as published."""
    texts = Texts.of(tokenizer, "none")
    whole, context = texts.encode("the command"), texts.encode("the comm")
    assert whole[: len(context)] != context  # otherwise this tests nothing
    prompt, target = texts.pair("the comm", "and more")
    assert prompt.tolist() + target.tolist() == texts.encode("the command more")
    assert len(prompt) == len(context)


def test_a_continuation_that_melts_into_its_context_is_refused(tokenizer):
    with pytest.raises(UserError, match="adds no token"):
        Texts.of(tokenizer, "none").pair("word", "")


def test_dream_scores_between_bos_and_eos(dream_tokenizer):
    texts = Texts.of(dream_tokenizer, "bos_eos")
    prompt, target = texts.pair("the cat", " sat")
    bare = Texts.of(dream_tokenizer, "none").pair("the cat", " sat")
    bos = dream_tokenizer.bos_token_id
    assert prompt.tolist() == [bos, *bare[0].tolist()] and target.tolist() == [*bare[1].tolist(), EOS]
    assert texts.prompt("the cat").tolist() == prompt.tolist()
    assert texts.pair("", " sat")[0].tolist() == [bos]


def test_dream_with_a_template_has_no_bos_of_its_own(dream_tokenizer):
    dream_tokenizer.chat_template = TEMPLATE
    texts = Texts.of(dream_tokenizer, "bos_eos", chat=True)
    assert texts.start == () and texts.end == (EOS,)


@pytest.mark.parametrize(
    "edges, places", [("bos_eos", "behind bos_token and before eos_token"), ("bos", "behind bos_token")]
)
def test_a_bos_that_is_missing(tokenizer, edges, places):
    with pytest.raises(UserError, match=f"text is scored {places}, and the tokenizer names no bos_token: add it to"):
        Texts.of(tokenizer, edges)


def test_an_eos_that_is_missing(tokenizer):
    """Which a chat template does not replace, as it does the BOS."""
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, None
    with pytest.raises(UserError, match="text is scored before eos_token, and the tokenizer names no eos_token"):
        Texts.of(tokenizer, "bos_eos", chat=True)


def test_the_template_opens_the_answer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    texts = Texts.of(tokenizer, "none", chat=True)
    assert texts.question("why?") == "[user]why?[assistant]" and texts.delimiter() == ""
    plain = Texts.of(tokenizer, "none")
    assert plain.question("why?") == "why?" and plain.delimiter() == " "


def test_an_open_last_message_is_continued(tokenizer):
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "Because"}]
    assert Texts.of(tokenizer, "none", chat=True).render(messages, False) == "[user]why?[assistant]Because"


def test_a_template_that_is_missing_or_refuses(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        Texts.of(tokenizer, "none", chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(UserError, match="refuses a prompt .*no system turn"):
        Texts.of(tokenizer, "none", chat=True).question("why?")


def test_a_checkpoint_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer"):
        Texts.open(tmp_path, "none")


@pytest.mark.parametrize(
    "generated, until, expected",
    [
        (" 42<|endoftext|> and more", (), " 42"),
        (" 42\n\nQuestion: next", ("Question:",), " 42\n\n"),
        (" one two three", ("three", " two", ""), " one"),
        (" 4<|mdm_mask|>2", (), " 42"),
        (" 4<|mdm_mask|>2", ("<|mdm_mask|>",), " 4"),
        (" all of it", ("absent",), " all of it"),
    ],
)
def test_answers_end_at_eos_or_a_stop_string(tokenizer, generated, until, expected):
    texts = Texts.of(tokenizer, "none")
    assert texts.answer(torch.tensor(texts.encode(generated)), until) == expected


@pytest.mark.parametrize(
    "name, has_template, chat, expected",
    [
        ("GSAI-ML/LLaDA-8B-Base", True, False, None),
        ("GSAI-ML/LLaDA-8B-Base", True, True, "looks like a Base"),
        ("GSAI-ML/LLaDA-8B-Instruct", True, True, None),
        ("GSAI-ML/LLaDA-8B-Instruct", True, False, "without --chat"),
        ("GSAI-ML/LLaDA-1.5", True, False, "without --chat"),
        ("Gen-Verse/MMaDA-8B-MixCoT", True, False, "without --chat"),
        ("Dream-org/Dream-v0-Instruct-7B", False, False, "has no chat template"),
        ("model-0.15", True, False, None),
        ("model-1.55", True, False, None),
    ],
)
def test_a_template_that_does_not_fit_is_told(name, has_template, chat, expected):
    result = chat_warning([name], has_template, chat)
    assert result is None if expected is None else expected in result


def test_a_pruned_checkpoint_is_known_by_its_source(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: GSAI-ML/LLaDA-8B-Instruct\n---\nPruned.\n")
    names = model_names("pruned", tmp_path)
    assert names == ["pruned", "GSAI-ML/LLaDA-8B-Instruct"]
    assert "LLaDA-8B-Instruct looks like an Instruct" in chat_warning(names, True, False)
    assert model_names("pruned", tmp_path / "none") == ["pruned"]
