"""The tables of trainings: variants at equal tokens, gradual against one shot, and a checkpoint of one's own."""

from statistics import fmean, median

from scripts.readme.readme_checkpoint import generation_note, generation_table, heading, loss_table
from scripts.readme.readme_common import machine, table
from scripts.readme.readme_studies import by_variant, interval, over_seeds, paired

PARTS = ("student weights", "teacher weights", "gradients and optimiser", "activations of a pass")


def trainings(results: dict) -> str:
    """What every variant of a training loses and keeps, and the paired differences.

    Args:
        results: of scripts/studies/recovery_study.py.
    """
    tokens = f"{results['settings']['tokens']:,} tokens in all stages together where not said otherwise."
    return _variants(results, "training", f"{_study(results, 'recovery')} {tokens} {_generated(results)}")


def recipe(results: dict) -> str:
    """What widths, ranked or searched, lose before and after a training, and the paired differences.

    Args:
        results: of scripts/studies/recipe_study.py.
    """
    tokens = f"Trained: on {results['settings']['tokens']:,} tokens, block by block first."
    return _variants(results, "model", f"{_study(results, 'recipe')} {tokens} {_generated(results)}")


def gradual(results: dict) -> str:
    """One shot and a gradual schedule at equal tokens, and the paired differences.

    Args:
        results: of scripts/studies/gradual_study.py.
    """
    settings, ratios = results["settings"], list(dict.fromkeys(row["ratio"] for row in results["losses"]))
    header = ["schedule", *(each for ratio in ratios for each in (*_columns(ratio), "removed"))]
    lines = []
    for name, losses in by_variant(results["losses"]).items():
        removed = {ratio: f"{100 * fmean(losses[ratio]['removed']):.1f}%" for ratio in ratios}
        lines.append([name, *(each for ratio in ratios for each in (*_cells(losses[ratio]), removed[ratio]))])
    note = (
        f"`python -m scripts.studies.gradual_study --text {settings['text']}`, from"
        " [`gradual.json`](scripts/results/gradual.json): loss of NELBO on the embedded model against dense, nats per"
        f" token, {over_seeds(settings)}. {settings['tokens']:,} tokens in a whole schedule: gradual prunes at 0.3"
        " first, and goes on through the ratios up to its own, trained back after each. Seconds: all prunings and"
        " trainings."
    )
    return f"{table(header, lines)}\n\n{note}\n\n{paired(results['contrasts'], ratios)}"


def checkpoint_trainings(results: dict, file: str = "checkpoint_recovery") -> str:
    """A table per evaluation text of a pretrained checkpoint, before and after, what it generates, and differences.

    Args:
        results: of scripts/studies/checkpoint_recovery.py. file: their name.
    """
    settings = results["settings"]
    rows = {(row["variant"], row["text"], row["ratio"]): row for row in results["losses"]}
    variants, texts, ratios = (list(dict.fromkeys(each)) for each in zip(*rows, strict=True))
    parts = [part for text in texts for part in (heading(results, text), loss_table(rows, variants, text, ratios))]
    parts += [_checkpoint_note(results, file, ratios), generation_table(results["generation"], ratios)]
    parts.append(generation_note(results["generation"]))
    if len(settings["seeds"]) == 1:
        parts.append("With one seed there is no interval, and no difference below is shown.")
    contrasts = [row | {"ratio": f"{row['text']}, {row['ratio']}"} for row in results["contrasts"]]
    return "\n\n".join([*parts, paired(contrasts, [f"{text}, {ratio}" for text in texts for ratio in ratios])])


def plans(results: dict) -> str:
    """Predicted memory and time of the recoveries in configs/recover.

    Args:
        results: of scripts/bench/predict_recovery.py.
    """
    parts = [name for name in PARTS if all(name in row["memory"] for row in results["shapes"].values())]
    header = ["", *(f"{name}, GB" for name in parts), "peak, GB", "tokens", "operations", "hours"]
    lines = []
    for name, row in results["shapes"].items():
        memory, cost = row["memory"], row["cost"]
        sizes = [f"{memory[part] / 1e9:.1f}" for part in [*parts, "peak"]]
        hours = f"{sum(cost['seconds'].values()) / 3600:.1f}"
        operations = f"{sum(cost['operations'].values()):.1e}"
        lines.append([f"{name}, `{row['config']}`", *sizes, f"{row['tokens'] / 1e6:.0f} M", operations, hours])
    note = (
        "`python -m scripts.bench.predict_recovery`, from"
        f" [`recovery_plan.json`](scripts/results/recovery_plan.json): models pruned at {results['ratio']}, both in"
        f" bfloat16 on the device. Hours at {results['rate']:.0e} operations a second, about what bf16 passes reach on"
        " an A100. Predicted, not measured."
    )
    return f"{table(header, lines)}\n\n{note}"


