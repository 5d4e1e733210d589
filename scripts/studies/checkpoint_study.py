"""The recipe on a checkpoint of your own beside other methods, or its choices one at a time: loss and generation.

Methods: a joint ranking of heads and channels with a greedy refit, the whole refit, sink weights in its scores, and a
search for widths; beside them FLAP, Wanda-sp and LLM-Pruner's Taylor score on the same calibration rows. With --factors
one choice of calibration and refit at a time, with every head kept, so that heads against channels decide nothing. All
variants of a seed share calibration text, evaluation windows and noise, so that differences are paired; variants that
score alike share the scores. Intervals are over seeds (see studies.py). An interrupted study continues where it
stopped, and --summary writes what its whole seeds show.

    python -m scripts.studies.checkpoint_study --checkpoint DIR --text FILE --eval NAME=FILE --eval NAME=FILE
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch

from scripts.studies.checkpoint_tables import GENERATION, tables
from scripts.studies.checkpoint_texts import Continued, HeldOutText, Subject, facts, subject_of
from scripts.studies.checkpoint_variants import (
    BASE,
    CONTRASTS,
    FACTOR_CONTRASTS,
    FACTORS,
    GENERATED,
    GENERATING,
    KEPT,
    KEPT_RATIOS,
    OPENINGS,
    RATIOS,
    SEARCHING,
    VARIANTS,
)
from scripts.studies.studies import (
    Study,
    contrast_row,
    loss_row,
    parse_options,
    run_study,
    study_parser,
)
from scripts.tools.script_line import one_line
from structprune.bench.peak import peak_above
from structprune.calibration.batches import Calibration
from structprune.calibration.build import calibrate
from structprune.config import Config
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.runs.pruned import Pruned
from structprune.runs.pruner import Pruner
from structprune.structured.plan import Plan

ALL = FACTORS | VARIANTS | KEPT
Keys = tuple[tuple[str, object], ...]  # configuration keys that can be a key of a cache


@lru_cache(maxsize=1)
def dense_model(checkpoint: Path) -> DiffusionLM:
    """The model that every variant prunes and none changes."""
    return load_model(checkpoint, device="cpu")


@lru_cache(maxsize=2)
def calibration_of(subject: Subject, keys: Keys) -> Calibration:
    """The calibration of a seed and size, which its variants share."""
    return calibrate(dense_model(subject.checkpoint), Config.load(overrides=dict(keys)))


@lru_cache(maxsize=1)
def held_out_texts(subject: Subject, seed: int) -> dict[str, HeldOutText]:
    """The evaluation texts of a seed, with the dense model's predictions."""
    model = dense_model(subject.checkpoint)
    windows = {name: subject.cut(path, model, seed) for name, path in subject.texts}  # all, before any is predicted
    return {name: HeldOutText(model, *each) for name, each in windows.items()}


@lru_cache(maxsize=1)
def continued(subject: Subject, seed: int) -> Continued:
    """The dense model's continuations of openings of the first evaluation text."""
    model = dense_model(subject.checkpoint)
    return Continued(model, subject.cut(subject.texts[0][1], model, seed)[0], seed, OPENINGS, GENERATED)


@lru_cache(maxsize=len(ALL))
def plans_of(subject: Subject, keys: Keys) -> tuple[dict[str, Plan], float, int | None]:
    """The plan of every ratio, from scores that variants with these keys share; seconds and peak bytes."""
    calibration = calibration_of(subject, section_keys(dict(keys), "calibration."))
    pruner = Pruner(dense_model(subject.checkpoint), Config.load(overrides=dict(keys)), calibration)
    return clocked(lambda: {ratio: pruner.plan(float(ratio))[0] for ratio in RATIOS})


def clocked(work: Callable) -> tuple:
    """What `work` returns, its seconds, and the bytes that it needs above those in use before."""
    results: list = []
    start = time.perf_counter()
    peak = peak_above(lambda: results.append(work()), torch.device("cpu"))
    return results[0], time.perf_counter() - start, peak


