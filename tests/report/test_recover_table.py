"""What is said of a recovery beside its table."""

import pytest

from structprune.report.recover_table import no_gain


def change(**means):
    """What changed, by loss, each with a standard error of 0.002."""
    return {name: {"mean": mean, "standard_error": 0.002} for name, mean in means.items()}


FELL = change(kl=-0.1, nelbo=-0.2)


def test_a_line_says_where_the_weights_are_not_those_learnt_last():
    assert no_gain({"kept": "trained", "change": FELL}, "of the input") == []
    [line] = no_gain({"kept": "input", "change": change(kl=0.1, nelbo=0.2)}, "that were pruned")
    assert line.endswith("the weights written are those that were pruned.")
    [line] = no_gain({"kept": "blocks", "change": FELL}, "of the input")
    assert line.startswith("No gain of the second stage") and line.endswith("are those of the first.")


@pytest.mark.parametrize("kept, first", [("trained", 0), ("blocks", 1)])
def test_a_line_says_which_loss_rose_while_what_decides_fell(kept, first):
    lines = no_gain({"kept": kept, "change": change(kl=-0.1, nelbo=0.0123)}, "of the input")
    assert lines[first:] == [
        "The NELBO of the held-out text rose by 0.0123 ± 0.0020 nats per token: raise loss.cross_entropy to weigh it"
        " more."
    ]
    assert no_gain({"kept": kept, "change": change(kl=-0.1, nelbo=0.00004)}, "of the input")[first:] == []


def test_losses_of_a_model_that_is_causal_too_are_named():
    rose = change(kl=0.1, nelbo=-0.5, causal_kl=0.2, causal_ce=0.3)
    lines = no_gain({"kept": "trained", "change": rose}, "of the input")
    assert [line.split(" rose ")[0] for line in lines] == [
        f"{name} of the held-out text"
        for name in ("The divergence from the teacher", "The divergence at next tokens", "The loss of next tokens")
    ]
    assert [line.split("raise ")[1].split()[0] for line in lines] == ["loss.kl", "loss.causal", "loss.causal"]
