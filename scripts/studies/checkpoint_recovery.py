"""What training back is worth on a checkpoint of your own: the best prunings of `checkpoint_study`, before and after.

At every ratio the model that the best recipe of the study prunes learns from the dense one: block by block first, then
by the divergence of its predictions, on the calibration text. Evaluation windows and noise of a seed are those of
`checkpoint_study`. Intervals are over seeds (see studies.py). An interrupted study continues where it stopped, within a
training too: the models it prunes and trains stay in its work directory.

    python -m scripts.studies.checkpoint_recovery --checkpoint DIR --text FILE --eval NAME=FILE --eval NAME=FILE
"""

import argparse
import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.studies.checkpoint_study import (
    BASE,
    calibration_of,
    continued,
    dense_model,
    held_out_texts,
    section_keys,
    summarise,
)
from scripts.studies.checkpoint_tables import tables
from scripts.studies.checkpoint_texts import Subject, facts, subject_of
from scripts.studies.checkpoint_variants import SINKS, STREAMED, VARIANTS
from scripts.studies.studies import Study, parse_options, run_study, study_parser
from scripts.tools.script_line import check_counts, one_line
from structprune import __version__
from structprune.config import Config
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.denormals import flushed_denormals
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.recovery.settings import RecoverConfig
from structprune.runs.pruner import Pruner
from structprune.runs.recover import recover

RECIPES = {"0.5": SINKS, "0.3": STREAMED}  # of `checkpoint_study`, which lose least there without a search
UNTRAINED = "not trained"
FIRST = 0.4  # share of the tokens that is learnt block by block
TRAIN = {
    "model.device": "cpu", "data.length": 128, "data.held_out": 32, "data.noise": 2, "train.method": "full",
    "train.batch": 8, "train.pass_windows": 8, "train.learning_rate": 3e-4, "train.evaluations": 4,
    "blocks.learning_rate": 1e-3,
}  # fmt: skip
PRECISIONS: dict[str, dict] = {
    "float32": {}, "bfloat16": {"train.precision": "bfloat16", "teacher.dtype": "bfloat16"},
}  # fmt: skip


class Trainings(NamedTuple):
    """What a run of the study trains.

    Attributes:
        variants: name -> keys of its training. ratios: at which each is made. train: keys of all.
        work: directory of the models.
    """

    variants: dict[str, dict]
    ratios: list[str]
    train: dict[str, Any]
    work: Path


def variants_of(tokens: list[int]) -> dict[str, dict]:
    """Name -> keys of its training, both stages together learning so many tokens; the untrained model first."""
    stages = {count: round(FIRST * count) for count in tokens}
    trained = {
        f"{count:,} tokens": {"blocks.tokens": first, "train.tokens": count - first} for count, first in stages.items()
    }
    return {UNTRAINED: {}} | trained


def pruned_model(subject: Subject, seed: int, ratio: str, work: Path) -> Path:
    """The checkpoint, pruned by the recipe of a ratio, in a directory of the work directory."""
    place = work / f"pruned-{ratio}-{seed}"
    if not place.exists():  # it appears complete or not at all
        keys = BASE | subject.keys | {"calibration.seed": seed, "structured.ratio": float(ratio)}
        keys |= VARIANTS[RECIPES[ratio]]
        calibration = calibration_of(subject, section_keys(keys, "calibration."))
        Pruner(dense_model(subject.checkpoint), Config.load(overrides=keys), calibration).prune().save(place)
    return place


def trained_model(trainings: Trainings, name: str, subject: Subject, seed: int, ratio: str) -> Path:
    """The pruned checkpoint, trained back by a variant's keys of `recover`; an interrupted training goes on."""
    training, work = trainings.variants[name], trainings.work
    student, place = pruned_model(subject, seed, ratio, work), work / f"{sum(training.values())}-{ratio}-{seed}"
    if not place.exists():
        keys = trainings.train | {"data.seed": seed, "data.source": str(subject.text)} | training
        recover(str(student), str(subject.checkpoint), place, RecoverConfig.load(overrides=keys))
    return place


def costs_of(checkpoint: Path) -> dict:
    """Seconds of the last training of a checkpoint, both stages; nothing of one that was interrupted."""
    last = json.loads((checkpoint / "report.json").read_text())["recoveries"][-1]
    parts = [part for part in (last["blocks"], last["learnt"]) if part]
    return {} if any(part.get("resumed_at") for part in parts) else {"training": last["seconds"]}


