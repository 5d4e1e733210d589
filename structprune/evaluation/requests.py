"""lm-eval's requests to documents and items, and outcomes back into the requests' order; lm-eval is not needed.

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

PACE = ("steps", "block_length")  # sampler options that default to gen_length


@dataclass(frozen=True)
class Group:
    """A document with each (context, continuation) once, and for each the indices of its requests."""

    document: Choices
    places: tuple[tuple[int, ...], ...]


def document_key(request) -> str:
    """task/document of a request; for a request without a task, a digest of its context."""
    if request.task_name is None or request.doc_id is None:
        return "request/" + hashlib.sha256(str(request.args[0]).encode()).hexdigest()[:16]
    return f"{request.task_name}/{request.doc_id}"


def group_choices(requests: Sequence) -> list[Group]:
    """Requests of log-likelihoods by document, in the order they first appear.

    Where only some of a document's requests have a context (lm-eval's acc_mutual_info), the others become a document
    of their own. Repeated requests are scored once.
    """
    documents: dict[str, dict[tuple[str, str], list[int]]] = {}
    for index, request in enumerate(requests):
        key, (context, continuation) = document_key(request), request.args[:2]
        pairs = documents.setdefault(key if context else f"{key}/unconditional", {})
        pairs.setdefault((context, continuation), []).append(index)
    return [
        Group(
            Choices(key, tuple(pairs), tuple(len(continuation.removeprefix(" ")) for _, continuation in pairs)),
            tuple(tuple(places) for places in pairs.values()),
        )
        for key, pairs in documents.items()
    ]


def in_request_order(groups: Sequence[Group], outcomes: Sequence[Sequence[float]]) -> list[float]:
    """Log-likelihoods, for every group one per pair, in the order of the requests."""
    answers: dict[int, float] = {}
    for group, values in zip(groups, outcomes, strict=True):
        for places, value in zip(group.places, values, strict=True):
            answers |= {place: value for place in places}
    return [answers[index] for index in range(len(answers))]


def to_item(document: Choices, texts: Texts) -> Item:
    """A document as tokens to score; raises UserError for a continuation without a token."""
    pairs = zip(document.pairs, document.lengths, strict=True)
    return Item(document.key, tuple(Answer(*texts.pair(*pair), size=length) for pair, length in pairs))


def to_opening(request) -> Opening:
    """A generation request as a document."""
    context, options = request.args[:2]
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    rest = {name: value for name, value in options.items() if name != "until"}
    return Opening(document_key(request), context, until, rest)


def sampler_values(names: Sequence[str], of_task: Mapping[str, Any], of_caller: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a sampler from a task's and the caller's, of which the caller's take precedence.

    lm-eval's names are translated: max_gen_toks (or max_new_tokens) is gen_length; without do_sample the temperature is
    0 and top_p and top_k are dropped. By default steps, and LLaDA's block length, equal gen_length: one token a step in
    one block, as published.

    Args:
        names: of the sampler's options.
        of_task: `Opening.options`.
        of_caller: under the sampler's names.
    """
    options = dict(of_task)
    for name in ("max_new_tokens", "max_gen_toks"):
        if name in options:
            options["gen_length"] = options.pop(name)
    if not options.pop("do_sample", False):
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    values = overlay(options, of_caller)
    if "gen_length" in values:
        values = {name: values["gen_length"] for name in PACE if name in names} | values
    return values


def overlay(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler options with changes; a changed gen_length drops the steps and block length of the base."""
    if "gen_length" in changes:
        base = {name: value for name, value in base.items() if name not in PACE}
    return {**base, **changes}
