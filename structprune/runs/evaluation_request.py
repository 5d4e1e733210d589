"""An evaluation's request, prepared before any weight is read: tokenizers, windows, items, warnings."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.build import LONGEST, SURPLUS, check_vocabulary
from structprune.calibration.noise import stratified_noise
from structprune.calibration.text import ALIASES, LOCAL, is_streamed, join_texts, read_texts
from structprune.calibration.windows import cut_windows, tokenize_corpus
from structprune.checkpoint.learnt_text import read_learnt
from structprune.config.effects import refuse_idle
from structprune.config.yaml_files import read_yaml
from structprune.errors import UserError
from structprune.evaluation.continuations import continuation_units
from structprune.evaluation.documents import Choices, Opening, Task, TaskOptions
from structprune.evaluation.fidelity_units import FidelityUnit
from structprune.evaluation.labels import checkpoint_labels
from structprune.evaluation.lm_tasks import LmTask
from structprune.evaluation.overlap import CalibratedOn, KnownText
from structprune.evaluation.presets import PRESETS, FamilyPreset, Preset, is_preset, load_preset
from structprune.evaluation.requests import overlay, to_item
from structprune.evaluation.settings import EvaluationConfig, EvaluationSettings
from structprune.evaluation.tasks import open_task, parse_local
from structprune.evaluation.texts import Texts, chat_warning, model_names
from structprune.evaluation.units import (
    ChoiceUnit,
    GenerationUnit,
    TaskUnit,
    TextUnit,
    Unit,
    document_keys,
    window_keys,
)
from structprune.models.checkpoint_files import TOKENIZER_FILES
from structprune.models.families import Family
from structprune.models.loading import source_name
from structprune.models.tokenizer import load_tokenizer
from structprune.runs.ghost import read_ghost

WINDOW = 512  # tokens of a window, where models have as many positions
FIDELITY = ("fidelity_top", "fidelity_prompts", "fidelity_opening", "fidelity_tokens", "fidelity_steps")
SCORING = ("samples", "block", "cfg_scale", "sampling", "adaptive", "skip_empty")


@dataclass(frozen=True)
class Subject:
    """A checkpoint to evaluate, named `checkpoint` by the user and `label` in tables and files."""

    label: str
    checkpoint: str
    directory: Path
    family: Family
    config: Any
    tokenizer: Any
    texts: Texts | None  # how tasks use the tokenizer; None without tasks
    units: tuple[Unit, ...] = ()
    warnings: tuple[str, ...] = ()  # a line each


def check_request(config: EvaluationConfig) -> None:
    """Raise UserError where there is nothing to evaluate, and for settings that would be ignored."""
    settings = config.evaluation
    if settings.source is None and not settings.tasks:
        raise UserError("nothing to evaluate: give --text FILE, --tasks LIST (such as piqa:FILE.jsonl), or both")
    of_text = ("subset", "split", "column", "windows", "length", "noise", "fidelity")
    of_tasks = ("limit", "shots", "chat", *SCORING, "generation", "fewshot_seed", "include")
    idle = (
        ("evaluation", of_text, settings.source is None, "a text (--text)"),
        ("evaluation", of_tasks, not settings.tasks, "tasks (--tasks)"),
        ("evaluation", ("prompts",), not (settings.tasks or _continues(settings)), "tasks (--tasks)"),
        ("evaluation", FIDELITY, not settings.fidelity, "evaluation.fidelity = true (--fidelity)"),
        ("evaluation", FIDELITY[2:], not settings.fidelity_prompts, "evaluation.fidelity_prompts above 0"),
        ("evaluation", ("confidence",), not settings.adaptive, "evaluation.adaptive = true (--adaptive)"),
    )
    refuse_idle(config, idle)


def prepare(checkpoints: Sequence[str], config: EvaluationConfig) -> list[Subject]:
    """Every checkpoint with its units; reads configurations, tokenizers and texts only.

    Raises:
        UserError: anything that cannot be evaluated, in one line.
    """
    check_request(config)
    model, tasks = config.model, config.evaluation.tasks
    subjects = []
    for label, checkpoint in zip(checkpoint_labels(checkpoints), checkpoints, strict=True):
        ghost = read_ghost(checkpoint, model)  # so that broken weights are refused before anything is written
        directory, family, tokenizer = ghost.directory, ghost.adapter.family, load_tokenizer(ghost.directory)
        texts = Texts.of(tokenizer, family.text_edges, config.evaluation.chat) if tasks else None
        subjects.append(Subject(label, checkpoint, directory, family, ghost.model.config, tokenizer, texts))
    makers = _UnitMakers(config.evaluation, subjects)
    subjects = [makers.with_units(subject) for subject in subjects]
    _check_used(config, [unit for subject in subjects for unit in subject.units])
    return [_with_warnings(subject, config.evaluation.chat) for subject in subjects]


def _check_used(config: EvaluationConfig, units: Sequence[Unit]) -> None:
    """Raise UserError for settings that no unit uses."""
    kinds = set(map(type, units))
    choices, generation = ChoiceUnit in kinds, GenerationUnit in kinds
    of_passes = choices or config.evaluation.source is not None
    continues = _continues(config.evaluation)
    answers = "a task with answers to choose from"
    idle = (
        ("evaluation", SCORING, not choices, f"{answers} (guidance of generation: generation.cfg_scale)"),
        ("evaluation", ("generation",), not generation, "a task that is answered by generation"),
        ("evaluation", ("prompts",), not (generation or continues), "a task that is answered by generation"),
        ("evaluation", ("include", "fewshot_seed"), not uses_lm_eval(units), "a task of lm-eval"),
        ("evaluation", ("batch",), not of_passes, f"a text or {answers}"),
    )
    refuse_idle(config, idle)


def _continues(settings: EvaluationSettings) -> bool:
    """Whether openings of the text are continued."""
    return settings.fidelity and settings.fidelity_prompts > 0


def uses_lm_eval(units: Iterable[Unit]) -> bool:
    members = (task for unit in units if isinstance(unit, TaskUnit) for task in unit.members)
    return any(isinstance(task, LmTask) for task in members)


class _UnitMakers:
    """Makes the units of subjects; units that subjects with one tokenizer share are made once."""

    def __init__(self, settings: EvaluationSettings, subjects: Sequence[Subject]):
        self._settings, self._presets = settings, _presets(settings.tasks)
        positions = [getattr(each.config, each.family.keys["positions"]) for each in subjects]
        self._shortest = min(positions)
        self._length = settings.length or min(WINDOW, self._shortest)
        for subject, longest in zip(subjects, positions, strict=True):
            if settings.source is not None and self._length > longest:
                raise UserError(
                    f"evaluation.length = {self._length} exceeds the {longest} positions of {subject.label}: lower it"
                )
        self._shared: dict[tuple, Any] = {}

    def with_units(self, subject: Subject) -> Subject:
        """The subject with its units, checked against its model."""
        texts, source = subject.texts, self._settings.source
        units: list[Unit] = [] if source is None else self._text(subject, source)
        if texts is not None:
            units += self._once("tasks", subject, lambda: self._tasks(subject.family, texts))
        vocabulary = getattr(subject.config, subject.family.keys["vocabulary"])
        for unit in units:
            try:
                unit.check(subject.config)
            except UserError as error:  # which of several models cannot evaluate it
                raise UserError(f"{subject.label}: {error}") from error
            for ids in unit.token_ids():
                check_vocabulary(ids, vocabulary, unit.task)
        return replace(subject, units=tuple(units))

    def _once(self, name: str, subject: Subject, make: Callable[[], Any]) -> Any:
        """What `make` returns, once for all subjects of one family and tokenizer."""
        paths = [subject.directory / file for file in TOKENIZER_FILES]
        key = (name, subject.family.name, *(path.read_bytes() if path.is_file() else None for path in paths))
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _text(self, subject: Subject, source: str) -> list[Unit]:
        """The windows of the text, and with fidelity the continuations of their openings."""
        settings, edges = self._settings, subject.family.model_class.edges_visible
        windows = self._once("text", subject, lambda: read_windows(settings, source, self._length, subject.tokenizer))
        mask_id = subject.config.mask_token_id

        def noise(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            return stratified_noise(ids, mask_id, generator, settings.noise, edges)

        unit = TextUnit(Path(source).name, window_keys(windows), windows, settings.noise, settings.seed, noise)
        if not settings.fidelity:
            return [unit]
        more = continuation_units(unit, settings, subject.tokenizer, self._shortest) if _continues(settings) else []
        return [FidelityUnit(**vars(unit), top=settings.fidelity_top), *more]

    def _tasks(self, family: Family, texts: Texts) -> list[Unit]:
        """Units of tasks; the members of a group are one unit."""
        settings = self._settings
        units: list[Unit] = []
        for name in settings.tasks:
            preset = self._presets.get(name)
            of_task = name if preset is None else preset.task
            published = _published(of_task, preset, family)
            shots = settings.shots
            if shots is None and preset is not None and published is not None:
                shots = published.shots
            options = TaskOptions(shots, settings.limit, settings.fewshot_seed, settings.include)
            members = open_task(of_task, family, texts, options)
            task = members[0].name if len(members) == 1 else of_task
            if task in (unit.task for unit in units):
                raise UserError(f"the task '{task}' is named twice: leave one out, or rename its file")
            units.append(self._task(task, members, published, shots, texts))
        return units

    def _task(
        self, name: str, members: Sequence[Task], published: FamilyPreset | None, shots: int | None, texts: Texts
    ) -> Unit:
        settings = self._settings
        pairs = tuple((member, document) for member in members for document in member.documents)
        if not pairs:
            raise UserError(f"the task '{name}' has no document: leave it out")
        documents = [document for _, document in pairs]
        keys = document_keys(documents)
        common = (name, keys, tuple(members), pairs, shots)
        if isinstance(documents[0], Opening):
            options = overlay((published and published.generation) or {}, settings.generation)
            return GenerationUnit(*common, texts, options, settings.seed, settings.prompts)
        choices = [document for document in documents if isinstance(document, Choices)]
        items = tuple(replace(to_item(each, texts), key=key) for each, key in zip(choices, keys, strict=True))
        return ChoiceUnit(*common, items, settings.monte_carlo(published.likelihood if published else None))


def read_windows(settings: EvaluationSettings, source: str, length: int, tokenizer: Any) -> torch.Tensor:
    """Windows of a text drawn at random, without overlap: (N, length) int64, N at most `settings.windows`.

    Raises:
        UserError: text that cannot be read, or is shorter than one window.
    """
    split = settings.split
    if not split:
        files = ALIASES.get(source, {}).get("data_files", ("test",))
        held_out = next(name for name in files if name != "train")
        split = "train" if Path(source).suffix.lower() in LOCAL else held_out
    documents = read_texts(source, settings.subset, split, settings.column, "evaluation")
    limit = settings.windows * length * SURPLUS if is_streamed(source) else LONGEST
    ids = tokenize_corpus(join_texts(documents, source, tokenizer, "evaluation"), tokenizer, limit)  # (M,)
    if len(ids) < length:
        raise UserError(
            f"the text '{source}' has {len(ids)} tokens, less than one window of {length}: give longer text"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    return cut_windows(ids, min(settings.windows, len(ids) // length), length, generator)  # (N, T)


def _presets(tasks: Sequence[str]) -> dict[str, Preset]:
    """The presets among the tasks, by file name; lm-eval's task files have other keys."""
    presets = {}
    for name in tasks:
        path = Path(name)
        if path.suffix.lower() not in (".yaml", ".yml"):
            continue
        if not path.is_file():
            raise UserError(f"no file of a task at '{name}': give one such as configs/eval/piqa.yaml")
        with suppress(ValueError):  # lm-eval's have tags of their own
            if is_preset(read_yaml(path, "file of a task")):
                presets[name] = load_preset(path)
    return presets


def _published(task: str, preset: Preset | None, family: Family) -> FamilyPreset | None:
    """The settings of a task for a family: those of its file, else the published ones, if any."""
    local = parse_local(task)
    preset = preset or PRESETS.get(local.task if local else task)
    return None if preset is None else preset.settings_of(family)


def _with_warnings(subject: Subject, chat: bool) -> Subject:
    """The subject with warnings: chat templates that do not fit, and text that it was calibrated or trained on."""
    warnings = []
    if subject.texts is not None:
        names = model_names(source_name(subject.checkpoint, subject.directory), subject.directory)
        if warning := chat_warning(names, bool(subject.tokenizer.chat_template), chat):
            warnings.append(warning)
    seen = {"trained": KnownText(read_learnt(subject.directory))}
    path = subject.directory / "calibration.safetensors"
    if path.is_file():
        seen = {"calibrated": CalibratedOn(Calibration.load(path).input_ids), **seen}
    for how, text in seen.items():
        for unit in subject.units:
            if share := text.share(unit.token_ids()):
                warnings.append(
                    f"{subject.label} was {how} on text that {share:.0%} of the items of {unit.task} hold: "
                    "its figures there flatter it"
                )
    return replace(subject, warnings=tuple(warnings))
