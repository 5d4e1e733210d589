"""Fill the README's tables from the JSON files in scripts/results, between their markers.

python -m scripts.readme.readme_tables          # rewrite README.md
python -m scripts.readme.readme_tables --check  # exit 1 where README.md differs from the results
"""

import argparse
import json
import re
import sys
from pathlib import Path

from scripts.readme.readme_bench import bench, note, widths, widths_note
from scripts.readme.readme_common import machine, ranged, table
from scripts.readme.readme_evaluation import evaluation, evaluation_speed
from scripts.readme.readme_gpu import gpu
from scripts.readme.readme_sinks import sinks

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "scripts" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def interval(row: dict | None, paired: bool = False) -> str:
    """A mean and half its 95% interval over seeds, where there is one; `paired`: finer, and bold where it is shown."""
    if row is None:
        return "-"
    places = 4 if paired else 3
    half = "" if row["low"] is None else f" ± {(row['high'] - row['low']) / 2:.{places}f}"
    text = f"{row['mean']:+.{places}f}{half}"
    return f"**{text}**" if paired and row["shown"] else text


def over_seeds(settings: dict) -> str:
    """What means and intervals of a study are over."""
    count, drawn = len(settings["seeds"]), "calibration text, noise and evaluation text drawn anew"
    windows = f"{settings['windows']} held-out windows under common noise"
    if count == 1:
        return f"mean over {windows} of one seed, so without an interval"
    return (
        f"mean over {count} seeds ({drawn}; in each, {windows}) ± half the 95% t interval over the means of the seeds"
    )


SHOWN = (
    "positive: the first loses more; bold: the interval over seeds excludes 0 and all seeds agree in sign, which about"
    " one in twenty would do by chance"
)


def demo() -> str:
    """The demo's table: dense, and every method at the saved ratios."""
    found = load("demo.json")
    dense, run = found["dense"], found["run"]
    header = [
        "model",
        "parameters",
        "MACs",
        "on disk",
        "NELBO, nats/token",
        "loss against dense",
        "forward",
        "speed-up",
    ]

    def cells(name: str, row: dict) -> list[str]:
        loss, speed = row.get("loss"), row.get("speedup")
        return [
            name,
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['macs'] / 1e6:.0f} M",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['nelbo']:.3f} ± {row['standard_error']:.3f}",
            f"{loss['mean']:+.3f} ± {loss['standard_error']:.3f}" if loss else "",
            f"{row['latency_ms']:.0f} ms",
            f"{speed['median']:.2f}x" if speed else "",
        ]

    rows = [cells("dense", dense)]
    for row in sorted((row for row in found["rows"] if "bytes" in row), key=lambda row: row["ratio"]):
        name = f"{row['method']}, {row['ratio']}"
        rows.append(cells(f"**{name}**" if row["method"] == "structprune" else name, row))
    note = (
        f"`structprune demo`, from [`demo.json`](scripts/results/demo.json): {run['seconds']:.0f} s in all and"
        f" {run['peak_memory_bytes']['host'] / 1e9:.1f} GB at its peak ({machine(found['machine'])}). NELBO:"
        f" masked-diffusion bound, lower is better, mean ± standard error over {dense['windows']} held-out windows of"
        f" {dense['length']} tokens under common noise, so that the loss is a paired difference. Forward: 16 windows,"
        " fp32, median. FLAP: fluctuation score, one ranking, bias compensation. Magnitude: the same share everywhere,"
        " no refit."
    )
    return f"{table(header, rows)}\n\n{note}"


