"""Fidelity in an evaluation: the figures of the pure functions, one model at a time, resumed, and against a run."""

import itertools
import os
import shutil
import subprocess
import sys

import pytest

from structprune.errors import UserError
from structprune.evaluation.fidelity import masked_kl, reference_predictions
from structprune.evaluation.result_files import read_results
from structprune.evaluation.result_state import clear_results
from structprune.models.loading import load_model
from structprune.runs.evaluate import Session, evaluate
from structprune.runs.evaluation_request import prepare

pytestmark = pytest.mark.slow
TASK = "text.txt"
CONTINUED, JUDGED = f"{TASK} continued", f"{TASK} continued, under the reference"
FEW = {"evaluation__fidelity_prompts": 9, "evaluation__fidelity_opening": 6, "evaluation__fidelity_tokens": 5}


@pytest.fixture
def asked(eval_settings, text_path):
    """`asked(**changes)` -> settings with fidelity, without continuations where none are asked for."""
    values = {"evaluation__fidelity": True, "evaluation__fidelity_prompts": 0}
    return lambda **changes: eval_settings(text_path, **values | changes)


@pytest.fixture
def models(eval_checkpoint):
    """`models(count, family)` -> checkpoints model-0, model-1, ... of other seeds."""
    return lambda count, family="llada": [
        str(eval_checkpoint(family, seed=seed, name=f"model-{seed}")) for seed in range(count)
    ]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_figures_are_those_of_whole_predictions(family, models, asked, tmp_path):
    names = models(3, family)
    result = evaluate(names, asked(evaluation__fidelity_top=50), tmp_path / "out")
    unit = prepare(names[:1], asked())[0].units[0]
    noisy, reference = unit.noised(7)[0], load_model(names[0])
    kept, _ = reference_predictions(reference, unit.windows[7:8], noisy, 50)
    expected = masked_kl(load_model(names[2]), unit.windows[7:8], noisy, kept)
    row = result.results.rows["model-2"][TASK][7]
    assert row.kl_nats == pytest.approx(expected.kl.sum().item(), rel=1e-4) and row.kl_nats > 1
    assert (row.correct, row.agreed) == (expected.correct.sum(), expected.agreed.sum())
    own = result.results.rows["model-0"][TASK][7]
    assert own.kl_nats is None and own.agreed is None and own.correct is not None
    assert result.summary["tasks"][TASK]["metrics"] == ["nelbo", "masked_ce", "masked_acc", "kl", "agreement"]
    assert result.summary["checkpoints"]["model-0"][TASK]["metrics"].keys() == {"nelbo", "masked_ce", "masked_acc"}
    gaps = {label: each[TASK].keys() for label, each in result.summary["differences"].items()}
    assert gaps["model-1"] == {"nelbo", "masked_ce", "masked_acc"} and gaps["model-2"] == gaps["model-1"] | {
        "kl", "agreement",
    }  # fmt: skip


def test_the_nelbo_is_the_same_without(models, asked, eval_settings, text_path, tmp_path):
    names = models(2)
    both = evaluate(names, asked(), tmp_path / "both")
    plain = evaluate(names, eval_settings(text_path), tmp_path / "plain")
    for label in ("model-0", "model-1"):
        pairs = zip(both.results.rows[label][TASK], plain.results.rows[label][TASK], strict=True)
        for ours, theirs in pairs:
            assert ours.nelbo == pytest.approx(theirs.nelbo, rel=1e-5) and ours.masked_tokens == theirs.masked_tokens
    assert "kl" not in plain.summary["tasks"][TASK]["metrics"] and not (tmp_path / "plain" / "predictions").exists()


