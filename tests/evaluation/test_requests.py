"""lm-eval's requests to items and back, with stand-ins for its instances."""

from types import SimpleNamespace

import pytest

from structprune.assets import model_directory
from structprune.evaluation.documents import Opening
from structprune.evaluation.requests import (
    document_key,
    group_choices,
    in_request_order,
    overlay,
    sampler_values,
    to_item,
    to_opening,
)
from structprune.evaluation.texts import Texts

LLADA = ("gen_length", "steps", "block_length", "temperature", "cfg_scale", "remasking", "stop_at_eos")
DREAM = ("gen_length", "steps", "alg", "temperature", "top_p", "top_k")


def request(context, continuation, task="piqa", doc_id=0):
    return SimpleNamespace(args=(context, continuation), task_name=task, doc_id=doc_id)


def test_answers_of_a_document_are_one_item_wherever_they_stand():
    requests = [
        request("Q0", " yes"),
        request("Q1", " up", doc_id=1),
        request("Q0", " never"),
        request("Q0", " yes", task="other"),
        request("Q1", "down", doc_id=1),
    ]
    groups = group_choices(requests)
    assert [group.document.key for group in groups] == ["piqa/0", "piqa/1", "other/0"]
    assert groups[0].document.pairs == (("Q0", " yes"), ("Q0", " never"))
    assert groups[0].document.lengths == (3, 5) and groups[1].document.lengths == (2, 4)
    assert in_request_order(groups, [(-1.0, -2.0), (-3.0, -4.0), (-5.0,)]) == [-1.0, -3.0, -2.0, -5.0, -4.0]


def test_repeated_requests_are_scored_once():
    [group] = group_choices([request("Q", " a"), request("Q", " b"), request("Q", " b")])
    assert group.document.pairs == (("Q", " a"), ("Q", " b")) and group.places == ((0,), (1, 2))
    assert in_request_order([group], [(-1.0, -2.0)]) == [-1.0, -2.0, -2.0]


def test_unconditional_answers_are_no_choices():
    requests = [request("Q", " a"), request("Q", " b"), request("", " a"), request("", " b")]
    first, second = group_choices(requests)
    assert first.document.key == "piqa/0" and len(first.document.pairs) == 2
    assert second.document.key == "piqa/0/unconditional" and second.places == ((2,), (3,))


def test_outcomes_must_fit_the_groups():
    groups = group_choices([request("Q", " a"), request("Q", " b")])
    with pytest.raises(ValueError):
        in_request_order(groups, [(-1.0,)])


def test_requests_of_no_task_are_told_apart_by_context():
    keys = [document_key(request(context, " a", None, None)) for context in ("one", "two", "one")]
    assert keys[0] == keys[2] != keys[1]


def test_an_item_holds_the_tokens_of_every_answer():
    texts = Texts.open(model_directory(), "none")
    [group] = group_choices([request("The cat", " sat"), request("The cat", " flew away")])
    item = to_item(group.document, texts)
    assert item.key == "piqa/0" and [answer.size for answer in item.answers] == [3, 9]
    for answer, text in zip(item.answers, (" sat", " flew away"), strict=True):
        assert texts.tokenizer.decode(answer.prompt) == "The cat"
        assert texts.tokenizer.decode(answer.target) == text


def test_a_generation_request_keeps_its_wishes():
    opening = to_opening(request("Q", {"until": ["\n", "."], "max_gen_toks": 9, "do_sample": False}, "gsm8k", 3))
    assert opening == Opening("gsm8k/3", "Q", ("\n", "."), {"max_gen_toks": 9, "do_sample": False})
    assert to_opening(request("Q", {"until": "x"})).until == ("x",)
    assert to_opening(request("Q", {})).until == ()


@pytest.mark.parametrize(
    "known, options, given, expected",
    [
        (LLADA, {"max_gen_toks": 32}, {}, {"gen_length": 32, "steps": 32, "block_length": 32}),
        (DREAM, {"max_gen_toks": 32}, {}, {"gen_length": 32, "steps": 32}),
        (LLADA, {"max_gen_toks": 32}, {"gen_length": 8}, {"gen_length": 8, "steps": 8, "block_length": 8}),
        (LLADA, {"gen_length": 8}, {"steps": 4}, {"gen_length": 8, "steps": 4, "block_length": 8}),
        (DREAM, {"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {}, {}),
        (DREAM, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {}, {"temperature": 0.7, "top_p": 0.9}),
        (DREAM, {"do_sample": False, "temperature": 0.7}, {"temperature": 0.2}, {"temperature": 0.2}),
        (LLADA, {}, {}, {}),
    ],
)
def test_wishes_become_sampler_options(known, options, given, expected):
    assert sampler_values(known, options, given) == expected


def test_a_new_length_takes_steps_and_blocks_with_it():
    base = {"gen_length": 1024, "steps": 1024, "block_length": 1024, "cfg_scale": 0.5}
    assert overlay(base, {"gen_length": 64}) == {"gen_length": 64, "cfg_scale": 0.5}
    assert overlay(base, {"steps": 64})["gen_length"] == 1024
