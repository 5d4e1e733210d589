"""What an evaluation is asked to do, made ready before any weight is read: tokenizers, windows, items, warnings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from structprune.calibration.batches import Calibration
from structprune.calibration.build import LONGEST, SURPLUS, check_vocabulary
from structprune.calibration.noise import stratified_noise
from structprune.calibration.text import ALIASES, LOCAL, is_streamed, join_texts, read_texts
from structprune.calibration.windows import cut_windows, tokenize_corpus
from structprune.config.effects import refuse_idle
from structprune.errors import UserError
from structprune.evaluation.choices import check_items
from structprune.evaluation.documents import Task
from structprune.evaluation.labels import checkpoint_labels
from structprune.evaluation.lm_tasks import LmTask
from structprune.evaluation.openings import check_openings
from structprune.evaluation.overlap import CalibratedOn
from structprune.evaluation.presets import PRESETS, FamilyPreset, Preset, is_preset, load_preset
from structprune.evaluation.requests import overlay, to_item
from structprune.evaluation.settings import EvaluationConfig, EvaluationSettings
from structprune.evaluation.tasks import open_tasks, parse_local
from structprune.evaluation.texts import Texts, chat_warning, model_names
from structprune.evaluation.units import (
    ChoiceUnit,
    GenerationUnit,
    TextUnit,
    Unit,
    document_keys,
    is_generation,
)
from structprune.models.checkpoint_files import TOKENIZER_FILES
from structprune.models.families import Family
from structprune.models.loading import load_config, load_tokenizer, source_name

WINDOW = 512  # tokens of a window, where the model has so many positions


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is to be evaluated.

    Attributes:
        label: its name in tables and files.
        checkpoint: as it was given.
        config: our configuration of its model.
        tokenizer: of transformers.
        texts: how tasks use it; None where only text is evaluated.
        units: what is evaluated on it.
        warnings: what its user should know, a line each.
    """

    label: str
    checkpoint: str
    directory: Path
    family: Family
    config: Any
    tokenizer: Any
    texts: Texts | None
    units: tuple[Unit, ...] = ()
    warnings: tuple[str, ...] = ()


def check_request(config: EvaluationConfig) -> None:
    """Raise UserError for settings that say nothing to evaluate, or that would be ignored."""
    settings = config.evaluation
    if settings.source is None and not settings.tasks:
        raise UserError("nothing to evaluate: give --text FILE, --tasks LIST (such as piqa:FILE.jsonl), or both")
    of_text = ("subset", "split", "column", "windows", "length", "noise")
    of_tasks = ("limit", "shots", "chat", "samples", "block", "cfg_scale", "sampling", "adaptive", "skip_empty",
                "generation", "fewshot_seed", "include", "prompts")  # fmt: skip
    idle = (
        ("evaluation", of_text, settings.source is None, "a text (--text)"),
        ("evaluation", of_tasks, not settings.tasks, "tasks (--tasks)"),
        ("evaluation", ("confidence",), not settings.adaptive, "evaluation.adaptive = true (--adaptive)"),
    )
    refuse_idle(config, idle)


def prepare(checkpoints: Sequence[str], config: EvaluationConfig) -> list[Subject]:
    """Every checkpoint with its units; reads configurations, tokenizers and texts only.

    Raises:
        UserError: anything that cannot be evaluated, in one line.
    """
    check_request(config)
    model = config.model
    subjects = []
    for label, checkpoint in zip(checkpoint_labels(checkpoints), checkpoints):
        directory, family, own, _ = load_config(checkpoint, model.mask_id, allow_pickle=model.allow_pickle)
        tokenizer, tasks = load_tokenizer(directory), config.evaluation.tasks
        texts = Texts.of(tokenizer, family.text_edges, config.evaluation.chat) if tasks else None
        subjects.append(Subject(label, checkpoint, directory, family, own, tokenizer, texts))
    makers = _Makers(config.evaluation, subjects)
    complete = [makers.complete(subject) for subject in subjects]
    _check_used(config, [unit for subject in complete for unit in subject.units])
    return [_with_warnings(subject, config.evaluation.chat) for subject in complete]


