"""From settings and a tokenizer to a calibration set: read, tokenise, cut and noise, or replay a saved one."""

from pathlib import Path

import torch

from structprune.calibration.batches import Calibration, check_fitted
from structprune.calibration.noise import (
    apply_mask,
    check_copies,
    level_times,
    seeded,
    stratified_noise,
    window_times,
)
from structprune.calibration.text import is_streamed, join_texts, read_texts
from structprune.calibration.windows import cut_windows, tokenize_corpus
from structprune.config import CalibrationSettings, Config
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.family import Schedule
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.noising import mask_rate
from structprune.models.tokenizer import load_tokenizer

SURPLUS = 4  # times the needed tokens are read from a streamed source, so that windows are not just its first ones
CHECK_SEED = 977  # seeds the noise of the held-out check, which differs from the calibration's
LONGEST = 1 << 26  # most tokens read from a local or downloaded corpus (256 MB as int32)


def calibrate(model: DiffusionLM, config: Config) -> Calibration:
    """The calibration set that `config` describes, tokenised by the model's own checkpoint.

    Raises:
        UserError: text or file that cannot be used.
    """
    adapter = Adapter(model)
    check_length(model, config)
    return load_calibration(
        config.calibration,
        None if config.calibration.replays else load_tokenizer(model.source.directory),
        mask_id=adapter.mask_id,
        schedule=adapter.family.schedule,
        edges_visible=model.edges_visible,
        vocabulary=adapter.vocabulary,
    )


def check_length(model: DiffusionLM, config: Config, saved: Calibration | None = None) -> None:
    """Raise UserError where windows, to make or of a saved calibration, are longer than the model's positions."""
    longest = Adapter(model).positions
    settings = config.calibration
    if saved is not None and saved.length > longest:
        raise UserError(
            f"the calibration's windows of {saved.length} tokens exceed the model's {longest} positions: calibrate anew"
        )
    if saved is None and not settings.replays and settings.length > longest:
        raise UserError(f"calibration.length = {settings.length} exceeds the model's {longest} positions: lower it")


