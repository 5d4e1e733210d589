"""Documents of generation tasks to finished texts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from structprune.errors import UserError
from structprune.evaluation.documents import Opening
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.requests import sampler_values
from structprune.evaluation.texts import Texts
from structprune.generation.generate import generate
from structprune.generation.samplers import Generation, generation_settings, sampler_options
from structprune.models.families import family_of
from structprune.models.modeling_structprune import DiffusionLM


def complete(
    model: DiffusionLM,
    openings: Sequence[Opening],
    texts: Texts,
    given: Mapping[str, Any],
    seed: int = 0,
    batch: int = 8,
    track: Callable[[Iterable], Iterable] = lambda items: items,
) -> list[str]:
    """The text generated after every opening, cut at EOS or its stop strings.

    Numbers of a document depend on the seed and its key, not on the other documents. Sampling at a temperature
    therefore runs one document at a time; greedy settings share batches.

    Args:
        given: options of the family's sampler, which outrank those of the openings.
        batch: prompts in a forward pass.
        track: wraps the iteration over batches of equal settings (progress).
    Raises:
        UserError: an option that the sampler has not, an empty prompt, or one too long for the model.
    """
    settings = [_settings(model.config, opening, given) for opening in openings]
    answers: dict[int, str] = {}
    for chosen in track(_portions(openings, settings)):
        prompts = [texts.prompt(openings[index].context) for index in chosen]  # N x (P,)
        stream = item_generator(seed, openings[chosen[0]].key)
        found = generate(model, prompts, settings[chosen[0]], generator=stream, batch=batch)
        for index, prompt, ids in zip(chosen, prompts, found):
            answers[index] = texts.answer(ids[len(prompt) :], openings[index].until)
    return [answers[index] for index in range(len(openings))]


def check_openings(config, openings: Sequence[Opening], texts: Texts, given: Mapping[str, Any]) -> None:
    """Raise UserError for what `complete` would, from the model's configuration alone: before any weight is read."""
    longest = getattr(config, family_of(config).keys["positions"])
    for opening in openings:
        settings, prompt = _settings(config, opening, given), texts.prompt(opening.context)
        if len(prompt) + settings.gen_length > longest:
            raise UserError(
                f"item {opening.key} has {len(prompt)} tokens, and gen_length = {settings.gen_length} more do not fit "
                f"the model's {longest} positions: shorten the prompt, or lower gen_length"
            )


def _settings(config, opening: Opening, given: Mapping[str, Any]) -> Generation:
    return generation_settings(config, sampler_values(sampler_options(config), opening.options, given))


def _portions(openings: Sequence[Opening], settings: Sequence[Generation]) -> list[list[int]]:
    """Indices of openings that are generated together: of equal settings, alone where chance has a part."""
    alike: dict[Any, list[int]] = {}
    for index, setting in enumerate(settings):
        alike.setdefault((setting, index if setting.draws else None), []).append(index)
    return list(alike.values())
