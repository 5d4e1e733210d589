"""What cannot be scored: items, and settings of the estimate, each in one line."""

import pytest
import torch

from structprune.errors import UserError
from structprune.evaluation.choices import score_items
from structprune.evaluation.items import Answer, Item, MonteCarlo, check_items
from structprune.models.encode import Batches

MASK = 2047


def answer(prompt=(1, 2), target=(3, 4), size=2) -> Answer:
    return Answer(torch.tensor(prompt, dtype=torch.long), torch.tensor(target, dtype=torch.long), size)


REFUSED = {
    "too long": ("llada", [answer(range(60), range(5))], "item q/7, answer 0 has 65 tokens .* model 64 positions"),
    "second too long": ("llada", [answer(), answer(range(60), range(9))], "item q/7, answer 1 has 69 tokens"),
    "empty": ("llada", [answer(target=())], "answer 0 has 0 tokens to score: give it a token"),
    "only EOS": ("dream", [answer(target=(3,))], "answer 0 has 1 tokens to score: .* end it with EOS"),
    "mask in prompt": ("llada", [answer(prompt=(1, MASK))], "item q/7, answer 0 holds the mask token 2047: remove it"),
    "mask in target": ("dream", [answer(target=(MASK, 1))], "holds the mask token 2047"),
    "no size": ("llada", [answer(size=0)], "has size 0, by which its choice is divided: give 1 or more"),
    "no answer": ("llada", [], "item q/7 has no answer: give it at least one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_items_that_cannot_be_scored(tiny_model, case):
    family, answers, message = REFUSED[case]
    model, items = tiny_model(family), [Item("q/6", (answer(),)), Item("q/7", tuple(answers))]
    for attempt in (
        lambda: score_items(model, items, MonteCarlo(8), Batches(99)),
        lambda: check_items(model.config, items, MonteCarlo(8)),
    ):
        with pytest.raises(UserError, match=message):
            attempt()


def test_the_longest_that_fits_is_scored(tiny_model):
    item = Item("q", (answer(range(60), range(4)),))
    assert score_items(tiny_model(), [item], MonteCarlo(8), Batches(99))[0].log_likelihoods[0] < 0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"samples": 0}, "samples = 0 cannot be used: give a whole number from 1"),
        ({"samples": 12.0}, "samples = 12.0 cannot be used"),
        ({"block": True}, "block = True cannot be used"),
        ({"samples": 12}, "samples = 12 is not a multiple of block = 8: change either"),
        ({"cfg_scale": -0.5}, "cfg_scale = -0.5 cannot be used"),
        ({"cfg_scale": float("nan")}, "cfg_scale = nan cannot be used"),
        ({"confidence": 1.0}, "confidence = 1.0 is not between 0 and 1"),
        ({"confidence": 0.0}, "confidence = 0.0 is not between 0 and 1"),
        ({"sampling": "stratifed"}, "unknown sampling 'stratifed'.*stratified"),
        ({"skip_empty": True, "adaptive": True}, "skip_empty reproduces published numbers"),
    ],
)
def test_settings_that_cannot_be_used(values, message):
    with pytest.raises(UserError, match=message):
        MonteCarlo(**values)


def test_settings_that_a_family_has_no_use_for(tiny_model):
    items = [Item("q", (answer(),))]
    message = "cfg_scale = 0.5 has no effect where guidance starts above 1.*Dream: give 0 or 1 .off., or more than 1"
    with pytest.raises(UserError, match=message):
        score_items(tiny_model("dream"), items, MonteCarlo(8, cfg_scale=0.5), Batches(99))
    message = "skip_empty has no effect where every sample has a mask, as for LLaDA: drop it"
    with pytest.raises(UserError, match=message):
        score_items(tiny_model(), items, MonteCarlo(8, skip_empty=True), Batches(99))
    score_items(tiny_model("dream"), items, MonteCarlo(8, cfg_scale=1.0), Batches(99))