def test_a_copy_is_the_same(models, asked, tmp_path):
    names = models(1)
    names.append(shutil.copytree(names[0], tmp_path / "same").as_posix())
    same = evaluate(names, asked(), tmp_path / "out").summary["checkpoints"]["same"][TASK]["metrics"]
    assert same["kl"]["value"] == pytest.approx(0, abs=1e-6) and same["agreement"]["value"] == 1


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_continuations_of_every_checkpoint(family, models, asked, tmp_path):
    names = models(2, family)
    names.append(shutil.copytree(names[0], tmp_path / "same").as_posix())
    result = evaluate(names, asked(**FEW), tmp_path / "out")
    assert result.summary["tasks"][CONTINUED] == {"main": "distinct", "metrics": ["distinct", "kept"]}
    assert result.summary["tasks"][JUDGED]["metrics"] == ["nelbo", "masked_ce"]
    rows = result.results.rows
    assert {label: len(each[JUDGED]) for label, each in rows.items()} == {"model-0": 9, "model-1": 9, "same": 9}
    assert [row.kept for row in rows["same"][CONTINUED]] == [5] * 9
    assert [row.nelbo for row in rows["same"][JUDGED]] == pytest.approx([row.nelbo for row in rows["model-0"][JUDGED]])
    theirs = {row.key: row.tokens for row in rows["model-0"][CONTINUED]}
    for row in rows["model-1"][CONTINUED]:
        assert row.kept == sum(one == other for one, other in zip(row.tokens, theirs[row.key], strict=True)) < 5
    gap = result.summary["differences"]["model-1"]
    assert gap[JUDGED]["nelbo"]["difference"] > 0  # a model's own greedy text is likelier to it than another's
    assert result.summary["differences"]["same"][CONTINUED]["kept"]["difference"] > 0.5


class Killed(Exception):
    pass


def dies_after(count: int):
    """A progress that lets `count` chunks pass, over all bars."""
    passed = itertools.count()

    def track(items, title):
        for item in items:
            if next(passed) == count:
                raise Killed
            yield item

    return track


