"""Published settings: the files are part of the package, and say what docs/methods.md says."""

from pathlib import Path

import pytest

from structprune.errors import UserError
from structprune.evaluation.presets import PRESETS, load_preset, preset_for
from structprune.models.families import DREAM, LLADA

FOLDER = Path(__file__).parents[2] / "configs" / "eval"
FILES = sorted(FOLDER.glob("*.yaml"))
GOOD = """
task: piqa
llada: {shots: 0, likelihood: {samples: 128, block: 8, cfg_scale: 0.5}}
dream: {shots: 0, likelihood: {samples: 128}}
"""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_equals_the_table(path):
    preset = load_preset(path)
    assert preset == PRESETS[preset.task]
    assert path.stem == {"gpqa_main_n_shot": "gpqa"}.get(preset.task, preset.task)


def test_the_nine_tasks_have_files():
    assert len(FILES) == len(PRESETS) == 9


@pytest.mark.parametrize(
    "task, shots, samples, cfg_scale",
    [
        ("mmlu", 5, 1, 0.0),
        ("arc_challenge", 0, 128, 0.5),
        ("arc_easy", 0, 128, 0.0),
        ("piqa", 0, 128, 0.5),
        ("winogrande", 5, 128, 0.0),
        ("hellaswag", 0, 128, 0.5),
        ("gpqa_main_n_shot", 5, 128, 0.5),
        ("race", 0, 128, 0.0),
    ],
)
def test_likelihoods_are_the_published_ones(task, shots, samples, cfg_scale):
    llada, dream = preset_for(task, LLADA), preset_for(task, DREAM)
    assert (llada.shots, llada.likelihood.samples, llada.likelihood.cfg_scale) == (shots, samples, cfg_scale)
    assert llada.likelihood.block == min(8, samples)
    assert (dream.shots, dream.likelihood.samples, dream.likelihood.cfg_scale) == (shots, 128, 0.0)


def test_gsm8k_is_generated():
    llada, dream = preset_for("gsm8k", LLADA), preset_for("gsm8k", DREAM)
    assert [llada.generation[name] for name in ("gen_length", "steps", "block_length")] == [1024] * 3
    assert (dream.generation["gen_length"], dream.generation["steps"], dream.shots) == (256, 256, 8)
    assert llada.likelihood is None


def test_other_tasks_have_none():
    assert preset_for("boolq", LLADA) is None


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("block: 8", "blok: 8", r"unknown key 'llada.likelihood.blok' \(did you mean 'block'\?\)"),
        ("task: piqa", "tusk: piqa", r"unknown key 'tusk' \(did you mean 'task'\?\)"),
        ("shots: 0", "shots: -1", "llada.shots: input should be greater than or equal to 0"),
        ("cfg_scale: 0.5", "cfg_scale: true", "not true or false"),
        ("likelihood: {samples: 128, block: 8, cfg_scale: 0.5}", "x: 1", "unknown key 'llada.x'"),
        ("likelihood: {samples: 128}", "generation: {gen_len: 8}", "dream.generation: .*gen_len"),
        ("likelihood: {samples: 128}", "generation: {alg: entrop}", "unknown alg 'entrop'"),
        ("dream:", "draem:", r"unknown key 'draem' \(did you mean 'dream'\?\)"),
        ("shots: 0, likelihood: {samples: 128}", "shots: 0", "dream: give either likelihood or generation"),
        ("{shots: 0, likelihood: {samples: 128}}", "{likelihood: {samples: 128}}", "the key 'dream.shots' is missing"),
        (GOOD, "[1]", "not a mapping"),
        (GOOD, "a: [", "cannot be read as YAML"),
    ],
)
def test_bad_files_get_one_line(tmp_path, old, new, message):
    path = tmp_path / "bad.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UserError, match=message) as error:
        load_preset(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no file of evaluation settings"):
        load_preset(tmp_path / "none.yaml")
