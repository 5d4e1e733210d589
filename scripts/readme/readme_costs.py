"""The tables of what things cost: dry runs, weights on disk, attention mass, and masks beside the released code."""

from scripts.readme.readme_common import machine, ranged, table

SIDES = ("predicted", "measured")
SECONDS = ("seconds", "core_seconds")


def cost(inspected: dict, search: dict, mass: dict) -> str:
    """What dry runs take and predict, a search beside its own, and the tiled attention mass against the naive one.

    Args:
        inspected: of scripts/bench/measure_inspect.py. search: of scripts/bench/bench_search.py.
        mass: of scripts/bench/bench_attention_mass.py.
    """
    rows = [
        [name, f"{row['core_seconds']:.1f} s", f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
         f"{row['parameters']['before'] / 1e9:.3f} B → {row['parameters']['after'] / 1e9:.3f} B",
         *(f"{peak / 1e9:.0f} GB" for peak in row["predicted_device_peak_bytes"].values())]
        for name, row in inspected["shapes"].items()
    ]  # fmt: skip
    scores = next(iter(inspected["shapes"].values()))["predicted_device_peak_bytes"]
    header = ["`structprune inspect --ratio 0.5`", "of a core", "its peak memory", "parameters"]
    header += [f"predicted peak of a run on a GPU, `{score}`" for score in scores]
    note = (
        "`python -m scripts.bench.measure_inspect`, from [`inspect.json`](scripts/results/inspect.json);"
        f" {machine(inspected['machine'])}. From config.json alone;"
        " LLaDA2.0-mini has its mask id from `--mask-id`. Peaks are predicted, not measured: bf16, 128 windows of"
        " 4,096 tokens, 10 levels."
    )
    return f"{table(header, rows)}\n\n{note}\n\n{_search(search)}\n\n{_attention_mass(mass)}"


def offload(results: dict) -> str:
    """Runs whose weights stay on disk: peaks beside predictions, times, and what they cost beside holding the weights.

    Args:
        results: of scripts/bench/bench_offload.py.
    """
    header = [
        "size", "run", "weights", "peak memory", "predicted", "predicted / measured", "time", "of a core",
        "waiting for the disk", "read",
    ]  # fmt: skip
    rows = []
    for row in results["rows"]:
        peaks = (f"{row[key] / 1e9:.2f} GB" for key in ("peak_bytes", "predicted_bytes"))
        waiting = max(0.0, row["seconds"] - row["core_seconds"] - row["queued_seconds"]) / row["seconds"]
        rows.append([
            row["size"], row["run"], row["way"], *peaks, f"{row['predicted_bytes'] / row['peak_bytes']:.2f}x",
            f"{row['seconds']:.0f} s", f"{row['core_seconds']:.0f} s", f"{waiting:.0%}",
            f"{row['read_bytes'] / 1e9:.1f} GB",
        ])  # fmt: skip
    pairs = [
        [each["size"], each["run"], f"{each['way']} / {each['against']}", f"{each['peak_bytes_ratio']:.2f}x",
         f"{each['core_seconds_ratio']:.2f}x", f"{each['seconds_ratio']:.2f}x", "yes" if each["same"] else "no"]
        for each in results["compared"]
    ]  # fmt: skip
    names = ["size", "run", "compared", "peak memory", "seconds of a core", "time", "same bytes"]
    volume = results["volume"]
    note = (
        "`python -m scripts.bench.bench_offload`, from [`offload.json`](scripts/results/offload.json): LLaDA shapes"
        f" with random bf16 weights, computed in fp32 on one thread of a shared core; {_machines(results['rows'])}."
        f" {volume['windows']} windows of {volume['window']} tokens at {volume['levels']} levels. Time: with the wait"
        " for the core, which others used too; waiting for the disk: of the time, what is neither that nor"
        " computation. Read: from the disk, beyond what the system's cache held."
    )
    if any(row["way"].endswith("parts") for row in results["rows"]):
        note += " With parts: finished ones are kept beside the output, as the command does by default."
    return f"{table(header, rows)}\n\n{table(names, pairs)}\n\n{note}"


