"""Fill the README's tables from the JSON files in scripts/results, between their markers.

python scripts/readme_tables.py          # rewrite README.md
python scripts/readme_tables.py --check  # exit 1 where README.md differs from the results
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, first column left, others right."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))


def machine(found: dict) -> str:
    return f"{found['processor']}, {found['cores']} cores, torch {found['torch']}"


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
        f" {run['peak_memory_bytes']['host'] / 1e9:.1f} GB at its peak ({machine(found['machine'])}). NELBO: masked-diffusion"
        f" bound, lower is better, mean ± standard error over {dense['windows']} held-out windows of {dense['length']} tokens"
        " under common noise, so that the loss is a paired difference. Forward: 16 windows, fp32, median. FLAP: fluctuation"
        " score, one ranking, bias compensation. Magnitude: the same share everywhere, no refit."
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
            half = (row["high"] - row["low"]) / 2
            cells += [f"{row['mean']:+.3f} ± {half:.3f}", " / ".join(map(str, row["heads_removed"]))]
        return cells

    rows = [
        row_of(name, f"**{name}** (the default)" if name == "obs, masked+sink, refit" else name) for name in by_name
    ]
    sinks = [row for row in found["contrasts"] if "sink" in row["variant"]]
    lines = []
    for row in sinks:
        shown = "" if row["low"] * row["high"] > 0 else " (no difference shown)"
        gap = f"{row['mean']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]{shown}"
        lines.append([row["variant"], row["against"], str(row["ratio"]), gap])
    settings = found["settings"]
    note = (
        "`python scripts/quality_study.py`, from [`quality.json`](scripts/results/quality.json): loss of NELBO on the embedded"
        f" model against dense, nats per token, with 95% intervals over {settings['windows']} held-out windows x"
        f" {len(settings['seeds'])} seeds (text, noise and evaluation), common noise; heads gone: of 40, per seed. The rows"
        " below the grid change one thing of `obs, masked, refit`."
    )
    sink_note = "What weighting by sinks changed, paired (positive: worse than without):"
    sink_table = table(["variant", "against", "ratio", "difference [95% interval]"], lines)
    return f"{table(header, rows)}\n\n{note}\n\n{sink_note}\n\n{sink_table}"


def cost() -> str:
    """Time and memory of `inspect`, and the tiled attention mass against the naive one."""
    found = load("inspect.json")
    rows = [
        [name, f"{row['seconds']:.1f} s", f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
         f"{row['parameters']['before'] / 1e9:.3f} B → {row['parameters']['after'] / 1e9:.3f} B"]
        for name, row in found["shapes"].items()
    ]  # fmt: skip
    inspected = table(["`structprune inspect --ratio 0.5`", "time", "peak memory", "parameters"], rows)
    note = f"`python scripts/measure_inspect.py`, from [`inspect.json`](scripts/results/inspect.json); {machine(found['machine'])}."
    mass = load("attention_mass.json")
    header = [
        "attention mass, T",
        "tiled",
        "naive (T x T)",
        "time ratio",
        "memory: tiled",
        "naive",
        "memory ratio",
        "block with mass / without",
    ]
    lines = []
    for row in mass["rows"]:
        times, peaks = row["median_ms"], row["peak_bytes"]
        lines.append([
            str(row["length"]), f"{times['tiled']:.1f} ms", f"{times['naive']:.1f} ms", f"{row['time_ratio']['median']:.2f}x",
            f"{peaks['tiled'] / 1e6:.0f} MB", f"{peaks['naive'] / 1e6:.0f} MB", f"{row['memory_ratio']:.1f}x",
            f"{row['forward_ratio']['median']:.2f}x",
        ])  # fmt: skip
    text = "`python scripts/bench_attention_mass.py`, from [`attention_mass.json`](scripts/results/attention_mass.json); both in one run."
    return f"{inspected}\n\n{note}\n\n{table(header, lines)}\n\n{text}"


SECTIONS = {"demo": demo, "quality": quality, "cost": cost}


def filled(readme: str) -> str:
    """`readme` with every marked section made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
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
        sys.exit(0 if after == before else "README.md differs from scripts/results: run scripts/readme_tables.py")
    path.write_text(after, encoding="utf-8")
    print(f"Wrote {path.name}")


if __name__ == "__main__":
    main()