def section_keys(keys: dict, *sections: str) -> Keys:
    """The keys of some sections, in order."""
    return tuple(sorted((key, value) for key, value in keys.items() if key.startswith(sections)))


def measure(name: str, seed: int, subject: Subject, threads: int) -> dict:
    """One variant at one seed: for each ratio and text loss and fidelity, and what the run took."""
    torch.set_num_threads(threads)
    keys = BASE | subject.keys | {"calibration.seed": seed} | ALL[name]
    model, calibration = dense_model(subject.checkpoint), calibration_of(subject, section_keys(keys, "calibration."))
    texts = held_out_texts(subject, seed)
    config, results = Config.load(overrides=keys), {}
    pruner = Pruner(model, config, calibration)
    plans, *scoring = (
        # a search changes a plan; it scores for itself
        ({}, 0.0, None) if name in SEARCHING else plans_of(subject, section_keys(keys, "calibration.", "structured."))
    )
    for ratio in KEPT_RATIOS if name in KEPT else RATIOS:
        plan = plans.get(ratio)
        if subject.levels and name in SEARCHING:  # a directory each, as levels of another ratio would be shared
            pruner = Pruner(
                model,
                config,
                calibration,
                levels=subject.levels / f"seed-{seed}" / f"{ratio}{'-kept' * (name in KEPT)}",
            )
        pruned, *rest = clocked(partial(pruner.prune, None if plan else float(ratio), plan))
        measured = {text: held_out.compare(pruned.model) for text, held_out in texts.items()}
        results[ratio] = {"texts": measured, **_account(pruned, model), **_costs(scoring, rest)}
        if name in GENERATING:
            results[ratio]["generation"] = continued(subject, seed).compare(pruned.model)
    dense = {text: held_out.dense for text, held_out in texts.items()}
    row = {"variant": name, "seed": seed, "dense": dense, "ratios": results}
    return row | ({"generated_nelbo": continued(subject, seed).dense_nelbo} if name in GENERATING else {})


def _account(pruned: Pruned, model: DiffusionLM) -> dict:
    """What went, and whether the refit was kept."""
    heads = sum(block.widths.query_heads for block in Adapter(model).blocks)
    return {
        "heads_removed": heads - sum(len(block.query_heads) for block in pruned.plan.blocks),
        "ratio_met": pruned.report["ratio"],
        "kept": pruned.report["held_out_nelbo"]["kept"],
        "searched": (pruned.report["search"] or {"kept": None})["kept"],
    }


def _costs(scoring: list, rest: list) -> dict:
    """Seconds of scores, which ratios and variants share, and of what came after; peak bytes above the dense model."""
    (score_seconds, score_peak), (seconds, peak) = scoring, rest
    peaks = [each for each in (score_peak, peak) if each is not None]
    return {"seconds": {"scores": score_seconds, "rest": seconds}, "peak_bytes": max(peaks, default=None)}


def of_text(runs: dict, text: str) -> dict:
    """The runs as `loss_row` and `contrast_row` read them, with the losses on one text."""
    return {
        key: {"ratios": {ratio: each["texts"][text] for ratio, each in run["ratios"].items()}}
        for key, run in runs.items()
    }