def rehearsal(results: dict) -> str:
    """How soon the rehearsal of every run is over.

    Args:
        results: of scripts/bench/bench_rehearsal.py.
    """
    rows = [
        [row["run"], *(f"{row[span][key]:.0f} s" for span in ("until_over", "rehearsal") for key in SECONDS)]
        for row in results["rows"]
    ]
    header = ["run", "from the start until over", "of a core", "the rehearsal", "of a core"]
    volume, threads = results["volume"], results["machine"]["threads"]
    note = (
        f"`python -m scripts.bench.bench_rehearsal --size {results['size']} --threads {threads}`, from"
        " [`rehearsal.json`](scripts/results/rehearsal.json): a LLaDA shape with random bf16 weights, which stay on"
        f" disk, computed in fp32; windows of {volume['window']} tokens at {volume['levels']} levels;"
        f" {machine(results['machine'])}."
    )
    return f"{table(header, rows)}\n\n{note}"


def _machines(rows: list[dict]) -> str:
    """The machine of most rows, then the others, each with its rows."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(machine(row["machine"]), []).append(f"{row['size']} {row['run']} {row['way']}")
    first, *others = sorted(groups, key=lambda name: -len(groups[name]))
    return "; ".join([first, *(f"{', '.join(groups[name])}: {name}" for name in others)])


def _search(result: dict) -> str:
    header = ["a search", "predicted", "measured", "measured / predicted"]
    sizes = {"levels on disk": result["disk"], "peak memory": result["peak_bytes"]}
    rows = [[name, *(f"{row[side]:.0f} s" for side in SIDES), _ratio(row)] for name, row in result["seconds"].items()]
    rows += [[name, *(f"{row[side] / 1e6:.0f} MB" for side in SIDES), _ratio(row)] for name, row in sizes.items()]
    note = (
        f"`python -m scripts.bench.bench_search`, from [`search_cost.json`](scripts/results/search_cost.json): the"
        f" {result['name']} at {result['settings']['structured.ratio']}, a knapsack with the whole refit;"
        f" {machine(result['machine'])}. Seconds are predicted from operations, at the"
        f" {result['rate'] / 1e9:.0f} GFLOP/s of a product of large matrices, which small ones do not reach."
    )
    return f"{table(header, rows)}\n\n{note}"


def _ratio(row: dict) -> str:
    return f"{row['measured'] / row['predicted']:.2f}x"


def _attention_mass(mass: dict) -> str:
    header = [
        "attention mass, T", "tiled", "naive (T x T)", "time ratio", "memory: tiled", "naive", "memory ratio",
        "block with mass / without",
    ]  # fmt: skip
    rows = []
    for row in mass["rows"]:
        times, peaks = row["median_ms"], row["peak_bytes"]
        rows.append([
            str(row["length"]), f"{times['tiled']:.1f} ms", f"{times['naive']:.1f} ms",
            f"{row['time_ratio']['median']:.2f}x",
            *("?" if peaks[name] is None else f"{peaks[name] / 1e6:.0f} MB" for name in ("tiled", "naive")),
            "?" if row["memory_ratio"] is None else f"{row['memory_ratio']:.1f}x",
            f"{row['forward_ratio']['median']:.2f}x",
        ])  # fmt: skip
    note = (
        "`python -m scripts.bench.bench_attention_mass`, from"
        " [`attention_mass.json`](scripts/results/attention_mass.json); both in one run."
    )
    return f"{table(header, rows)}\n\n{note}"


def speed(results: dict) -> str:
    """Our masks and the released implementation's, where it ran too: time, memory, agreement.

    Args:
        results: of scripts/bench/bench_masking.py.
    """
    header = ["method", "release", "ours", "faster", "memory: release", "ours", "ratio", "masks differ", "in block 0"]
    rows = []
    for row in results["rows"]:
        seconds, peaks, agreement = row["seconds"], row["peak_bytes"], row.get("agreement")
        cells = [row["method"]]
        cells += [f"{seconds[side]['median']:.1f} s" if side in seconds else "-" for side in ("release", "ours")]
        cells.append(ranged(row["times_faster"]) if "times_faster" in row else "-")
        cells += [f"{peaks[side]['median'] / 1e6:.0f} MB" if side in peaks else "-" for side in ("release", "ours")]
        cells.append(f"{row['memory_ratio']:.2f}x" if "memory_ratio" in row else "-")
        differ = ("masks_differ", "first_block_differs")
        rows.append(cells + [f"{agreement[name]:.1e}" if agreement else "-" for name in differ])
    return f"{table(header, rows)}\n\n{speed_note(results)}"


def speed_note(results: dict) -> str:
    """How the figures of `speed` were made, and where the two sides do not agree."""
    size, rows = results["settings"], results["rows"]
    command, on = "python -m scripts.bench.bench_masking", "ours on a"
    if any("release" in row["seconds"] for row in rows):
        command += " --published DIR --python ENVIRONMENT/bin/python"
        commit, digest = size.get("release_commit"), size.get("release_sha256")
        which = f" (commit {commit[:7]})" if commit else f" (SHA-256 {digest[:12]})" if digest else ""
        on = f"the authors' release{which} and ours, in turns, on the same"
    text = (
        f"`{command}`, from [`masking_speed.json`](scripts/results/masking_speed.json): {on} random"
        f" {size['blocks']}-block model of width {size['width']}, {size['windows']} windows of {size['length']} tokens,"
        f" {size['levels']} noise levels, {size['dtype']} ({machine(results['machine'])}); median and range over"
        " rounds; peak memory above the loaded model."
    )
    for row in (row for row in rows if "over_forwards" in row):
        text += f" {row['method']} takes {ranged(row['over_forwards'])} the forward passes it cannot do without."
    agreements = {row["method"]: row["agreement"] for row in rows if "agreement" in row}
    itself = next((each["release_itself"] for each in agreements.values() if "release_itself" in each), None)
    if itself:
        text += (
            " SparseGPT feeds roundings back: on another number of threads, the release's differs from itself in"
            f" {itself['masks_differ']:.1e} of the masks ({itself['first_block_differs']:.1e} in block 0)."
        )
    apart = [f"`{name}`" for name, each in agreements.items() if not each["agree"]]
    if apart:
        text += f" Apart by more than the benchmark allows for rounding: {', '.join(apart)}."
    return text


def processes(results: dict) -> str:
    """Prunings of one process and of two, and what more would save.

    Args:
        results: of scripts/bench/bench_processes.py.
    """
    counts = list(next(iter(results["runs"].values()))["predicted"])
    header = ["a pruning", "one process", "two", "faster", "weights differ", "shared out"]
    header += [f"{count} would" for count in counts]
    rows, phases = [], []
    for name, row in results["runs"].items():
        one, two = row["median"]["1"], row["median"]["2"]
        shared = f"{100 * sum(row['shared'].values()) / one['total']:.0f}%"
        more = [f"{row['predicted'][count]:.2f}x" for count in counts]
        times = [f"{one['total']:.1f} s", f"{two['total']:.1f} s", f"{row['ratio']:.2f}x"]
        rows.append([name, *times, f"{max(row['farthest']):.1g}", shared, *more])
        changes = (f"{phase} {one[phase]:.1f} s to {two.get(phase, 0.0):.1f} s" for phase in one if one[phase] >= 1)
        phases.append(f"{name}: {', '.join(changes)}")
    settings = results["settings"]
    note = (
        "`python -m scripts.bench.bench_processes`, from [`processes.json`](scripts/results/processes.json): the"
        f" embedded model, {settings['calibration.windows']} windows of {settings['calibration.length']} tokens, one"
        f" core for each process, medians of {settings['rounds']} rounds ({machine(results['machine'])}). Weights"
        " differ: the largest relative distance of a tensor, in any round. Shared out: twice what the second process"
        " saves of every phase; from it the time of more follows, without their"
        f" messages. Phases: {'; '.join(phases)}."
    )
    return f"{table(header, rows)}\n\n{note}"
