"""Published methods, the recipe and a search on one calibration and budget: what they lose, and what generation keeps.

FLAP, Wanda-sp and LLM-Pruner's Taylor score as published; a greedy refit, as OSSCAR and SlimGPT do it: units go one
after another by their error and what stays is solved for in closed form, with no choice measured on predictions; and
the whole refit without and with a search. All variants of a seed share calibration rows, windows, noise and openings.
Intervals are over seeds (see studies.py). An interrupted study continues where it stopped.

    python -m scripts.studies.baseline_study --out scripts/results/baselines.json
"""

import sys
from functools import lru_cache, partial
from pathlib import Path

import torch
from rich.table import Table

from scripts.studies.checkpoint_study import calibration_of, dense_model, section_keys
from scripts.studies.checkpoint_texts import Continued, HeldOutText, Subject, facts, subject_of
from scripts.studies.checkpoint_variants import BASE, equal
from scripts.studies.factor_study import HEAD, MANY, PRODUCERS, VISIBLE
from scripts.studies.search_study import SEARCH
from scripts.studies.studies import Study, cell, parse_options, run_study, study_parser
from scripts.studies.summaries import rows_and_gaps
from scripts.tools.script_line import one_line
from structprune.assets import model_directory, text_file
from structprune.config import Config
from structprune.runs.demo import METHODS
from structprune.runs.pruner import Pruner

RATIOS = ["0.3", "0.5", "0.7"]
GREEDY = "greedy refit (as OSSCAR, SlimGPT)"
RECIPE, SEARCHED = "whole refit", "whole refit, search"
SIZE = {"calibration.held_out": 40}
# the published number of heads against channels where a method has one; by cost where it ranks both
VARIANTS = {
    "LLM-Pruner (Taylor)": equal("taylor") | SIZE,
    "Wanda-sp": equal("wanda") | SIZE,
    "FLAP": MANY | METHODS["FLAP"],
    GREEDY: MANY | {"structured.split": "joint"},
    RECIPE: MANY | PRODUCERS | HEAD | VISIBLE,
    SEARCHED: MANY | PRODUCERS | HEAD | VISIBLE | SEARCH | {"search.method": "knapsack"},
}
CONTRASTS = [*((name, RECIPE) for name in VARIANTS if name not in (RECIPE, SEARCHED)), (SEARCHED, RECIPE)]
FIGURES = ("kl", "agreement", "tokens_kept", "generated_nelbo")


@lru_cache(maxsize=1)
def yardstick(subject: Subject, seed: int) -> tuple[HeldOutText, Continued]:
    """The windows of a seed with the dense model's predictions, and its continuations of their openings."""
    model = dense_model(subject.checkpoint)
    windows = subject.cut(subject.texts[0][1], model, seed)
    return HeldOutText(model, *windows), Continued(model, windows[0], seed)


def measure(name: str, seed: int, subject: Subject, threads: int) -> dict:
    """One variant at one seed: for each ratio loss, fidelity and what generation keeps."""
    torch.set_num_threads(threads)
    keys = BASE | subject.keys | {"calibration.seed": seed} | VARIANTS[name]
    calibration = calibration_of(subject, section_keys(keys, "calibration."))
    pruner = Pruner(dense_model(subject.checkpoint), Config.load(overrides=keys), calibration)
    held_out, continued = yardstick(subject, seed)
    results = {}
    for ratio in RATIOS:
        pruned = pruner.prune(float(ratio))
        results[ratio] = {
            **held_out.compare(pruned.model), **continued.compare(pruned.model),
            "heads": sum(pruned.report["choice"]["attention"]),
            "kept": (pruned.report["search"] or {"kept": None})["kept"],
            "seconds": pruned.report["seconds"]["total"],
        }  # fmt: skip
    dense = held_out.dense | {"generated_nelbo": continued.dense_nelbo}
    return {"variant": name, "seed": seed, "dense": dense, "ratios": results}


def summarise(runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, as plain data."""
    dense = [runs[RECIPE, seed]["dense"] for seed in seeds]
    return rows_and_gaps(VARIANTS, CONTRASTS, RATIOS, runs, seeds) | {"dense": dense}


def tables(result: dict) -> list[Table]:
    """For each ratio what every variant loses and keeps."""
    return [_table(result, ratio) for ratio in RATIOS]


def _table(result: dict, ratio: str) -> Table:
    table = Table(title=f"At {ratio}: loss of NELBO, nats per token [95% interval over seeds], and fidelity")
    for title in ("variant", "loss", "KL", "agreement", "tokens kept", "NELBO of generated"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for row in (row for row in result["losses"] if row["ratio"] == ratio):
        kl, agreement, kept, nelbo = (sum(row[key]) / len(row[key]) for key in FIGURES)
        table.add_row(
            row["variant"], cell(row), f"{kl:.3f}", f"{100 * agreement:.1f} %", f"{100 * kept:.1f} %", f"{nelbo:.2f}"
        )
    return table


STUDY = Study(
    "baseline_study", __doc__.splitlines()[0], "scripts/results/baselines.json", BASE, RATIOS, VARIANTS, measure,
    summarise, tables, 130,
)  # fmt: skip


def run(arguments: list[str] | None) -> None:
    """Run, resume or summarise the study that the arguments describe."""
    parser = study_parser(STUDY)
    parser.add_argument("--checkpoint", type=Path, default=model_directory(), help="default: the embedded model")
    parser.add_argument("--name", default="embedded model", help="of the model in tables (default %(default)s)")
    parser.add_argument("--text", type=Path, default=text_file("calibration.txt"), help="calibration text")
    held_out = f"held-out={text_file('heldout.txt')}"
    parser.add_argument("--eval", nargs=1, default=[held_out], metavar="NAME=FILE", help="evaluation text")
    parser.set_defaults(windows=96, jobs=1)
    options = parse_options(parser, arguments)
    subject = subject_of(options)
    run_study(STUDY, options, (subject,), facts(subject, options.name, BASE))


def main(arguments: list[str] | None = None) -> int:
    return one_line(STUDY.name, partial(run, arguments))


if __name__ == "__main__":
    sys.exit(main())
