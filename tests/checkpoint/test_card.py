"""The model card says what the report says."""

import re

import pytest
import yaml

from structprune import load_model, save_pruned
from structprune.checkpoint.card import mask_card, model_card
from structprune.config import Config

POSITIONS = {"llada": "max_sequence_length", "dream": "max_position_embeddings"}


@pytest.fixture
def report():
    """A report with round numbers."""
    return {
        "source": "GSAI-ML/LLaDA-8B-Base",
        "license": {},
        "family": "llada",
        "config": Config().model_dump(mode="json"),
        "arm": "masked",
        "ratio": 0.4996,
        "parameters": {"before": 8_000_000_000, "after": 5_000_000_000},
        "block_parameters": {"before": 6_000_000_000, "after": 3_000_000_000},
        "macs": {"before": 4_000_000, "after": 1_000_000, "tokens": 64},
        "export_class": "free",
        "calibration": {"source": "wikitext2", "seed": 3, "windows": 144, "length": 2048},
        "held_out_nelbo": {
            "kept": "refit", "dense": 2.0, "plain_removal": 3.0, "refit": 2.5, "windows": 16,
            "loss": {"mean": 0.5, "standard_error": 0.0125},
        },
        "versions": {"structprune": "1.2.3"},
        "removed": {"blocks": [], "attention": [], "channels": []},
        "choice": {"split": "measured", "ratio": 0.4996},
        "search": None,
        "latency": None,
    }  # fmt: skip


def test_numbers(report):
    card = model_card(report)
    assert "# GSAI-ML/LLaDA-8B-Base, 50.0 % of its block projections removed" in card
    assert "| parameters | 8.000 B | 5.000 B | -37.5 % |" in card
    assert "| block projections | 6.000 B | 3.000 B | -50.0 % |" in card
    assert "| MACs | 4.000 M | 1.000 M | -75.0 % |" in card
    assert "| NELBO, nats/token | 2.0000 | 2.5000 | +0.5000 ± 0.0125 |" in card
    flat = " ".join(card.split())
    assert (
        "structprune 1.2.3" in flat and "refitted in closed form (better than plain removal on held-out text)" in flat
    )
    assert "on 16 held-out windows of 2048 tokens" in flat
    assert "`wikitext2` (128 windows of 2048 tokens, seed 3)" in flat  # 144 less the held-out 16
    assert "score `obs` on arm `masked`" in flat and "refit to dense targets" in flat and "Export class: `free`" in flat
    assert "position i predicts token i." in flat and "trust_remote_code=True" in flat


