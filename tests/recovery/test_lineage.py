"""What a recovered checkpoint says of the text that it was trained on, and evaluation of that."""

import pytest

from structprune.checkpoint.learnt_text import LEARNT, read_learnt
from structprune.checkpoint.save import save_pruned
from structprune.config import Config
from structprune.evaluation.settings import EvaluationConfig
from structprune.models.loading import load_model
from structprune.runs.checkpoints import mask_checkpoint
from structprune.runs.evaluation_request import prepare
from structprune.runs.recover import recover


def warnings(checkpoint, text):
    keys = {"evaluation.source": str(text), "evaluation.length": 60, "evaluation.windows": 500, "model.device": "cpu"}
    return prepare([str(checkpoint)], EvaluationConfig.load(overrides=keys))[0].warnings


@pytest.mark.slow
def test_evaluation_finds_the_text_that_was_learnt(pair, recover_config, text_path, tmp_path):
    dense, small = pair()
    first, second, masked = tmp_path / "first", tmp_path / "second", tmp_path / "masked"
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{number} crates of nails went by ship number {number * 7}. " for number in range(900)))
    keys = {"data__length": 60, "train__tokens": 60 * 8 * 6, "train__learning_rate": 5e-3}
    assert recover(str(small), str(dense), first, recover_config(**keys)).report["kept"] == "trained"
    assert warnings(small, text_path) == () and not (small / LEARNT).exists()
    assert warnings(first, other) == ()
    lines = warnings(first, text_path)
    assert len(lines) == 1 and lines[0].startswith("first was trained on text that ")
    assert lines[0].endswith("of the items of text.txt hold: its figures there flatter it")

    more = recover_config(**keys, data__source=str(other))
    assert recover(str(first), str(dense), second, more).report["kept"] == "trained"
    assert set(read_learnt(first).tolist()) < set(read_learnt(second).tolist())
    assert len(warnings(second, other)) == len(warnings(second, text_path)) == 1

    save_pruned(load_model(second), tmp_path / "pruned")
    overrides = {"method": "unstructured", "masking.score": "magnitude", "model.device": "cpu"} | {
        f"calibration.{key}": value
        for key, value in {"source": str(text_path), "windows": 3, "held_out": 2, "length": 16}.items()
    }
    mask_checkpoint(str(second), masked, Config.load(overrides=overrides))
    for later in (tmp_path / "pruned", masked):
        assert (later / LEARNT).read_bytes() == (second / LEARNT).read_bytes()