def kills(results: dict) -> str:
    """What commands that were killed had kept, what it cost, and whether the same came out.

    Args:
        results: of scripts/tools/check_kills.py.
    """
    header = ["command", "undisturbed", "kills", "kept by then", "most time lost", "same bytes", "same figures"]
    lines = []
    for name, result in results["commands"].items():
        rows = [row for row in result["rows"] if row["again"]]  # at other moments the output was there
        same = [f"{sum(row[key] for row in rows)} of {len(rows)}" for key in ("same_bytes", "same_figures")]
        lost = max(row["lost"] for row in rows)
        amounts = sorted((row["kept"] for row in rows), key=_amount)
        kept = f"{amounts[0]} to {amounts[-1]}"
        lines.append([name, f"{result['undisturbed']:.0f} s", str(len(rows)), kept, f"{lost:.0f} s", *same])
    note = (
        "`python -m scripts.tools.check_kills`, from [`kills.json`](scripts/results/kills.json): commands on the"
        " embedded model, killed with SIGKILL at random moments before their output was there, and given again. Seconds"
        f" with start-up, beside other work ({_machines(results['commands'])}); time lost counts what that"
        " grew by. Bytes: of all files but those that tell seconds. Figures: of the report, without seconds."
    )
    return f"{table(header, lines)}\n\n{note}"


def _machines(results: dict[str, dict]) -> str:
    """The machines that commands were measured on, each with its commands where there are several."""
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        groups.setdefault(machine(result["machine"]), []).append(name)
    return next(iter(groups)) if len(groups) == 1 else "; ".join(f"{', '.join(v)}: {k}" for k, v in groups.items())


def _amount(kept: str) -> tuple[int, int]:
    """How much was kept: "nothing", "2 parts" or "1 block", then "step 4"."""
    digits = "".join(letter for letter in kept if letter.isdigit())
    return int(kept.startswith("step")), int(digits or 0)


def _variants(results: dict, title: str, note: str) -> str:
    """A row per variant under a title, and the paired differences."""
    ratios = list(dict.fromkeys(row["ratio"] for row in results["losses"]))
    header = [title, *(each for ratio in ratios for each in _columns(ratio))]
    lines = [
        [name, *(each for ratio in ratios for each in _cells(losses[ratio]))]
        for name, losses in by_variant(results["losses"]).items()
    ]
    where = machine(results["machine"])
    note = f"{note} Seconds: of a training, median, on one thread beside other work ({where})."
    return f"{table(header, lines)}\n\n{note}\n\n{paired(results['contrasts'], ratios)}"


def _study(results: dict, name: str) -> str:
    """The command of a study of the embedded model, its file, and what its losses are."""
    settings = results["settings"]
    dense = fmean(each["nelbo"] for each in results["dense"])
    return (
        f"`python -m scripts.studies.{name}_study --text {settings['text']}`, from"
        f" [`{name}.json`](scripts/results/{name}.json): loss of NELBO on the embedded model against dense"
        f" ({dense:.2f}), nats per token, {over_seeds(settings)}."
    )


def _columns(ratio: str) -> list[str]:
    return [f"loss at {ratio}", "tokens kept", "NELBO of generated", "seconds"]


def _cells(row: dict) -> list[str]:
    share, nelbo = fmean(row["tokens_kept"]), fmean(row["generated_nelbo"])
    return [interval(row), f"{100 * share:.1f}%", f"{nelbo:.2f}", f"{median(row['seconds']):.0f}"]


def _generated(results: dict) -> str:
    own = fmean(each["generated_nelbo"] for each in results["dense"])
    return (
        "Tokens kept: of those that the dense model generates greedily after openings of held-out text, the ones at"
        f" the same place. NELBO of generated: under the dense model, whose own text has {own:.2f}."
    )


def _checkpoint_note(results: dict, file: str, ratios: list[str]) -> str:
    settings = results["settings"]
    names = " ".join(f"--eval {name}={path}" for name, path in settings["texts"].items())
    counts = [keys["blocks.tokens"] + keys["train.tokens"] for keys in results["variants"].values() if keys]
    tokens = " ".join(f"--tokens {count}" for count in counts)
    name, text = settings["checkpoint"]["name"], settings["base"]["calibration.source"]
    precision = settings["train"].get("train.precision")
    options = "".join(f" --ratio {ratio}" for ratio in ratios if len(ratios) == 1)
    options += f" --precision {precision}" if precision else ""
    options += f" --out scripts/results/{file}.json" if file != "checkpoint_recovery" else ""
    seconds = {
        f"{row['variant']} at {row['ratio']}": median(each["training"] for each in row["seconds"])
        for row in results["losses"]
        if row["text"] == next(iter(results["dense"])) and row["seconds"][0]
    }
    times = ", ".join(f"{title} {value / 60:.0f} min" for title, value in seconds.items())
    return (
        f"`python -m scripts.studies.checkpoint_recovery --checkpoint DIR --name {name} --text {text} {names} {tokens}"
        f"{options} --seeds {len(settings['seeds'])}`, from"
        f" [`{file}.json`](scripts/results/{file}.json): loss of NELBO on {name} against"
        f" dense, nats per token, {over_seeds(settings)}. KL and agreement as above. A training with its checks, on one"
        f" thread beside other work ({machine(results['machine'])}): {times}."
    )