def quality() -> str:
    """Losses of every variant of the study, then what sinks do."""
    found = load("quality.json")
    by_name: dict[str, dict] = {}
    for row in found["losses"]:
        by_name.setdefault(row["variant"], {})[row["ratio"]] = row
    ratios = sorted({row["ratio"] for row in found["losses"]})
    header = ["variant"] + [text for ratio in ratios for text in (f"loss at {ratio}", "heads gone")]

    def row_of(name: str, title: str) -> list[str]:
        cells = [title]
        for ratio in ratios:
            row = by_name[name][ratio]
            cells += [interval(row), " / ".join(map(str, row["heads_removed"]))]
        return cells

    rows = [
        row_of(name, f"**{name}** (the default)" if name == "obs, masked+sink, refit" else name) for name in by_name
    ]
    lines = []
    for row in (row for row in found["contrasts"] if "sink" in row["variant"]):
        ends = "" if row["low"] is None else f" [{row['low']:+.4f}, {row['high']:+.4f}]"
        gap = f"{row['mean']:+.4f}{ends}"
        lines.append([row["variant"], row["against"], str(row["ratio"]), f"**{gap}**" if row["shown"] else gap])
    note = (
        "`python -m scripts.studies.quality_study`, from"
        " [`quality.json`](scripts/results/quality.json): loss of NELBO on the"
        f" embedded model against dense, nats per token, {over_seeds(found['settings'])}; heads gone: of 40, per seed."
        " The rows below the grid change one thing of `obs, masked, refit`."
    )
    sink_note = f"What weighting by sinks changed, paired ({SHOWN}):"
    sink_table = table(["variant", "against", "ratio", "difference [95% interval]"], lines)
    return f"{table(header, rows)}\n\n{note}\n\n{sink_note}\n\n{sink_table}"


def cost() -> str:
    """Time and memory of `inspect`, and the tiled attention mass against the naive one."""
    found = load("inspect.json")
    rows = [
        [name, f"{row['seconds']:.1f} s", f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
         f"{row['parameters']['before'] / 1e9:.3f} B → {row['parameters']['after'] / 1e9:.3f} B",
         *(f"{peak / 1e9:.0f} GB" for peak in row["predicted_device_peak_bytes"].values())]
        for name, row in found["shapes"].items()
    ]  # fmt: skip
    scores = next(iter(found["shapes"].values()))["predicted_device_peak_bytes"]
    header = ["`structprune inspect --ratio 0.5`", "time", "its peak memory", "parameters"]
    inspected = table([*header, *(f"predicted peak of a run on a GPU, `{score}`" for score in scores)], rows)
    note = (
        "`python -m scripts.bench.measure_inspect`, from [`inspect.json`](scripts/results/inspect.json);"
        f" {machine(found['machine'])}. Predicted, not measured: bf16, 128 windows of 4,096 tokens, 10 levels."
    )
    mass = load("attention_mass.json")
    header = [
        "attention mass, T", "tiled", "naive (T x T)", "time ratio", "memory: tiled", "naive", "memory ratio",
        "block with mass / without",
    ]  # fmt: skip
    lines = []
    for row in mass["rows"]:
        times, peaks = row["median_ms"], row["peak_bytes"]
        lines.append([
            str(row["length"]), f"{times['tiled']:.1f} ms", f"{times['naive']:.1f} ms",
            f"{row['time_ratio']['median']:.2f}x",
            *("?" if peaks[name] is None else f"{peaks[name] / 1e6:.0f} MB" for name in ("tiled", "naive")),
            "?" if row["memory_ratio"] is None else f"{row['memory_ratio']:.1f}x",
            f"{row['forward_ratio']['median']:.2f}x",
        ])  # fmt: skip
    text = (
        "`python -m scripts.bench.bench_attention_mass`, from"
        " [`attention_mass.json`](scripts/results/attention_mass.json); both in one run."
    )
    return f"{inspected}\n\n{note}\n\n{table(header, lines)}\n\n{text}"


def masks() -> str:
    """Losses of every method, arm and ratio, then paired what masked text, sinks, the refit and single changes do."""
    found = load("masks.json")
    ratios = list(dict.fromkeys(row["ratio"] for row in found["losses"]))
    by_name: dict[str, dict] = {}
    for row in found["losses"]:
        by_name.setdefault(row["variant"], {})[row["ratio"]] = row
    changed = {row["variant"] for row in found["contrasts"] if row["question"] == "one change"}
    title = {"sparsegpt, masked, refit": "**sparsegpt, masked, refit** (the default)"}
    lines = [
        [title.get(name, name), *(interval(rows.get(ratio)) for ratio in ratios)]
        for name, rows in by_name.items() if name not in changed
    ]  # fmt: skip
    gaps: dict[tuple[str, str], dict] = {}
    for row in found["contrasts"]:
        gaps.setdefault((row["variant"], row["against"]), {})[row["ratio"]] = row
    rows = [
        [f"{name} - {base}", *(interval(each.get(ratio), True) for ratio in ratios)]
        for (name, base), each in gaps.items()
    ]
    note = (
        "`python -m scripts.studies.mask_study`, from [`masks.json`](scripts/results/masks.json): loss of NELBO on the"
        f" embedded model against dense ({sum(found['dense']) / len(found['dense']):.2f}), nats per token, by removed"
        f" share, {over_seeds(found['settings'])}. Clean is what Wanda and SparseGPT were published with;"
        " `sparsegpt, clean+sink` is the published sink-SparseGPT."
    )
    paired = table(["first - second", *ratios], rows)
    return f"{table(['method, arm', *ratios], lines)}\n\n{note}\n\nPaired differences ({SHOWN}):\n\n{paired}"