@pytest.mark.parametrize("lost", ["nothing", "a file"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_died_goes_on(after, lost, models, asked, tmp_path, plain_rows):
    names, out = models(2), tmp_path / "out"
    whole = evaluate(names, asked(), tmp_path / "whole")
    with pytest.raises(Killed):
        evaluate(names, asked(), out, session=Session(track=dies_after(after)))
    files = sorted((out / "predictions").iterdir())
    assert len(files) == {1: 16, 2: 20, 3: 20}[after]
    if lost == "a file":
        files[3].unlink()  # of which chunk depends on its key: it is made again before anybody is compared with it
    again = evaluate(names, asked(), out)
    assert plain_rows(again.results) == plain_rows(whole.results) and again.summary == whole.summary
    assert len(list((out / "predictions").iterdir())) == 20
    clear_results(out)
    assert not out.exists() or not list(out.iterdir())


def test_against_an_earlier_run_is_as_beside_it(models, asked, tmp_path, plain_rows):
    names = models(3)
    whole = evaluate(names, asked(), tmp_path / "whole")
    evaluate(names[:1], asked(), tmp_path / "first")
    later = evaluate(names[1:], asked(), tmp_path / "later", against=tmp_path / "first")
    rows = plain_rows(whole.results)
    del rows["model-0"]
    assert plain_rows(later.results) == rows and not (tmp_path / "later" / "predictions").exists()
    gap = later.summary["differences"]["model-2"][TASK]
    assert gap["kl"] == whole.summary["differences"]["model-2"][TASK]["kl"]
    assert "kl" not in later.summary["differences"]["model-1"][TASK] and later.summary["baseline"] == "first-model-0"


@pytest.mark.parametrize("after", [3, 4, 7, 8, 9])
def test_continuations_that_died_go_on(after, models, asked, tmp_path, plain_rows):
    """Two chunks of windows and two of continuations of each checkpoint, then one of each under the reference."""
    names, out = models(2), tmp_path / "out"
    with pytest.raises(Killed):
        evaluate(names, asked(**FEW), out, session=Session(track=dies_after(after)))
    again = evaluate(names, asked(**FEW), out)
    assert plain_rows(again.results) == plain_rows(evaluate(names, asked(**FEW), tmp_path / "whole").results)


def test_continuations_against_an_earlier_run(models, asked, tmp_path, plain_rows):
    names = models(2)
    whole = evaluate(names, asked(**FEW), tmp_path / "whole")
    evaluate(names[:1], asked(**FEW), tmp_path / "first")
    later = evaluate(names[1:], asked(**FEW), tmp_path / "later", against=tmp_path / "first")
    rows = plain_rows(whole.results)["model-1"]
    assert plain_rows(later.results)["model-1"] == {task: rows[task] for task in (TASK, CONTINUED)}
    assert len(later.warnings) == 1 and later.warnings[0].startswith("what continuations cost under the reference is")
    fewer = asked(**FEW | {"evaluation__fidelity_prompts": 4})
    kept = evaluate(names[1:], fewer, tmp_path / "fewer", against=tmp_path / "first").results.rows["model-1"][CONTINUED]
    assert len(kept) == 4 and kept == later.results.rows["model-1"][CONTINUED][:4]
    for changes in ({"evaluation__fidelity_tokens": 6}, {"evaluation__fidelity_prompts": 10}):
        with pytest.raises(UserError, match=r"continued other openings \(opening 6, tokens 5, steps 5\): give its"):
            evaluate(names[1:], asked(**FEW | changes), tmp_path / "out", against=tmp_path / "first")


def test_two_processes_find_what_one_finds(models, asked, text_path, tmp_path, plain_rows):
    names, out = models(2), tmp_path / "out"
    alone = evaluate(names, asked(**FEW), tmp_path / "alone")
    values = {"windows": 20, "length": 32, "noise": 2} | {name[12:]: value for name, value in FEW.items()}
    sets = [f"--set=evaluation.{name}={value}" for name, value in values.items()]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    asking = ["eval", *names, "--text", str(text_path), "--fidelity", "--out", str(out), *sets]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*launch, "-m", "structprune", *asking], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert plain_rows(read_results(out)) == plain_rows(alone.results)


def test_another_reference_is_another_run(models, asked, tmp_path):
    names = models(2)
    evaluate(names, asked(), tmp_path / "out")
    with pytest.raises(UserError, match="holds results of other settings: reference was"):
        evaluate(names[::-1], asked(), tmp_path / "out")


def test_earlier_runs_that_cannot_be_compared_with(models, asked, eval_settings, text_path, tmp_path):
    names, out = models(2), tmp_path / "out"
    evaluate(names[:1], eval_settings(text_path), tmp_path / "plain")
    evaluate(names[:1], asked(), tmp_path / "first")
    for earlier, changes, words in (
        ("plain", {}, "keeps no predictions of 20 of 20 windows: make it with --fidelity on the same text"),
        ("first", {"evaluation__seed": 1}, "keeps no predictions of [0-9]+ of 20 windows"),
        ("first", {"evaluation__noise": 3}, "was made with other noise: give the evaluation.seed, noise and mask id"),
        ("first", {"evaluation__fidelity_top": 9}, "fidelity_top = 9, but the run in .* kept 256 tokens of a"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(names[1:], asked(**changes), out, against=tmp_path / earlier)
        assert not out.exists()


@pytest.mark.parametrize(
    "family, changes, words",
    [
        ("dream", {}, "over one family, but '.*other' has dream and '.*llada-tiny' llada: leave it out, or compare"),
        ("llada", {"vocab_size": 2056, "embedding_size": 2056}, "over one vocabulary, but '.*other' has 2056 and"),
        ("llada", {"mask_token_id": 2046}, "over one mask id, but '.*other' has 2046 and '.*' 2047"),
    ],
)
def test_checkpoints_that_cannot_be_compared(family, changes, words, tiny_checkpoint, asked, tmp_path):
    names = [tiny_checkpoint(), tiny_checkpoint(family, name="other", **changes)]
    with pytest.raises(UserError, match=words):
        evaluate(list(map(str, names)), asked(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
