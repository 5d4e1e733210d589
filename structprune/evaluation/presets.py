"""Published settings of the nine tasks, for LLaDA and for Dream (docs/methods.md section 6), from configs/eval/*.yaml.

Sources: the evaluation scripts of arXiv 2502.09992 (LLaDA) and arXiv 2508.15487 (Dream); the files say what these
leave open.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from structprune.assets import preset_directory
from structprune.config import Section
from structprune.config.yaml_files import read_yaml
from structprune.errors import UserError, nearest
from structprune.generation.samplers import SAMPLERS
from structprune.models.families import FAMILIES, Family


class Likelihood(Section):
    """How answers are scored."""

    samples: int = Field(default=128, ge=1)
    """Monte Carlo samples per answer."""
    block: int = Field(default=8, ge=1)
    """Samples whose numbers of masks are drawn together (LLaDA), and whose mean is one value for standard errors."""
    cfg_scale: float = Field(default=0.0, ge=0)
    """Scale of classifier-free guidance; 0 is off."""


class FamilyPreset(Section):
    """A task's settings for one family: either `likelihood` or options of its sampler, `generation`."""

    shots: int = Field(ge=0)
    likelihood: Likelihood | None = None
    generation: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_of_both(self):
        if (self.likelihood is None) == (self.generation is None):
            raise PydanticCustomError("kind", "Give either likelihood or generation")
        return self


class Preset(Section):
    """One task's published settings: a field for each family that has published any (`Family.published`)."""

    task: str
    llada: FamilyPreset
    dream: FamilyPreset

    def settings_of(self, family: Family) -> FamilyPreset | None:
        """What is published for a family, if anything."""
        return getattr(self, family.published) if family.published in SIDES else None

    @model_validator(mode="after")
    def _samplers_take_them(self):
        samplers = {family.published: SAMPLERS[family.sampler] for family in reversed(FAMILIES)}  # the first one counts
        for name in SIDES:
            if (values := getattr(self, name).generation) is not None:
                try:
                    samplers[name](**values)
                except (TypeError, UserError) as error:
                    raise PydanticCustomError(
                        "sampler", "{name}.generation: {why}", {"name": name, "why": str(error)}
                    ) from error
        return self


SIDES = [name for name, field in Preset.model_fields.items() if field.annotation is FamilyPreset]


def preset_for(task: str, family: Family) -> FamilyPreset | None:
    """A task's published settings for a family; None where there are none."""
    return PRESETS[task].settings_of(family) if task in PRESETS else None


def is_preset(values: Any) -> bool:
    """Whether the contents of a YAML file are a `Preset`: it names a family, which lm-eval's task files do not."""
    return isinstance(values, dict) and not values.keys().isdisjoint(SIDES)


def load_preset(path: str | Path) -> Preset:
    """Read settings from a file such as configs/eval/piqa.yaml.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one), or a value out of range.
    """
    values = read_yaml(path, "file of evaluation settings")
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a mapping: give {', '.join(Preset.model_fields)}")
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        misspelt = [problem for problem in problems if problem["type"] == "extra_forbidden"]  # often causes the others
        raise UserError(f"{path}: {_explain((misspelt or problems)[0])}") from error


def _explain(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        parts = problem["loc"]
        sections: dict[Any, type[Section]] = dict.fromkeys(SIDES, FamilyPreset) | {"likelihood": Likelihood}
        section = sections[parts[-2]] if len(parts) > 1 else Preset
        return f"unknown key '{name}'{nearest(str(parts[-1]), list(section.model_fields))}"
    if problem["type"] == "missing":
        return f"the key '{name}' is missing"
    return f"{name + ': ' if name else ''}{problem['msg'][0].lower()}{problem['msg'][1:]}"


PRESETS = {preset.task: preset for preset in map(load_preset, sorted(preset_directory().glob("*.yaml")))}
