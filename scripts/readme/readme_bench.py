"""The tables of latency: dense against pruned, forward and generation, and what odd widths cost."""

from scripts.readme.readme_common import machine, table

CACHES = {"none": "full recomputation", "prefix": "prefix cache", "dual": "dual cache"}


def bench(results: dict, sized: bool = False) -> str:
    """Speed-up and share of the ideal saving of every pruned model.

    Args:
        results: of scripts/bench/bench_pruned.py, or `forward` and `generation` of scripts/gpu/gpu_report.py.
        sized: name batch and length in every row.
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
        for row in results[part]:
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


def note(results: dict) -> str:
    """How the figures of `bench` were made, with the options that say so."""
    dense, settings, size = results["models"][0], results["settings"], results["calibration"]
    blocks, sampler = dense["widths"], settings["sampler"]
    rounds, generations = settings["rounds"], settings["generation_rounds"]
    counts = f"--split {size['split']} --windows {size['windows']} --rounds {rounds}"
    command = f"python -m scripts.bench.bench_pruned {counts}"
    return (
        f"`{command} --generation-rounds {generations}`, from [`bench_cpu.json`](scripts/results/bench_cpu.json): a"
        f" random LLaDA of {dense['parameters'] / 1e6:.0f} M parameters ({len(blocks)} blocks,"
        f" {blocks[0]['query_heads']} heads, {blocks[0]['channels']} channels), pruned by structprune and reloaded,"
        f" {dense['dtype']}, batch {settings['batches'][0]}, {settings['lengths'][0]} tokens,"
        f" {machine(results['machine'])}, threads: {results['machine']['threads']}; models in turns, median and"
        f" quartiles of {rounds} passes and {generations} generations of {sampler['gen_length']} tokens in"
        f" {sampler['steps']} steps, blocks of {sampler['block_length']}. Ideal: time in proportion to the MACs,"
        f" attention and LM head counted; (1 - 1 / speed-up) over the share of MACs removed."
        f"{_agreement(results['generation'])}{_pruning(results['pruning'], size)}"
    )


def _agreement(rows: list[dict]) -> str:
    """What a cache changes, where one was measured."""
    equal = [row["agreement"] for row in rows if row["agreement"] is not None]
    if not equal:
        return ""
    return (
        f" With a cache {min(equal):.0%} to {max(equal):.0%} of the tokens are those of full recomputation: nothing"
        " to go by, as the weights are random."
    )


def _pruning(runs: list[dict], size: dict) -> str:
    parts = [
        f"{row['seconds']:.0f} s at {row['asked']}, {row['forward_share']:.0%} of it forward passes" for row in runs
    ]
    volume = f"{size['windows']} windows of {size['window']} tokens, {size['levels']} levels"
    return f" Pruning itself ({volume}): {'; '.join(parts)}."


def widths(results: dict) -> str:
    """What MLP widths that are no multiples of 128 cost.

    Args:
        results: of scripts/bench/bench_widths.py.
    """
    rows = [[alignment, f"{cost:+.1%}"] for alignment, cost in results["costs"].items()]
    return table(["MLP widths that are multiples of", "cost over the line between multiples of 128"], rows)


def widths_note(results: dict) -> str:
    """How the figures of `widths` were made."""
    size, where = results["settings"], results["machine"]
    return (
        "`python -m scripts.bench.bench_widths`, from [`widths.json`](scripts/results/widths.json): a gated MLP on"
        f" {size['tokens']} x {size['hidden']} inputs, {size['dtype']} ({machine(where)}, {where['threads']} threads)."
        " Pruned MLPs keep multiples of 128 where they are wide enough (`structured.round_to`), for GPUs."
    )


def _spread(value: dict, unit: str) -> str:
    return f"{value['median']:.2f}{unit} ({value['p25']:.2f} to {value['p75']:.2f})"


def _percent(value: dict) -> str:
    return f"{100 * value['median']:.0f}% ({100 * value['p25']:.0f} to {100 * value['p75']:.0f})"


def decoding(results: dict) -> str:
    """What every form of decoding saves, and what it changes.

    Args:
        results: of scripts/bench/bench_decoding.py.
    """
    header = ["decoding", "passes a token", "speed-up", "equal tokens", "NELBO of the text"]
    rows = [
        [
            row["form"], f"{row['passes_per_token']:.2f}", f"{row['speedup']:.2f}x", f"{row['equal']:.1%}",
            f"{row['nelbo']:.2f}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    size = results["sizes"]
    text = (
        "`python -m scripts.bench.bench_decoding`, from [`decoding.json`](scripts/results/decoding.json):"
        f" {size['openings']} openings of {size['opening']} tokens of `{results['text']}`, {size['tokens']} tokens"
        f" after each, blocks of {size['block_length']}, one opening at a time, {results['name']}, fp32"
        f" ({machine(results['machine'])}). Speed-up: against the first row, in turns with it, median over"
        f" {size['rounds']} rounds, beside other work. Equal tokens: at the same place as in the first row. NELBO: of"
        " the text under the model that wrote it, given the opening, nats per token."
    )
    return f"{table(header, rows)}\n\n{text}"
