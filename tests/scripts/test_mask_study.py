"""The study of masks: every variant can be run, every comparison is of two that were, and the summary is right."""

import pytest

from structprune.assets import model_directory
from structprune.config import Config
from structprune.runs.inspect import inspect_masking


@pytest.fixture
def study(scripts):
    return scripts("mask_study")


@pytest.mark.slow
def test_every_variant_can_be_run_at_its_ratios(study):
    for name, keys in study.variants().items():
        for ratio in study.ratios_of(name):
            config = Config.load(overrides=study.BASE | keys | study.RATIOS[ratio])
            actual = inspect_masking(model_directory(), config)
            assert actual["ratio"] == (0.5 if ratio == "2:4" else float(ratio)), (name, ratio)


def test_methods_and_arms_are_crossed_and_only_allocations_lack_two_of_four(study):
    names = study.variants()
    assert all(f"{score}, {arm}" in names for score in study.SCORES for arm in study.ARMS)
    lacking = [name for name in names if "2:4" not in study.ratios_of(name)]
    assert len(lacking) == 4 and all("owl" in name or "depth" in name for name in lacking)


def test_every_comparison_is_of_two_variants(study):
    names = study.variants()
    pairs = [(name, base) for _, name, base in study.contrasts()]
    assert len(set(pairs)) == len(pairs)
    assert all(name in names and base in names and name != base for name, base in pairs)
    assert all(set(study.ratios_of(name)) <= set(study.ratios_of(base)) for name, base in pairs)
    assert ("sparsegpt, masked, refit on clean", "sparsegpt, masked, refit") in pairs
    assert ("sparsegpt, masked, owl", "sparsegpt, masked") in pairs


def test_the_refit_is_a_question_of_its_own(study):
    asked = [(name, base) for question, name, base in study.contrasts() if question == "refit"]
    assert asked == [
        ("magnitude, refit", "magnitude"),
        *((f"{score}, masked, refit", f"{score}, masked") for score in study.SCORES),
        ("sparsegpt, masked+sink, refit", "sparsegpt, masked+sink"),
    ]
    others = [name for question, name, _ in study.contrasts() if question == "one change" and "refit" in name]
    assert others == [f"sparsegpt, masked, refit {change}" for change in ("on masked+sink", "on clean", "to layer")]


def test_the_summary_is_paired(study):
    """Gaps of 1, 1 in one seed and 1, 3 in the other."""
    losses = {"wanda, masked": ([1.0, 3.0], [2.0, 4.0]), "wanda, clean": ([0.0, 2.0], [1.0, 1.0])}
    seeds = [0, 1]
    done = {}
    for name in study.variants():
        for seed in seeds:
            loss = losses.get(name, ([0.0, 0.0], [0.0, 0.0]))[seed]
            ratios = {ratio: {"loss": loss, "sparsity": 0.5} for ratio in study.ratios_of(name)}
            done[name, seed] = {"variant": name, "seed": seed, "dense_nelbo": 4.0, "ratios": ratios}
    actual = study.summarise(done, seeds)
    gap = next(row for row in actual["contrasts"] if row["variant"] == "wanda, masked" and row["ratio"] == "0.5")
    assert gap["against"] == "wanda, clean" and gap["mean"] == 1.5 and gap["by_seed"] == [1.0, 2.0]
    half = 12.706205 * 0.5  # t of one degree of freedom times 1 / root 2, the deviation of 1 and 2, over root 2
    assert (gap["low"], gap["high"]) == pytest.approx((1.5 - half, 1.5 + half)) and gap["shown"] is False
    assert gap["windows"]["standard_error"] == pytest.approx(0.5)  # gaps 1, 1, 1, 3: deviation 1, over the root of 4
    row = next(row for row in actual["losses"] if row["variant"] == "wanda, masked" and row["ratio"] == "2:4")
    assert row["mean"] == 2.5 and row["by_seed"] == [2.0, 3.0]
    assert actual["dense"] == [4.0, 4.0]


def test_tables_mark_what_is_shown(study):
    def losses(name, seed):
        return [1.0 + 0.01 * seed, 1.2] if name == "sparsegpt, clean" else [0.1 * seed, 0.2]

    done = {
        (name, seed): {
            "dense_nelbo": 4.0,
            "ratios": {ratio: {"loss": losses(name, seed), "sparsity": 0.5} for ratio in study.ratios_of(name)},
        }
        for name in study.variants() for seed in range(3)
    }  # fmt: skip
    for seeds, cell in (([0, 1, 2], "-0.9550 [-1.0668, -0.8432] *"), ([0], "-1.0000")):
        result = study.summarise(done, seeds)
        table = study.contrast_table(result)
        by_pair = dict(zip(zip(table.columns[1].cells, table.columns[2].cells), table.columns[4].cells))
        assert by_pair["sparsegpt, masked", "sparsegpt, clean"] == cell
        assert by_pair["wanda, masked", "wanda, clean"] == "+0.0000" + " [+0.0000, +0.0000]" * (len(seeds) > 1)
        assert "*" not in "".join(study.loss_table(result).columns[1].cells)
