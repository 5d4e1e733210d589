"""The README's tables of latency: dense against pruned, forward and generation, and what odd widths cost."""

from readme_common import machine, table

CACHES = {"none": "full recomputation", "prefix": "prefix cache", "dual": "dual cache"}


def bench(found: dict, sized: bool = False) -> str:
    """Speed-up and share of the ideal saving of every pruned model.

    Args:
        found: of scripts/bench_pruned.py, or `forward` and `generation` of scripts/gpu_report.py.
        sized: say batch and length of every row.
    """
    header = [
        "",
        "model",
        "median",
        "tokens/s",
        "speed-up",
        "MACs removed",
        "share of the ideal saving",
        "peak above weights",
    ]
    rows = []
    for part, title in (("forward", "forward"), ("generation", "generation")):
        for row in found[part]:
            name = title if part == "forward" else f"{title}, {CACHES[row['cache']]}"
            if sized:
                name += f", {row['batch']} x {row['length']}"
            if row["mode"] != "eager":
                name += f", {row['mode']}"
            own = [f"{row['ms']['median']:.{int(sized)}f} ms", f"{row['tokens_per_second']:.1f}"]
            gain = ["", "", ""]
            if "speedup" in row:
                share = row["ideal_share"]
                gain = [_spread(row["speedup"], "x"), f"{row['macs_removed']:.1%}", _percent(share) if share else ""]
            peak = row["peak_above_weights"]
            rows.append([name, row["model"], *own, *gain, "" if peak is None else f"{peak / 1e6:.0f} MB"])
    return table(header, rows)


def note(found: dict) -> str:
    """How the figures of `bench` were made."""
    dense, settings = found["models"][0], found["settings"]
    widths = dense["widths"]
    sampler = settings["sampler"]
    runs = [
        f"{row['seconds']:.0f} s at {row['asked']}, {row['forward_share']:.0%} of it forward passes"
        for row in found["pruning"]
    ]
    size = found["calibration"]
    command = f"scripts/bench_pruned.py --windows {size['windows']} --rounds {settings['rounds']}"
    equal = [row["agreement"] for row in found["generation"] if row["agreement"] is not None]
    agreement = ""
    if equal:
        agreement = (
            f" With a cache {min(equal):.0%} to {max(equal):.0%} of the tokens are those of full recomputation: nothing"
            " to go by, as the weights are random."
        )
    pruning = f" Pruning itself ({size['windows']} windows of {size['window']} tokens, {size['levels']} levels): {'; '.join(runs)}."
    return (
        f"`python {command}`, from [`bench_cpu.json`](scripts/results/bench_cpu.json): a random LLaDA of"
        f" {dense['parameters'] / 1e6:.0f} M parameters ({len(widths)} blocks, {widths[0]['query_heads']} heads,"
        f" {widths[0]['channels']} channels), pruned by structprune and reloaded, {dense['dtype']},"
        f" {machine(found['machine'])}, {found['machine']['threads']} thread; models in turns, median and quartiles. Generation: {sampler['gen_length']} tokens in"
        f" {sampler['steps']} steps. Ideal: time in proportion to the MACs, attention and LM head counted;"
        f" (1 - 1 / speed-up) over the share of MACs removed.{agreement}{pruning}"
    )


def widths(found: dict) -> str:
    """What MLP widths that are no multiples of 128 cost.

    Args:
        found: of scripts/bench_widths.py.
    """
    rows = [[alignment, f"{cost:+.1%}"] for alignment, cost in found["costs"].items()]
    return table(["MLP widths that are multiples of", "cost over the line between multiples of 128"], rows)


def widths_note(found: dict) -> str:
    """How the figures of `widths` were made."""
    size, where = found["settings"], found["machine"]
    return (
        "`python scripts/bench_widths.py`, from [`widths.json`](scripts/results/widths.json): a gated MLP on"
        f" {size['tokens']} x {size['hidden']} inputs, {size['dtype']} ({machine(where)}, {where['threads']} threads). Pruned"
        " MLPs keep multiples of 128 where they are wide enough (`structured.round_to`), for GPUs."
    )


def _spread(value: dict, unit: str) -> str:
    return f"{value['median']:.2f}{unit} ({value['p25']:.2f} to {value['p75']:.2f})"


def _percent(value: dict) -> str:
    return f"{100 * value['median']:.0f}% ({100 * value['p25']:.0f} to {100 * value['p75']:.0f})"
