"""The study of published methods: fair settings, what generation keeps by hand, and a paired summary."""

import pytest
import torch

from structprune.assets import model_directory
from structprune.config import Config
from structprune.evaluation.nelbo import masked_nelbo
from structprune.generation.generate import generate
from structprune.generation.samplers import low_confidence
from structprune.runs.inspect import inspect_checkpoint


@pytest.fixture
def study(scripts):
    return scripts("baseline_study")


def test_every_variant_can_be_run_on_the_same_rows(study):
    for name, keys in study.VARIANTS.items():
        for ratio in study.RATIOS:
            config = Config.load(overrides=study.BASE | {"structured.ratio": float(ratio)} | keys)
            assert inspect_checkpoint(model_directory(), config)["ratio"] == float(ratio)
            text = config.calibration
            assert (text.windows, text.copies, text.held_out) == (160, 1, 40), name
            assert config.search.enabled == (name == study.SEARCHED)
            refit = config.reconstruct
            ours = name in (study.GREEDY, study.RECIPE, study.SEARCHED)
            assert (refit.enabled and refit.mode == "least-squares") == ours, name


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_what_generation_keeps(scripts, tiny_model, family):
    """A model keeps all of its own tokens; another's are compared place by place and judged under the first."""
    texts = scripts("checkpoint_texts")
    dense, other = tiny_model(family), tiny_model(family, seed=1)
    ids = torch.randint(0, 90, (texts.OPENINGS + 2, 24), generator=torch.Generator().manual_seed(2))
    continued = texts.Continued(dense, ids, seed=3)
    assert continued.compare(dense) == {"tokens_kept": 1.0, "generated_nelbo": continued.dense_nelbo}
    prompts, settings = list(ids[: texts.OPENINGS, :6]), low_confidence(dense.config, 18, 18)
    ours, theirs = (torch.stack(list(generate(model, prompts, settings))) for model in (other, dense))
    result = continued.compare(other)
    kept = (ours == theirs)[:, 6:].double().mean().item()
    assert result["tokens_kept"] == pytest.approx(kept) and kept < 1

    noisy, p = texts.stratified_noise(
        ours, dense.config.mask_token_id, torch.Generator().manual_seed(3), 4, dense.edges_visible
    )
    noisy[..., :6] = ours[:, None, :6]
    edges = dense.edges_visible
    nats = masked_nelbo(dense, ours, noisy, p, 16).nelbo.double().mean().item() * (24 - 2 * edges) / (18 - edges)
    assert result["generated_nelbo"] == pytest.approx(nats, rel=1e-5)


def test_the_summary_is_paired(study):
    runs = {}
    for name in study.VARIANTS:
        for seed in (0, 1):
            loss = [1.0 + seed, 3.0] if name == "FLAP" else [0.0, 1.0]
            row = {"loss": loss, "kl": 0.25, "agreement": 0.5, "tokens_kept": 0.125, "generated_nelbo": 2.0 + seed}
            row |= {"heads": 14, "kept": None, "seconds": 3.0}
            dense = {"nelbo": 4.0, "accuracy": 0.5, "generated_nelbo": 1.5}
            runs[name, seed] = {"dense": dense, "ratios": dict.fromkeys(study.RATIOS, row)}
    result = study.summarise(runs, [0, 1])
    gaps = {(row["variant"], row["ratio"]): row for row in result["contrasts"]}
    assert gaps["FLAP", "0.5"]["by_seed"] == [1.5, 2.0] and gaps[study.SEARCHED, "0.7"]["mean"] == 0.0
    row = next(row for row in result["losses"] if row["variant"] == "FLAP")
    assert row["by_seed"] == [2.0, 2.5] and row["generated_nelbo"] == [2.0, 3.0]
    tables = study.tables(result)
    assert [len(table.columns) for table in tables] == [6, 6, 6]
    assert list(tables[0].columns[4].cells) == ["12.5 %"] * len(study.VARIANTS)
