"""Which arm a score runs on, and which it refuses."""

import pytest

from structprune.config import ARMS
from structprune.errors import UserError
from structprune.structured.scores.table import SCORES, resolve_arm


def test_defaults():
    defaults = {score: resolve_arm(score, None) for score in SCORES}
    assert defaults == {
        "magnitude": None,
        "wanda": "masked+sink",
        "fluctuation": "masked+sink",
        "taylor": "masked+sink",
        "obs": "masked+sink",
    }


@pytest.mark.parametrize("score", ["wanda", "fluctuation", "obs"])
@pytest.mark.parametrize("arm", ARMS)
def test_activation_scores_take_every_arm(score, arm):
    assert resolve_arm(score, arm) == arm


@pytest.mark.parametrize("arm", ARMS)
def test_magnitude_takes_none(arm):
    with pytest.raises(
        UserError, match=f"'magnitude' cannot use arm '{arm.replace('+', '.')}'.*leave structured.arm unset"
    ):
        resolve_arm("magnitude", arm)


def test_taylor_has_no_loss_on_clean_text():
    assert resolve_arm("taylor", "masked") == "masked" and resolve_arm("taylor", "masked+sink") == "masked+sink"
    for arm in ("clean", "clean+sink"):
        with pytest.raises(UserError, match="no masked token, so no loss; usable: masked, masked.sink"):
            resolve_arm("taylor", arm)
