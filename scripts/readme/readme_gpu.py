"""The GPU tables, from the files of scripts/gpu/gpu_report.py; or the sentence that there are none yet."""

import json
from pathlib import Path

from scripts.readme.readme_bench import bench, widths
from scripts.readme.readme_common import table

PREFIX = "gpu_"
OWED = (
    "No GPU figures yet: they are owed. `python -m scripts.gpu.gpu_report` was run at a small size on CPU only; its"
    " tables appear here once its results are in `scripts/results`."
)


def gpu(folder: Path) -> str:
    """Tables of every shape measured, stage by stage, and what of it is missing."""
    shapes: dict[str, dict[str, dict]] = {}
    for path in sorted(folder.glob(f"{PREFIX}*_*.json")):
        shape, stage = path.stem.removeprefix(PREFIX).rsplit("_", 1)
        shapes.setdefault(shape, {})[stage] = json.loads(path.read_text(encoding="utf-8"))
    return "\n\n".join(_shape(shape, stages) for shape, stages in shapes.items()) or OWED


def _shape(shape: str, stages: dict[str, dict]) -> str:
    machines = {json.dumps(_machine(each["machine"])) for each in stages.values()}
    where = " and ".join(json.loads(each) for each in sorted(machines))
    parts = [f"**{shape}**, random weights; {where}; `python -m scripts.gpu.gpu_report --shape {shape} --work DIR`:"]
    latency = {part: stages.get(part, {}).get(part, []) for part in ("forward", "generation")}
    if any(latency.values()):
        parts += [_models(next(stages[part] for part in latency if latency[part])), bench(latency, sized=True)]
    parts += [make(stages[stage]) for stage, make in PARTS.items() if stage in stages]
    missing = [stage for stage in ("forward", "generation", *PARTS) if stage not in stages]
    if missing:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _machine(described: dict) -> str:
    cpu = f"{described['processor']}, {described['cores']} cores"
    device = cpu if described["device"] == "cpu" else described["cuda_device"]
    return f"{device}, torch {described['torch']}, transformers {described['transformers']}"


def _models(results: dict) -> str:
    rows = [
        [row["model"], f"{row['parameters'] / 1e9:.3f} B", f"{row['bytes'] / 1e9:.2f} GB", row["dtype"]]
        for row in results["models"]
    ]
    return table(["model", "parameters", "weights", "dtype"], rows)


def _prune(results: dict) -> str:
    rows = []
    for run in results["runs"]:
        memory, times = run["memory"], (run["whole_seconds"], run["seconds"])
        above, target = (_gigabytes(memory[name]) for name in ("above_weights", "wanted_above_weights"))
        shown = [f"{run['ratio']:.3f}", *(f"{each:.1f} s" for each in times), f"{run['forward_share']:.0%}"]
        rows.append([str(run["asked"]), *shown, above, target])
    header = ["structured run at", "removed", "time", "without the other's scores", "of that forward passes"]
    header += ["peak above all weights", "wanted"]
    return f"{table(header, rows)}\n\nThe scores were made once. {_volume(results['calibration'], 'both ratios')}"


def _gigabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e9:.1f} GB"


def _volume(size: dict, of: str) -> str:
    text = (
        f"Calibration: {size['windows']} windows of {size['window']} tokens at {size['levels']} levels,"
        f" {size['share_of_published']:.2g} of the published volume."
    )
    if size["extrapolated_full_seconds"] is None:
        return text
    return (
        f"{text} The pilot's estimate of {of} was {size['estimate_seconds']:.1f} s, {size['took_seconds']:.1f} s were"
        f" taken; all of the published volume would take {size['extrapolated_full_seconds']:.0f} s (extrapolated)."
    )


def _sparsegpt(results: dict) -> str:
    phases = sorted({name for side in results["phases"].values() for name in side if name != "total"})
    rows = [
        [f"SparseGPT, {side}", f"{results['seconds'][side]:.1f} s",
         *(f"{results['phases'][side][name]:.1f} s" if name in results["phases"][side] else "" for name in phases)]
        for side in ("ours", "plain")
    ]  # fmt: skip
    same = results["agreement"]
    note = (
        f"{results['blocks']} of {results['of_blocks']} blocks, in one run: ours is {results['times_faster']:.2f}x"
        f" faster than the straightforward implementation (wanted: {results['wanted']:.0f}x); {same['masks']:.2%} of"
        f" the masks are equal ({same['masks_of_first_block']:.2%} in block 0)."
    )
    return f"{table(['', 'time', *phases], rows)}\n\n{note} {_volume(results['calibration'], 'both')}"


def _mass(results: dict) -> str:
    rows = []
    for row in results["rows"]:
        times, added = row["median_ms"], row["on_top_of_a_block"]
        shown = [f"{times[name]:.2f} ms" for name in ("attention", "tiled mass", "attention and mass, flex", "block")]
        rows.append([f"{row['batch']} x {row['length']}", *shown,
                     *(f"{added[way]['median']:+.0%}" for way in ("tiled", "flex"))])  # fmt: skip
    header = ["attention mass", "attention", "mass, tiled", "both, FlexAttention", "block's forward"]
    header += ["mass on top of a block: tiled", "FlexAttention"]
    return f"{table(header, rows)}\n\nWanted: at most {results['wanted_on_top']:.0%} on top of a forward pass."


def _nm(results: dict) -> str:
    sparse = results["semi_structured"]
    if sparse["refused"]:
        return f"2:4: {sparse['refused']}."
    rows = []
    for each in sparse["models"].values():
        for row in each["shapes"]:
            name, kind = f"{row['outputs']} x {row['inputs']}, {row['tokens']} tokens", f"{row['layers']} layers"
            rows.append([name, kind, *(("refused", "", "") if "refused" in row else _pair(row))])
        for row in each["forward"]:
            kind = f"whole pass, {row['layers']} of {row['of_layers']} layers on the kernels"
            rows.append([f"{row['batch']} x {row['length']}", kind, *_pair(row)])
    return table(["2:4 kernels", "", "dense", "2:4", "speed-up"], rows)


def _pair(row: dict) -> tuple[str, str, str]:
    return (
        f"{row['dense_ms']['median']:.2f} ms",
        f"{row['2:4_ms']['median']:.2f} ms",
        f"{row['speedup']['median']:.2f}x",
    )


def _overlap(results: dict) -> str:
    if results["refused"]:
        return f"`memory.overlap`: not compared, it {results['refused'].removeprefix('memory.overlap ')}."
    rows = []
    for run in results["runs"]:
        apart = "equal" if run["equal"] else "not equal"
        if run["largest_difference"]:
            apart += f", {run['largest_difference']:.1e} apart"
        rows.append([run["case"], *(f"{run['seconds'][side]:.1f} s" for side in ("off", "on")), apart])
    return table([f"`memory.overlap`, {results['blocks']} blocks", "off", "on", "weights, bit by bit"], rows)


PARTS = {"prune": _prune, "sparsegpt": _sparsegpt, "overlap": _overlap, "mass": _mass, "nm": _nm, "widths": widths}