def speed() -> str:
    """Masks of ours against the released implementation, where it ran too: time, memory, agreement."""
    found = load("masking_speed.json")
    header = ["method", "release", "ours", "faster", "memory: release", "ours", "ratio", "masks differ", "in block 0"]
    rows = []
    for row in found["rows"]:
        seconds, peaks, agreement = row["seconds"], row["peak_bytes"], row.get("agreement")
        cells = [row["method"]]
        cells += [f"{seconds[side]['median']:.1f} s" if side in seconds else "-" for side in ("release", "ours")]
        cells.append(ranged(row["times_faster"]) if "times_faster" in row else "-")
        cells += [f"{peaks[side]['median'] / 1e6:.0f} MB" if side in peaks else "-" for side in ("release", "ours")]
        cells.append(f"{row['memory_ratio']:.2f}x" if "memory_ratio" in row else "-")
        differ = ("masks_differ", "first_block_differs")
        rows.append(cells + [f"{agreement[name]:.1e}" if agreement else "-" for name in differ])
    return f"{table(header, rows)}\n\n{speed_note(found)}"


def speed_note(found: dict) -> str:
    """How the figures of `speed` were made, and in what the two sides do not agree."""
    size, rows = found["settings"], found["rows"]
    command, on = "python -m scripts.bench.bench_masking", "ours on a"
    if any("release" in row["seconds"] for row in rows):
        command += " --published DIR --python ENVIRONMENT/bin/python"
        commit, digest = size.get("release_commit"), size.get("release_sha256")
        which = f" (commit {commit[:7]})" if commit else f" (SHA-256 {digest[:12]})" if digest else ""
        on = f"the authors' release{which} and ours, in turns, on the same"
    text = (
        f"`{command}`, from [`masking_speed.json`](scripts/results/masking_speed.json): {on} random"
        f" {size['blocks']}-block model of width {size['width']}, {size['windows']} windows of {size['length']} tokens,"
        f" {size['levels']} noise levels, {size['dtype']} ({machine(found['machine'])}); median and range over rounds;"
        " peak memory above the loaded model."
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


SECTIONS = {
    "demo": demo,
    "quality": quality,
    "cost": cost,
    "masks": masks,
    "speed": speed,
    "evaluation": lambda: evaluation(load("evaluation.json")),
    "sinks": lambda: sinks(
        load("sinks_embedded.json"), load("sinks_smollm2.json"), load("sinks_untrained.json"), load("sinks_cost.json")
    ),
    "evaluation-speed": lambda: evaluation_speed(load("evaluation_speed.json")),
    "bench": lambda: bench(load("bench_cpu.json")) + "\n\n" + note(load("bench_cpu.json")),
    "widths": lambda: widths(load("widths.json")) + "\n\n" + widths_note(load("widths.json")),
    "gpu": lambda: gpu(RESULTS),
}
LATER = {
    "masks": "masks.json",
    "speed": "masking_speed.json",
    "evaluation": "evaluation.json",
    "sinks": "sinks_embedded.json",
    "evaluation-speed": "evaluation_speed.json",
    "bench": "bench_cpu.json",
    "widths": "widths.json",
}  # left as they are until measured and marked


def filled(readme: str) -> str:
    """`readme` with every marked section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        marked = pattern.search(readme)
        if name in LATER and not (marked and (RESULTS / LATER[name]).exists()):
            continue
        if not marked:
            raise SystemExit(f"README.md has no section marked '{name}'")
        readme = pattern.sub(lambda match: f"{match[1]}\n{make()}\n\n{match[2]}", readme)
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 where it would")
    options = parser.parse_args()
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if options.check:
        sys.exit(0 if after == before else "README.md differs: run python -m scripts.readme.readme_tables")
    path.write_text(after, encoding="utf-8")
    print(f"Wrote {path.name}")


if __name__ == "__main__":
    main()