@pytest.mark.slow
@pytest.mark.parametrize("family, call", [("llada", ".generate(ids, "), ("dream", ".diffusion_generate(ids, ")])
def test_the_example_loads_and_generates(report, family, call, tiny_checkpoint, tmp_path, capsys):
    card = model_card(report | {"family": family})
    (example,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    assert call in example
    save_pruned(load_model(tiny_checkpoint(family, **{POSITIONS[family]: 128})), tmp_path / "out")
    exec(example.replace("PATH", str(tmp_path / "out")), {})
    assert len(capsys.readouterr().out) > 64


def test_a_latency_has_a_row(report):
    assert "ms per forward pass" not in model_card(report)
    times = {"batch": 2, "length": 64, "measured": {"before": 20.0, "after": 12.5}}
    card = model_card(report | {"latency": times | {"table": {"identity": {"device": "a processor"}}}})
    assert "| ms per forward pass (batch 2 x 64 tokens, a processor) | 20.000 | 12.500 | -37.5 % |" in card


def test_what_went_as_a_whole_is_named(report):
    assert "as a whole" not in model_card(report)
    report["removed"] = {"blocks": [3], "attention": [0, 2], "channels": [1]}
    said = "Removed as a whole, by the numbers of its blocks: block 3; attention of blocks 0, 2; MLP of block 1.\n\n| |"
    assert said in model_card(report)


@pytest.mark.parametrize(
    "search, said",
    [
        ({"kept": "searched", "rounds": []}, ", then a search, refit"),
        ({"kept": "searched", "order": [], "candidates": []}, ", then a search for whole blocks to drop, refit"),
        ({"kept": "ranked", "order": [], "candidates": []}, "split `measured`, refit"),
    ],
)
def test_a_search_is_named_where_its_plan_is_kept(report, search, said):
    assert said in " ".join(model_card(report | {"search": search}).split())


def test_front_matter_is_what_the_hub_reads(report):
    front = yaml.safe_load(model_card(report).split("---")[1])
    assert front["library_name"] == "transformers" and front["base_model"] == "GSAI-ML/LLaDA-8B-Base"
    assert "structprune" in front["tags"]


def test_local_source_names_no_base_model(report):
    card = model_card(report | {"source": "my-llada"})
    assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_the_base_model_is_the_nearest_on_the_hub(report):
    steps = [
        {"step": "pruned", "source": "GSAI-ML/LLaDA-8B-Base", "share": 0.3},
        {"step": "trained back", "source": "GSAI-ML/LLaDA-8B-Base", "tokens": 1000},
    ]
    front = yaml.safe_load(model_card(report | {"source": "llada-0.3", "lineage": steps}).split("---")[1])
    assert front["base_model"] == "GSAI-ML/LLaDA-8B-Base"


LICENCE = {"license": "other", "license_name": "a: name", "license_link": "https://a.example/LICENSE"}


def test_the_sources_licence_is_named(report):
    report |= {"sparsity": {"total": 0.5}, "score": "wanda"}
    report["held_out_nelbo"] |= {"masked": 2.5}
    for make in (model_card, mask_card):
        front = yaml.safe_load(make(report).split("---")[1])
        assert not any(key.startswith("license") for key in front)
        front = yaml.safe_load(make(report | {"license": LICENCE}).split("---")[1])
        assert {key: front[key] for key in LICENCE} == LICENCE and front["base_model"] == "GSAI-ML/LLaDA-8B-Base"
        front = yaml.safe_load(make(report | {"license": {"license": ["mit", "no"]}}).split("---")[1])
        assert front["license"] == ["mit", "no"]


def test_a_link_to_a_file_needs_the_file(report):
    """Masks come with all of the source's files, a structured output with its tokenizer only."""
    report["held_out_nelbo"] |= {"masked": 2.5}
    report |= {"sparsity": {"total": 0.5}, "score": "wanda", "license": LICENCE | {"license_link": "LICENSE"}}
    assert "license_link: LICENSE\n" in mask_card(report)
    card = model_card(report)
    assert "license_link" not in card and "license: other\n" in card


def test_what_was_refitted_to_which_targets(report):
    report["config"]["reconstruct"] |= {"target": "mixed", "dense_share": 0.25, "stream": 0}
    flat = " ".join(model_card(report).split())
    assert "refit to mixed targets (dense share 0.25; q, k, v, gate and up too, to dense ones)" in flat


def test_dream_and_refit_off(report):
    report["config"]["reconstruct"]["enabled"] = False
    report["held_out_nelbo"] |= {"kept": "plain removal", "refit": None}
    report |= {"family": "dream"}
    flat = " ".join(model_card(report).split())
    assert "position i predicts token i + 1" in flat and "refit off" in flat
    assert "what is left was not refitted." in flat


def test_a_refit_that_lost_and_a_plan_that_was_given(report):
    report["held_out_nelbo"] |= {"kept": "plain removal"}
    flat = " ".join(model_card(report | {"choice": None}).split())
    assert "what is left is as it was (a refit in closed form was no better on held-out text)." in flat
    assert "Made with: a plan that was given, refit to dense targets" in flat and "score `obs`" not in flat


def test_a_local_text_is_named_without_its_place(report):
    report["calibration"]["source"] = "/place/of/mine/notes.txt"
    card = model_card(report)
    assert "calibration on\n`notes.txt` (128 windows" in card and "/place" not in card
    report["calibration"]["source"] = "org/texts"
    assert "`org/texts`" in model_card(report)


def test_a_score_that_needs_no_text(report):
    report["config"]["structured"]["score"] = "magnitude"
    assert "score `magnitude` of the weights, allocation" in model_card(report | {"arm": None})
