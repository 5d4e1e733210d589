"""The tables of published methods beside ours: losses, fidelity and generation at every ratio, and differences."""

from statistics import fmean

from scripts.readme.readme_common import table
from scripts.readme.readme_studies import interval, over_seeds, paired


def baselines(results: dict) -> str:
    """A table per ratio, and the paired differences.

    Args:
        results: of scripts/studies/baseline_study.py.
    """
    ratios = list(dict.fromkeys(row["ratio"] for row in results["losses"]))
    nelbo = fmean(each["generated_nelbo"] for each in results["dense"])
    parts = []
    for ratio in ratios:
        lines = [_cells(row) for row in results["losses"] if row["ratio"] == ratio]
        header = [f"at {ratio}", "loss", "KL", "agreement", "tokens kept", "NELBO of generated"]
        parts.append(table(header, lines))
    note = (
        "`python -m scripts.studies.baseline_study`, from [`baselines.json`](scripts/results/baselines.json): loss of"
        f" NELBO on `{results['settings']['checkpoint']['name']}` against dense, nats per token,"
        f" {over_seeds(results['settings'])}. KL to the dense model, nats, and agreement with it: at the masked"
        " positions. Tokens kept: of greedy continuations of 24 openings, those that the dense model's have at the same"
        f" place. NELBO of generated: of what is generated, under the dense model, whose own has {nelbo:.2f} nats per"
        " token. All with 160 calibration windows of one noisy copy each, and 40 held-out ones. Wanda-sp and the Taylor"
        " score: the same share everywhere, no refit; FLAP: its bias. LLM-Pruner's fine-tuning is left out."
    )
    return "\n\n".join([*parts, note, paired(results["contrasts"], ratios)])


def _cells(row: dict) -> list[str]:
    kl, agreement, kept, nelbo = (fmean(row[key]) for key in ("kl", "agreement", "tokens_kept", "generated_nelbo"))
    shares = [f"{100 * share:.1f}%" for share in (agreement, kept)]
    return [row["variant"], interval(row), f"{kl:.3f}", *shares, f"{nelbo:.2f}"]