def held_out_noise(
    calibration: Calibration, model: DiffusionLM, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of a run's final check: held-out ids (n, T), noisy copies (n, S, T), mask probabilities (n, S).

    S is `Calibration.check_samples`: windows that were dealt fewer copies are not judged on fewer.
    """
    held_out = calibration.check.input_ids  # (n, T)
    generator = torch.Generator().manual_seed(CHECK_SEED + seed)
    mask_id, samples = model.config.mask_token_id, calibration.check_samples
    noisy, p = stratified_noise(held_out, mask_id, generator, samples, model.edges_visible)  # (n, S, T), (n, S)
    return held_out, noisy, p


def load_calibration(
    settings: CalibrationSettings,
    tokenizer,
    *,
    mask_id: int,
    schedule: Schedule,
    edges_visible: bool,
    vocabulary: int | None = None,
) -> Calibration:
    """The calibration set that `settings` describe; equal settings and text give equal ids and noise.

    Args:
        tokenizer: of the checkpoint; not needed for a replay.
        mask_id: the model's mask token.
        schedule: "levels" (LLaDA) or "uniform" (Dream).
        edges_visible: never mask the first and last position of a window (Dream).
        vocabulary: rows of the model's embedding; ids from there on are refused.
    Returns:
        settings.windows + settings.held_out windows, the latter held out.
    Raises:
        UserError: text that cannot be read or is too short, a file that cannot be replayed, or a token id the model
            has no embedding for.
    """
    if settings.replays:
        calibration = replay(settings, mask_id)
    else:
        calibration = _from_text(settings, tokenizer, mask_id, schedule, edges_visible)
    check_vocabulary(calibration.input_ids, vocabulary, settings.source)
    return calibration


def replay(settings: CalibrationSettings, mask_id: int | None = None) -> Calibration:
    """The saved calibration set, unchanged; `settings.held_out` applies only where the file has none.

    Raises:
        UserError: a file that cannot be replayed, or a held-out count other than the configured one.
    """
    source, configured = settings.source, settings.held_out
    calibration = Calibration.load(source, configured, mask_id)
    held_out = calibration.held_out
    if configured not in (held_out, CalibrationSettings.model_fields["held_out"].default):
        raise UserError(
            f"calibration.held_out = {configured} has no effect: {source} is replayed as it is, with {held_out} windows"
            f" held out; leave it out, or set it to {held_out}"
        )
    if held_out == 0 and settings.seed != CalibrationSettings.model_fields["seed"].default:
        raise UserError(
            f"calibration.seed = {settings.seed} has no effect: {source} is replayed as it is, and no window is held"
            " out that it would draw noise for; leave it out"
        )
    check_fitted(calibration.windows, held_out, calibration.metadata, source)
    return calibration


def check_source(settings: CalibrationSettings, directory: Path) -> Calibration | None:
    """The saved calibration, or None for text, whose tokenizer is in the checkpoint's directory.

    Raises:
        UserError: a saved calibration or a tokenizer that cannot be used.
    """
    if settings.replays:
        return replay(settings)
    load_tokenizer(directory)
    return None


def _from_text(
    settings: CalibrationSettings, tokenizer, mask_id: int, schedule: Schedule, edges_visible: bool
) -> Calibration:
    times = level_times(settings.steps, settings.interval)  # (S,)
    check_copies(settings.copies, len(times))
    if tokenizer is None:
        raise UserError(
            "the checkpoint has no tokenizer, which calibration text needs: add it, or replay a .safetensors file"
        )
    if edges_visible and settings.length < 3:
        raise UserError(
            f"calibration.length = {settings.length} leaves no token to mask between the visible edges: raise it to 3"
        )
    tokens = _corpus(settings, tokenizer)  # (M,)
    count = settings.windows + settings.held_out
    input_ids = cut_windows(tokens, count, settings.length, seeded(settings.seed, 0))  # (N, T)
    noise = seeded(settings.seed, 1)
    # drawn separately, so that times are stratified over the fit windows and over the held-out ones
    parts = []
    for part in input_ids.split([settings.windows, settings.held_out]):
        p = mask_rate(window_times(len(part), schedule, times, noise, settings.copies))  # (n, c)
        parts.append((apply_mask(part, p, mask_id, noise, edges_visible), p))
    noisy_ids, mask_probability = (torch.cat(tensors) for tensors in zip(*parts))  # (N, c, T), (N, c)
    ordered = ",".join(f"{t:g}" for t in times.tolist())
    metadata = {
        "schedule": schedule,
        "noise_levels": ordered if schedule == "levels" else f"uniform x {settings.noisy_copies}",
        "copies": str(settings.noisy_copies),
        "steps": str(settings.steps),
        "interval": str(settings.interval),
        "mask_id": str(mask_id),
        "edges_visible": str(edges_visible).lower(),
        "source": settings.source,
        "subset": settings.subset or "",
        "split": settings.split,
        "seed": str(settings.seed),
        "corpus_tokens": str(len(tokens)),
    }
    return Calibration(input_ids, noisy_ids, mask_probability, metadata, settings.held_out)


def _corpus(settings: CalibrationSettings, tokenizer) -> torch.Tensor:
    """The token ids (M,) of the source, or of its start where that is enough."""
    source = settings.source
    documents = read_texts(source, settings.subset, settings.split, settings.column)
    needed = SURPLUS * (settings.windows + settings.held_out) * settings.length  # tokens
    limit = needed if is_streamed(source) else max(needed, LONGEST)
    return tokenize_corpus(join_texts(documents, source, tokenizer), tokenizer, limit)


def check_vocabulary(input_ids: torch.Tensor, vocabulary: int | None, source: str) -> None:
    """Raise UserError where a text has token ids without an embedding; `vocabulary` counts them (None: unknown)."""
    largest = input_ids.max().item()
    if vocabulary is not None and largest >= vocabulary:
        raise UserError(
            f"the text '{source}' has token id {largest}, but the model embeds {vocabulary} tokens:"
            " this tokenizer is not the model's"
        )
