"""Fill the tables of README.md and docs/ between their markers, from scripts/results and the configuration models.

python -m scripts.readme.readme_tables          # rewrite the pages
python -m scripts.readme.readme_tables --check  # exit 1 where a page differs from what it is made of
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from scripts.readme.readme_after import exports, gguf, packed, quantised
from scripts.readme.readme_baselines import baselines
from scripts.readme.readme_bench import bench, decoding, note, widths, widths_note
from scripts.readme.readme_checkpoint import checkpoint, kept_heads
from scripts.readme.readme_costs import cost, offload, processes, rehearsal, speed
from scripts.readme.readme_evaluation import evaluation, evaluation_speed
from scripts.readme.readme_gpu import gpu
from scripts.readme.readme_keys import keys
from scripts.readme.readme_sinks import sinks
from scripts.readme.readme_studies import classes, demo, factors, masks, quality, search, weightings
from scripts.readme.readme_trainings import checkpoint_trainings, gradual, kills, plans, recipe, trainings
from structprune.config import Config, Sections
from structprune.evaluation.settings import EvaluationConfig
from structprune.generation.settings import GenerateConfig
from structprune.recovery.settings import RecoverConfig

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "results"
Makers = dict[str, Callable[[], str]]  # marker -> what makes the text between it and its end


def load(name: str) -> dict:
    """A file of scripts/results, read."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def made_of(make: Callable[..., str], *names: str) -> Callable[[], str]:
    """What makes a section from files of scripts/results."""
    return lambda: make(*map(load, names))


def key_sections(config: Sections, *names: str) -> Makers:
    """`keys-SECTION` -> the table of that section's keys.

    Args:
        config: with the defaults of all sections.
    """
    return {f"keys-{name}": partial(keys, name, type(getattr(config, name))) for name in names}


PAGES: dict[str, Makers] = {
    "README.md": {"demo": made_of(demo, "demo")},
    "docs/results.md": {
        "quality": made_of(quality, "quality"),
        "factors": made_of(factors, "factors"),
        "search": made_of(search, "search"),
        "weightings": made_of(weightings, "weightings"),
        "baselines": made_of(baselines, "baselines"),
        "classes": made_of(classes, "class"),
        "recovery": made_of(trainings, "recovery"),
        "recipe": made_of(recipe, "recipe"),
        "gradual": made_of(gradual, "gradual"),
        "checkpoint": made_of(checkpoint, "checkpoint"),
        "checkpoint-kept": made_of(kept_heads, "checkpoint_kept", "checkpoint"),
        "checkpoint-recovery": made_of(checkpoint_trainings, "checkpoint_recovery"),
        "checkpoint-recovery-1m": made_of(
            partial(checkpoint_trainings, file="checkpoint_recovery_1m"), "checkpoint_recovery_1m"
        ),
        "checkpoint-factors": made_of(checkpoint, "checkpoint_factors"),
        "masks": made_of(masks, "masks"),
        "speed": made_of(speed, "masking_speed"),
        "sinks": made_of(sinks, "sinks_embedded", "sinks_smollm2", "sinks_untrained", "sinks_cost"),
        "evaluation": made_of(evaluation, "evaluation"),
        "evaluation-speed": made_of(evaluation_speed, "evaluation_speed"),
        "bench": made_of(lambda results: f"{bench(results)}\n\n{note(results)}", "bench_cpu"),
        "widths": made_of(lambda results: f"{widths(results)}\n\n{widths_note(results)}", "widths"),
        "gpu": lambda: gpu(RESULTS),
        "cost": made_of(cost, "inspect", "search_cost", "attention_mass"),
    },
    "docs/pruning.md": {
        "kills": made_of(kills, "kills"),
        "rehearsal": made_of(rehearsal, "rehearsal"),
        "offload": made_of(offload, "offload"),
        "processes": made_of(processes, "processes"),
        **key_sections(
            Config(), "model", "calibration", "structured", "sink", "reconstruct", "search", "export", "memory"
        ),
    },
    "docs/masks.md": key_sections(Config(), "masking"),
    "docs/recovery.md": {
        "recovery-plan": made_of(plans, "recovery_plan"),
        **key_sections(RecoverConfig(), "data", "teacher", "loss", "blocks", "train"),
    },
    "docs/generation.md": {
        "decoding": made_of(decoding, "decoding"),
        **key_sections(GenerateConfig(), "generation"),
    },
    "docs/evaluation.md": key_sections(EvaluationConfig(), "evaluation"),
    "docs/after-pruning.md": {
        "exports": made_of(exports, "exports"),
        "packed": made_of(packed, "packed"),
        "gguf": made_of(gguf, "gguf"),
        "quantised": made_of(quantised, "quantised"),
    },
}


def filled(text: str, page: str, sections: Makers) -> str:
    """A page with the text between its markers made anew.

    Args:
        page: its path from the root; links are written as from the root and made to lead there from the page.
    Raises:
        SystemExit: a section without markers, or markers without a section.
    """
    if unknown := set(re.findall(r"^<!-- ([\w-]+) -->$", text, re.MULTILINE)) - set(sections):
        raise SystemExit(f"{page} marks '{min(unknown)}', which nothing makes: add it to PAGES, or remove the markers")
    for name, make in sections.items():
        pattern = re.compile(rf"(^<!-- {name} -->\n).*?(^<!-- /{name} -->$)", re.DOTALL | re.MULTILINE)
        place = pattern.search(text)
        if place is None:
            raise SystemExit(f"{page} has no section marked '{name}'")
        made = make().replace("](scripts/", f"]({'../' * page.count('/')}scripts/")
        text = f"{text[: place.end(1)]}\n{made}\n\n{text[place.start(2) :]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where it would")
    options = parser.parse_args()
    before = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    after = {page: filled(before[page], page, sections) for page, sections in PAGES.items()}
    changed = [page for page in PAGES if after[page] != before[page]]
    if options.check and changed:
        sys.exit(f"{', '.join(changed)} out of date: run python -m scripts.readme.readme_tables")
    for page in changed:
        (ROOT / page).write_text(after[page], encoding="utf-8")
        print(f"Wrote {page}")


if __name__ == "__main__":
    main()