def _check_used(config: EvaluationConfig, units: Sequence[Unit]) -> None:
    """Raise UserError for settings that none of the units looks at."""
    choices, generation = (any(isinstance(unit, kind) for unit in units) for kind in (ChoiceUnit, GenerationUnit))
    theirs = any(isinstance(task, LmTask) for unit in units for task in getattr(unit, "members", ()))
    scoring = ("samples", "block", "cfg_scale", "sampling", "adaptive", "skip_empty")
    of_passes = choices or config.evaluation.source is not None
    idle = (
        (
            "evaluation",
            scoring,
            not choices,
            "a task with answers to choose from (guidance of generation: generation.cfg_scale)",
        ),
        ("evaluation", ("generation", "prompts"), not generation, "a task that is answered by generation"),
        ("evaluation", ("include", "fewshot_seed"), not theirs, "a task of lm-eval"),
        ("evaluation", ("batch",), not of_passes, "a text or a task with answers to choose from"),
    )
    refuse_idle(config, idle)


class _Makers:
    """Units of subjects; what subjects with one tokenizer have in common is made once."""

    def __init__(self, settings: EvaluationSettings, subjects: Sequence[Subject]):
        self.settings, self.presets = settings, _presets(settings.tasks)
        positions = [getattr(each.config, each.family.keys["positions"]) for each in subjects]
        self.length = settings.length or min(WINDOW, *positions)
        for subject, own in zip(subjects, positions):
            if settings.source is not None and self.length > own:
                raise UserError(
                    f"evaluation.length = {self.length} exceeds the {own} positions of {subject.label}: lower it"
                )
        self._made: dict[tuple, Any] = {}

    def complete(self, subject: Subject) -> Subject:
        """The subject with its units, checked against its model."""
        units: list[Unit] = []
        if self.settings.source is not None:
            units.append(self._text(subject))
        if self.settings.tasks:
            units += self._once("tasks", subject, lambda: self._tasks(subject))
        vocabulary = getattr(subject.config, subject.family.keys["vocabulary"])
        for unit in units:
            if isinstance(unit, ChoiceUnit):
                check_items(subject.config, unit.items, unit.monte_carlo)
            if isinstance(unit, GenerationUnit):
                check_openings(subject.config, unit.openings, subject.texts, unit.options)
            if not isinstance(unit, TextUnit):
                unit.check_metrics()
            for ids in unit.token_ids():
                check_vocabulary(ids, vocabulary, unit.task)
        return replace(subject, units=tuple(units))

    def _once(self, kind: str, subject: Subject, make) -> Any:
        paths = [subject.directory / name for name in TOKENIZER_FILES]
        key = (kind, subject.family.name, *(path.read_bytes() if path.is_file() else None for path in paths))
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _text(self, subject: Subject) -> TextUnit:
        settings, edges = self.settings, subject.family.model_class.edges_visible
        windows = self._once("text", subject, lambda: read_windows(settings, self.length, subject.tokenizer))
        mask_id = subject.config.mask_token_id
        if (windows == mask_id).any():
            raise UserError(
                f"the text '{settings.source}' holds the mask token {mask_id} of {subject.label}: remove it"
            )

        def noise(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            return stratified_noise(ids, mask_id, generator, settings.noise, edges)

        name = Path(settings.source).name
        return TextUnit(name, windows, settings.noise, settings.seed, noise)

    def _tasks(self, subject: Subject) -> list[Unit]:
        """Units of tasks; the members of a group are one."""
        settings, units = self.settings, []
        for name in settings.tasks:
            preset = self.presets.get(name)
            asked = name if preset is None else preset.task
            published = _published(asked, preset, subject.family)
            shots = published.shots if settings.shots is None and preset is not None else settings.shots
            arguments = (shots, settings.limit, settings.fewshot_seed, settings.include)
            members = open_tasks([asked], subject.family, subject.texts, *arguments)
            task = members[0].name if len(members) == 1 else asked
            if task in (unit.task for unit in units):
                raise UserError(f"the task '{task}' is named twice: leave one out")
            units.append(self._unit(task, members, published, shots, subject))
        return units

    def _unit(self, task: str, members: Sequence[Task], published: FamilyPreset | None, shots, subject: Subject):
        pairs = tuple((member, document) for member in members for document in member.documents)
        if not pairs:
            raise UserError(f"the task '{task}' has no document")
        documents = [document for _, document in pairs]
        common = (task, tuple(members), pairs, document_keys(documents), shots)
        settings, texts = self.settings, subject.texts
        if is_generation(documents):
            given = overlay(published.generation or {} if published else {}, settings.generation)
            return GenerationUnit(*common, texts, given, settings.seed, settings.prompts)
        items = tuple(replace(to_item(each, texts), key=key) for each, key in zip(documents, common[3]))
        return ChoiceUnit(*common, items, settings.monte_carlo(published.likelihood if published else None))


def read_windows(settings: EvaluationSettings, length: int, tokenizer) -> torch.Tensor:
    """Windows drawn at random, without overlap: (N, length) int64, N at most `settings.windows`.

    Raises:
        UserError: text that cannot be read, or is shorter than one window.
    """
    source = settings.source
    split = settings.split or ("train" if Path(source).suffix.lower() in LOCAL else _test_split(source))
    documents = read_texts(source, settings.subset, split, settings.column, "evaluation")
    wanted = settings.windows * length
    limit = wanted * SURPLUS if is_streamed(source) else LONGEST
    ids = tokenize_corpus(join_texts(documents, source, tokenizer, "evaluation"), tokenizer, limit)  # (M,)
    if len(ids) < length:
        raise UserError(
            f"the text '{source}' has {len(ids)} tokens, less than one window of {length}: give longer text"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    return cut_windows(ids, min(settings.windows, len(ids) // length), length, generator)  # (N, T)


def _test_split(source: str) -> str:
    files = ALIASES[source].files if source in ALIASES else None
    return "test" if files is None else next(split for split in files if split != "train")


def _presets(tasks: Sequence[str]) -> dict[str, Preset]:
    """Settings of the tasks that are given as files of ours; lm-eval's task files are told apart by their keys."""
    found = {}
    for name in tasks:
        path = Path(name)
        if path.suffix.lower() in (".yaml", ".yml"):
            if not path.is_file():
                raise UserError(f"no file of a task at '{name}': give one such as configs/eval/piqa.yaml")
            try:
                values = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                continue  # lm-eval's have tags of their own
            if is_preset(values):
                found[name] = load_preset(path)
    return found


def _published(task: str, preset: Preset | None, family: Family) -> FamilyPreset | None:
    """The settings of a task for a family: its file's, else the published ones, if any."""
    local = parse_local(task)
    preset = preset or PRESETS.get(local.task if local else task)
    return None if preset is None else preset.settings_of(family)


def _with_warnings(subject: Subject, chat: bool) -> Subject:
    """Chat templates that do not fit, and text that the checkpoint was calibrated on."""
    warnings = []
    if subject.texts is not None:
        names = model_names(source_name(subject.checkpoint, subject.directory), subject.directory)
        if warning := chat_warning(names, bool(subject.tokenizer.chat_template), chat):
            warnings.append(warning)
    path = subject.directory / "calibration.safetensors"
    if path.is_file():
        known = CalibratedOn(Calibration.load(path).input_ids)
        for unit in subject.units:
            if share := known.share(unit.token_ids()):
                warnings.append(
                    f"{subject.label} was calibrated on text that {share:.0%} of the items of {unit.task} hold: "
                    "its figures there flatter it"
                )
    return replace(subject, warnings=tuple(warnings))