@flushed_denormals()  # before anything is computed, for all threads
def measure(trainings: Trainings, name: str, seed: int, subject: Subject, threads: int) -> dict:
    """One variant at one seed: for each ratio loss and fidelity per text, generation, and what the training took."""
    torch.set_num_threads(threads)
    texts, results = held_out_texts(subject, seed), {}
    for ratio in trainings.ratios:
        if trainings.variants[name]:
            checkpoint = trained_model(trainings, name, subject, seed, ratio)
            costs = costs_of(checkpoint)
        else:
            checkpoint, costs = pruned_model(subject, seed, ratio, trainings.work), {}
        model = load_model(checkpoint, device="cpu")
        measured = {text: held_out.compare(model) for text, held_out in texts.items()}
        results[ratio] = {
            "texts": measured, "seconds": costs, "heads_removed": heads_of(dense_model(subject.checkpoint), model),
            "generation": continued(subject, seed).compare(model),
        }  # fmt: skip
    dense = {text: held_out.dense for text, held_out in texts.items()}
    generated = continued(subject, seed).dense_nelbo
    return {"variant": name, "seed": seed, "dense": dense, "ratios": results, "generated_nelbo": generated}


def heads_of(dense: DiffusionLM, pruned: DiffusionLM) -> int:
    """Query heads that a model lacks."""
    counts = [sum(block.widths.query_heads for block in Adapter(model).blocks) for model in (dense, pruned)]
    return counts[0] - counts[1]


def study_of(trainings: Trainings) -> Study:
    """The study of some trainings, the untrained model first."""
    variants, names = trainings.variants, list(trainings.variants)
    contrasts = [(name, UNTRAINED) for name in names[1:]] + list(zip(names[2:], names[1:]))  # then the shorter one
    return Study(
        "checkpoint_recovery", __doc__.splitlines()[0], "scripts/results/checkpoint_recovery.json", BASE,
        trainings.ratios, variants, partial(measure, trainings), partial(summarise, variants, contrasts), tables, 190,
    )  # fmt: skip


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    """The options of this study, checked."""
    parser = study_parser(study_of(Trainings({}, [*RECIPES], TRAIN, Path())))
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of the dense model")
    parser.add_argument("--name", help="of the model in tables (default: of its directory)")
    parser.add_argument("--text", type=Path, required=True, help="calibration text, which is also learnt")
    text = "evaluation text and its name in tables; may be repeated"
    parser.add_argument("--eval", action="append", required=True, metavar="NAME=FILE", help=text)
    text = "of a training, both stages together; may be repeated (default 300000)"
    parser.add_argument("--tokens", type=int, action="append", metavar="N", help=text)
    parser.add_argument("--ratio", action="append", choices=[*RECIPES], help="may be repeated (default: both)")
    text = "of the trainings; bfloat16 is faster on a CPU that has it in hardware (default float32)"
    parser.add_argument("--precision", choices=[*PRECISIONS], default="float32", help=text)
    text = "of the models that are pruned and trained; they stay there (default: beside --out, with '.work')"
    parser.add_argument("--work", type=Path, metavar="DIR", help=text)
    parser.set_defaults(windows=64, jobs=1)
    options = parse_options(parser, arguments)
    options.tokens, options.ratio = options.tokens or [300_000], list(dict.fromkeys(options.ratio or RECIPES))
    if options.jobs > 1:
        raise UserError(f"--jobs = {options.jobs}: trainings of one seed share its pruned models; leave it at 1")
    for count in options.tokens:
        check_counts(argparse.Namespace(tokens=count), {"tokens"})
    return options


def models_digest(settings: dict, text: str) -> str:
    """Of what decides the models of a study; the texts they are evaluated on and their name do not.

    Args:
        text: name of the file that is learnt.
    """
    decisive = [
        settings["checkpoint"]["fingerprint"], settings["sha256"][text], settings["base"], settings["train"],
        __version__, [VARIANTS[name] for name in RECIPES.values()], Config().model_dump(mode="json"),
        RecoverConfig().model_dump(mode="json"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def run(arguments: list[str] | None) -> None:
    """Run, resume or summarise the study that the arguments describe."""
    options = arguments_of(arguments)
    subject = subject_of(options)
    train = TRAIN | PRECISIONS[options.precision]
    settings = facts(subject, options.name, BASE) | {"train": train}
    work = (options.work or options.out.with_suffix(".work")) / models_digest(settings, subject.text.name)
    trainings = Trainings(variants_of(options.tokens), options.ratio, train, work)
    run_study(study_of(trainings), options, (subject,), settings)


def main(arguments: list[str] | None = None) -> int:
    return one_line("checkpoint_recovery", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
