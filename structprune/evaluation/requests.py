"""lm-eval's requests as documents and items, and outcomes back into their order; pure functions, without lm-eval.

A request (lm-eval's `Instance`) has `args`, (context, continuation) or (context, generation options), `task_name` and
`doc_id`. The requests of one document become one item, so that its answers share noise and a choice can be decided
early.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from structprune.evaluation.choices import Answer, Item
from structprune.evaluation.documents import Choices, Opening
from structprune.evaluation.texts import Texts

PACE = ("steps", "block_length")  # sampler options that go with gen_length


@dataclass(frozen=True)
class Group:
    """A document and the requests it answers.

    Attributes:
        document: with every (context, continuation) once.
        places: for every pair, the indices of the requests that ask for it.
    """

    document: Choices
    places: tuple[tuple[int, ...], ...]


def document_key(request) -> str:
    """task/document of a request; of one that belongs to no task, a digest of its context."""
    if request.task_name is None or request.doc_id is None:
        return "request/" + hashlib.sha256(str(request.args[0]).encode()).hexdigest()[:16]
    return f"{request.task_name}/{request.doc_id}"


def group_choices(requests: Sequence) -> list[Group]:
    """Requests of log-likelihoods by document, in the order they first appear.

    A document's requests without a context beside others that have one (lm-eval's acc_mutual_info) are no answers to
    choose from, and become a document of their own. Repeated requests are scored once.
    """
    found: dict[str, dict[tuple[str, str], list[int]]] = {}
    for index, request in enumerate(requests):
        key, (context, continuation) = document_key(request), request.args[:2]
        found.setdefault(key if context else f"{key}/unconditional", {}).setdefault((context, continuation), []).append(
            index
        )
    return [
        Group(
            Choices(key, tuple(pairs), tuple(len(continuation.removeprefix(" ")) for _, continuation in pairs)),
            tuple(tuple(places) for places in pairs.values()),
        )
        for key, pairs in found.items()
    ]


def spread(groups: Sequence[Group], outcomes: Sequence[Sequence[float]]) -> list[float]:
    """Log-likelihoods of groups in the order of the requests.

    Args:
        outcomes: for every group, one number per pair.
    """
    answers: dict[int, float] = {}
    for group, values in zip(groups, outcomes, strict=True):
        for places, value in zip(group.places, values, strict=True):
            answers |= {place: value for place in places}
    return [answers[index] for index in range(len(answers))]


def to_item(document: Choices, texts: Texts) -> Item:
    """A document as the tokens that are scored.

    Raises:
        UserError: a continuation without a token.
    """
    answers = []
    for (context, continuation), length in zip(document.pairs, document.lengths, strict=True):
        answers.append(Answer(*texts.pair(context, continuation), size=length))
    return Item(document.key, tuple(answers))


def to_opening(request) -> Opening:
    """A request to generate as a document."""
    context, options = request.args[:2]
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    rest = {name: value for name, value in options.items() if name != "until"}
    return Opening(document_key(request), context, until, rest)


def sampler_values(known: Sequence[str], options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a sampler from a task's wishes and the caller's, of which the caller's come first.

    lm-eval's words are translated: max_gen_toks (or max_new_tokens) is gen_length; do_sample false or absent makes the
    temperature 0 and takes top_p and top_k away. Where they are not given, steps, and LLaDA's block length, equal
    gen_length: one token a step in one block, as published.

    Args:
        known: the sampler's options.
        options: `Opening.options`.
        given: the caller's, in the sampler's words.
    """
    wishes = dict(options)
    for name in ("max_new_tokens", "max_gen_toks"):
        if name in wishes:
            wishes["gen_length"] = wishes.pop(name)
    if not wishes.pop("do_sample", False):
        wishes = {name: value for name, value in wishes.items() if name not in ("temperature", "top_p", "top_k")}
    values = overlay(wishes, given)
    if "gen_length" in values:
        values = {name: values["gen_length"] for name in PACE if name in known} | values
    return values


def overlay(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler options with others on top; a new gen_length takes the steps and block length with it."""
    if "gen_length" in given:
        base = {name: value for name, value in base.items() if name not in PACE}
    return {**base, **given}
