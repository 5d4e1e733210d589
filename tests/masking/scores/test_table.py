"""Scores and arms: what is asked for, what is taken, what is refused."""

from typing import get_args

import pytest

from structprune.config import ARMS, Arm, MaskingSettings
from structprune.errors import UserError
from structprune.masking.scores.table import SCORES, resolve_score

NAMES = get_args(MaskingSettings.model_fields["score"].annotation)


def test_the_table_is_what_a_configuration_offers():
    assert {name.removeprefix("sink-") for name in NAMES} == set(SCORES)
    assert get_args(Arm) == ARMS


@pytest.mark.parametrize(
    "name, expected",
    [
        ("magnitude", ("magnitude", None)),
        ("wanda", ("wanda", "masked")),
        ("ria", ("ria", "masked")),
        ("sparsegpt", ("sparsegpt", "masked")),
        ("sink-wanda", ("wanda", "masked+sink")),
        ("sink-sparsegpt", ("sparsegpt", "masked+sink")),
    ],
)
def test_scores_have_an_arm_of_their_own(name, expected):
    assert resolve_score(name, None) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name != "magnitude"])
@pytest.mark.parametrize("arm", ARMS)
def test_any_arm_is_taken_or_refused(name, arm):
    if name.startswith("sink-") and "sink" not in arm:
        base = name.removeprefix("sink-")
        message = f"^score '{name}' cannot use arm '{arm}', which ignores sinks: ask for '{base}', or for {arm}.sink$"
        with pytest.raises(UserError, match=message):
            resolve_score(name, arm)
    else:
        assert resolve_score(name, arm) == (name.removeprefix("sink-"), arm)


@pytest.mark.parametrize("arm", ARMS)
def test_weights_alone_take_no_arm(arm):
    message = "^score 'magnitude' cannot use arm '.*': it looks at weights only; leave masking.arm unset$"
    with pytest.raises(UserError, match=message):
        resolve_score("magnitude", arm)