def summarise(variants: dict, contrasts: list[tuple[str, str]], runs: dict, seeds: list[int]) -> dict:
    """Mean losses and paired contrasts with 95% intervals over seeds, per text and ratio, as plain data.

    Args:
        variants, contrasts: of the study. runs: (variant, seed) -> its row.
    """
    first = runs[next(iter(variants)), seeds[0]]
    rows, gaps, ratios = [], [], sorted(first["ratios"])
    for text in first["dense"]:
        views = of_text(runs, text)
        for ratio in ratios:
            for name in variants:
                results = [runs[name, seed]["ratios"][ratio] for seed in seeds]
                lists = {key: [each[key] for each in results] for key in results[0] if key != "texts"}
                lists |= {key: [each["texts"][text][key] for each in results] for key in ("kl", "agreement")}
                place = {"variant": name, "text": text, "ratio": ratio}
                rows.append(place | loss_row(views, name, seeds, ratio) | lists)
            for name, base in contrasts:
                gap = contrast_row(views, (name, ratio), (base, ratio), seeds)
                gaps.append({"variant": name, "against": base, "text": text, "ratio": ratio, **gap})
    dense = {text: [runs[first["variant"], seed]["dense"][text] for seed in seeds] for text in first["dense"]}
    result = {"losses": rows, "contrasts": gaps, "dense": dense, "first": next(iter(first["ratios"]))}
    generating = [name for name in variants if "generated_nelbo" in runs[name, seeds[0]]]
    return result | ({"generation": generation_rows(generating, runs, seeds)} if generating else {})


def generation_rows(names: list[str], runs: dict, seeds: list[int]) -> dict:
    """Of every variant that generates, `GENERATION` per ratio over seeds; the dense model's own NELBO; and sizes."""
    rows = [
        {"variant": name, "ratio": ratio}
        | {key: [runs[name, seed]["ratios"][ratio]["generation"][key] for seed in seeds] for key in GENERATION}
        for ratio in sorted(runs[names[0], seeds[0]]["ratios"])
        for name in names
    ]
    dense = [runs[names[0], seed]["generated_nelbo"] for seed in seeds]
    return {"rows": rows, "dense": dense, "openings": OPENINGS, "tokens": GENERATED}


def study_of(
    variants: dict, contrasts: list[tuple[str, str]], out: str, ratios: tuple[str, ...] = RATIOS
) -> Study:  # fmt: skip
    """The study of some variants, with the default of --out."""
    return Study(
        "checkpoint_study", __doc__.splitlines()[0], out, BASE, list(ratios), variants,
        measure, partial(summarise, variants, contrasts), tables, 190,
    )  # fmt: skip


STUDY = study_of(VARIANTS, CONTRASTS, "scripts/results/checkpoint.json")
KEPT_STUDY = study_of(KEPT, [], "scripts/results/checkpoint_kept.json", KEPT_RATIOS)
FACTOR_STUDY = study_of(FACTORS, FACTOR_CONTRASTS, "scripts/results/checkpoint_factors.json")


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    """The options of this study, checked."""
    parser = study_parser(STUDY)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of the dense model")
    parser.add_argument("--name", help="of the model in tables (default: of its directory)")
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    text = "directory for the levels of searches, so that one that was killed goes on (default: nothing is kept)"
    parser.add_argument("--levels", type=Path, help=text)
    text = f"the recipe's choices one at a time instead of other methods (default of --out: {FACTOR_STUDY.out})"
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--factors", action="store_true", help=text)
    text = f"only a search at 0.3 that starts with every head kept (default of --out: {KEPT_STUDY.out})"
    parts.add_argument("--kept", action="store_true", help=text)
    text = "evaluation text and its name in tables; may be repeated"
    parser.add_argument("--eval", action="append", required=True, metavar="NAME=FILE", help=text)
    parser.set_defaults(windows=64, jobs=1)
    options = parse_options(parser, arguments)
    if options.out == Path(STUDY.out):
        options.out = Path(chosen(options).out)
    return options


def chosen(options: argparse.Namespace) -> Study:
    """The study that the options name."""
    return FACTOR_STUDY if options.factors else KEPT_STUDY if options.kept else STUDY


def run(arguments: list[str] | None) -> None:
    """Run, resume or summarise the study that the arguments describe."""
    options = arguments_of(arguments)
    subject = subject_of(options)
    run_study(chosen(options), options, (subject,), facts(subject, options.name, BASE))


def main(arguments: list[str] | None = None) -> int:
    return one_line(STUDY.name, lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
