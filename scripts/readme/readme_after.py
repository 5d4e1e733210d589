"""The tables of docs/after-pruning.md: packed masks, llama.cpp against torch, and quantised models."""

from scripts.readme.readme_common import machine, table


def gguf(results: dict) -> str:
    """How llama.cpp's logits and texts compare with torch's.

    Args:
        results: of scripts/tools/check_gguf.py.
    """
    header = ["checkpoint", "dtype", "file", "largest difference", "same argmax", "same tokens written"]
    rows = [
        [
            f"{row['checkpoint']} ({row['family']}, {row['class']})", f"`{row['dtype']}`",
            f"{row['bytes'] / 1e6:.1f} MB", f"{row['largest_difference']:.2g} of {row['largest_logit']:.0f}",
            f"{row['agreement']:.1%}", f"{row['equal_tokens']:.0%}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    settings = results["settings"]
    split = all(row["tokens_equal"] for row in results["rows"])
    text = (
        "`python -m scripts.tools.check_gguf`, from [`gguf.json`](scripts/results/gguf.json): llama-cpp-python"
        f" {settings['llama-cpp-python']} on CPU against torch in fp32 ({machine(results['machine'])}), logits of a"
        f" text with {settings['written']} masked tokens after it. Written: those tokens, revealed one by one, the"
        " surest first, by either's logits; a single other choice changes all that follow."
        + " Both split the text into the same tokens."
        * split
    )
    return f"{table(header, rows)}\n\n{text}"


def packed(results: dict) -> str:
    """Which releases read packed masks as they were.

    Args:
        results: of scripts/tools/check_packed.py.
    """
    header = ["transformers", "compressed-tensors", "2:4", "others", "saved again and loaded"]
    groups: dict[tuple, list[dict]] = {}
    for row in results["rows"]:
        releases = (row["versions"]["transformers"], row["versions"]["compressed-tensors"])
        groups.setdefault(releases, []).append(row)
    layouts = ("sparse-24-bitmask", "sparse-bitmask")
    rows = [
        [*releases, *(_outcome([row for row in found if row["layout"] == layout]) for layout in layouts), _saved(found)]
        for releases, found in groups.items()
    ]
    sizes = [
        f"{row['plain_bytes'] / 1e6:.2f} to {row['written_bytes'] / 1e6:.2f} MB ({row['case']})"
        for row in results["rows"]
    ]
    text = (
        "`python -m scripts.tools.check_packed`, from [`packed.json`](scripts/results/packed.json): the embedded LLaDA"
        " in bf16 and a tiny random Dream in fp32, half of every projection at zero. Equal: every tensor, bit for bit,"
        " and all logits are those of the plain export, through `AutoModelForCausalLM` and `AutoModel`. Refused: by the"
        f" code beside the weights, in one line. All weights together went from {', '.join(dict.fromkeys(sizes))}."
    )
    return f"{table(header, rows)}\n\n{text}"


def _outcome(rows: list[dict]) -> str:
    """What became of the checkpoints of one layout."""
    if all("refused" in row for row in rows):
        return "refused"
    exact = all(row.get("tensors_that_differ") == 0 and row.get("logits") == 0 for row in rows)
    return "equal" if exact else "wrong"


def _saved(rows: list[dict]) -> str:
    """What became of checkpoints that were read and saved again."""
    return ", ".join(dict.fromkeys(row["saved_again"] for row in rows if "saved_again" in row)) or "-"


def quantised(results: dict) -> str:
    """Bytes and loss of quantised models.

    Args:
        results: of scripts/bench/bench_quantised.py.
    """
    header = ["checkpoint", "form", "file", "loss against dense", "difference after a reload"]
    rows = [[_name(row["checkpoint"]), row["form"], *_figures(row)] for row in results["rows"]]
    settings = results["settings"]
    releases = ", ".join(f"{name} {release}" for name, release in settings["versions"].items() if release)
    text = (
        "`python -m scripts.bench.bench_quantised`, from [`quantised.json`](scripts/results/quantised.json):"
        f" {releases}; loss of NELBO against the dense model in fp32, nats per token, mean ± standard error over"
        f" {settings['windows']} held-out windows of {settings['length']} tokens, after save_pretrained and"
        f" from_pretrained ({machine(results['machine'])}). Embedding and LM head, much of so small a model, stay bf16."
    )
    return f"{table(header, rows)}\n\n{text}"


def _name(checkpoint: str) -> str:
    return {"dense": "dense", "pruned-at-0_5": "pruned at 0.5"}.get(checkpoint, checkpoint)


def _figures(row: dict) -> tuple[str, str, str]:
    if "refused" in row:
        return "-", f"refused: {row['refused']}", "-"
    loss = f"{row['loss']['mean']:+.4f} ± {row['loss']['standard_error']:.4f}"
    return f"{row['bytes'] / 1e6:.2f} MB", loss, f"{row['reload_difference']:g}"


def exports(results: dict) -> str:
    """What happens to every export class on its way.

    Args:
        results: of scripts/tools/check_exports.py.
    """
    header = [
        "pruned model",
        "class",
        "layout after `save_pretrained`",
        "structprune",
        "exported",
        "loaded elsewhere",
        "GGUF",
    ]
    rows = [
        [
            ", ".join(row["case"].rsplit("-", 1)), f"`{row['class']}`", "the same" if row["layout_kept"] else "another",
            *(f"{value:g}" for value in row["differences"].values()), "written" if row["gguf"] == "written" else "no",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    moved = min(row["changed_by_training"] for row in results["rows"])
    text = (
        "`python -m scripts.tools.check_exports`, from [`exports.json`](scripts/results/exports.json): tiny random"
        " models of the official layouts, pruned, loaded by transformers with the code beside the weights, trained for"
        f" {results['settings']['steps']} steps (which moves logits by {moved:.2g} at least), saved by"
        " `save_pretrained`, and exported. Largest differences of logits from the trained model's. gaps: halves of"
        " blocks are gone; depth: a whole block; kept: nothing."
    )
    return f"{table(header, rows)}\n\n{text}"
