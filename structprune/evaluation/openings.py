"""Documents of generation tasks to finished texts."""

from collections.abc import Mapping, Sequence
from typing import Any

from structprune.errors import UserError
from structprune.evaluation.documents import Opening
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.requests import sampler_values
from structprune.evaluation.texts import Texts
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import Generation, free_options, generation_settings
from structprune.models.families import family_of
from structprune.models.modeling_structprune import DiffusionLM


def generate_texts(
    model: DiffusionLM,
    openings: Sequence[Opening],
    texts: Texts,
    options: Mapping[str, Any],
    seed: int = 0,
    batch: int = 8,
) -> list[str]:
    """The text generated after every opening, cut at EOS or its stop strings.

    A document's random numbers depend on the seed and its key, not on the other documents. Sampling at a temperature
    therefore runs one document at a time; greedy settings share batches.

    Args:
        options: of the family's sampler, which outrank those of the openings.
        batch: prompts in a forward pass.
    Raises:
        UserError: an option that the sampler does not have, an empty prompt, or one too long for the model.
    """
    settings = [_settings(model.config, opening, options) for opening in openings]
    answers: dict[int, str] = {}
    for indices in _portions(settings):
        prompts = [texts.prompt(openings[index].context) for index in indices]  # N x (P,)
        stream = item_generator(seed, openings[indices[0]].key)
        outputs = generate(model, prompts, settings[indices[0]], options=Options(generator=stream, batch=batch))
        for index, prompt, ids in zip(indices, prompts, outputs, strict=True):
            answers[index] = texts.answer(ids[len(prompt) :], openings[index].until)
    return [answers[index] for index in range(len(openings))]


def check_openings(config: Any, openings: Sequence[Opening], texts: Texts, options: Mapping[str, Any]) -> None:
    """Raise the errors of `generate_texts` that the model's configuration is enough for: before any weight is read."""
    longest = getattr(config, family_of(config).keys["positions"])
    for opening in openings:
        settings, prompt = _settings(config, opening, options), texts.prompt(opening.context)
        if settings.reach(len(prompt)) > longest:
            raise UserError(
                f"item {opening.key} has {len(prompt)} tokens, and gen_length = {settings.gen_length} more do not fit "
                f"the model's {longest} positions: shorten the prompt, or lower gen_length"
            )


def _settings(config: Any, opening: Opening, options: Mapping[str, Any]) -> Generation:
    return generation_settings(config, sampler_values(free_options(config), opening.options, options))


def _portions(settings: Sequence[Generation]) -> list[list[int]]:
    """Indices of openings that are generated together: of equal settings, and alone where sampling is random."""
    portions: dict[Any, list[int]] = {}
    for index, each in enumerate(settings):
        portions.setdefault((each, index if each.draws else None), []).append(index)
    return list(portions.values())
