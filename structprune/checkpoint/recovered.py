"""What a recovered checkpoint has beside its weights: report and card with their lineage, and files of its input."""

import shutil
from functools import partial
from pathlib import Path

from structprune.assets import card_template
from structprune.checkpoint.lineage import RECOVERIES
from structprune.checkpoint.output import Content
from structprune.models.checkpoint_files import read_json
from structprune.report.recover_table import rises

CARRIED = ("plan.json", "calibration.safetensors", "masks.safetensors")  # of the input, as they are

LOSSES = (
    ("divergence, nats per token", "kl"),
    ("NELBO, nats per token", "nelbo"),
    ("divergence at next tokens, nats", "causal_kl"),  # of a model that is causal too
    ("next tokens, nats", "causal_ce"),
)
KEPT = {  # a recovery's `kept` -> what its card says of the weights
    "trained": "",
    "blocks": "\n**The second stage gained nothing: the weights are those of the first, block by block.**\n",
    "input": "\n**No gain: the weights are those of the input.**\n",
}


def recovered_files(source: Path, report: dict) -> dict[str, Content]:
    """Files of a recovered checkpoint, name -> content.

    Args:
        source: directory of the input. report: of this recovery.
    """
    files: dict[str, Content] = {name: partial(_copy, source / name) for name in CARRIED if (source / name).is_file()}
    whole = read_json(source / "report.json") if (source / "report.json").is_file() else {}
    files["report.json"] = whole | {RECOVERIES: [*whole.get(RECOVERIES, []), report]}
    readme = source / "README.md"
    before = readme.read_text(encoding="utf-8").rstrip() + "\n\n" if readme.is_file() else ""
    files["README.md"] = before + recovered_card(report)
    return files


def recovered_card(report: dict) -> str:
    """The section of a model card that says what was learnt and what it changed."""
    train, loss = report["config"]["train"], report["config"]["loss"]
    learnt = "all weights" if train["method"] == "full" else f"LoRA of rank {train['rank']}, merged"
    if blocks := report["blocks"]:
        own = f"{blocks['tokens']:,} of them block by block, in all weights of each"
        learnt = f"{own}; then {learnt}" if report["learnt"]["steps"] else own
    seconds, since = f"{report['seconds']:,.0f} s", report["learnt"]["resumed_at"]
    if since:
        seconds += f" from step {since} on, after an interrupted run"
    elif blocks and blocks["resumed_at"]:
        seconds += f" from block {blocks['resumed_at']} on, after an interrupted run"
    goals = {"divergence from its predictions": loss["kl"], "cross-entropy of the text": loss["cross_entropy"]}
    rows = [
        f"| {name} | {report['teacher_figures'][key]:.4f} | {report['before'][key]:.4f} | {report['after'][key]:.4f} |"
        for name, key in LOSSES
        if key in report["after"]
    ]
    rows += [
        f"| {name} | {report['teacher_figures'][key]:.1%} | {report['before'][key]:.1%} | {report['after'][key]:.1%} |"
        for name, key in (("predictions as the teacher's", "agreement"), ("masked tokens right", "accuracy"))
    ]
    return card_template("recovered").format(
        student=report["student"],
        teacher=report["teacher"],
        learnt=learnt,
        goals=" and ".join(name for name, weight in goals.items() if weight > 0),
        tokens=f"{report['tokens']:,}",
        text=report["text"],
        seconds=seconds,
        windows=report["held_out_windows"],
        rows="\n".join(rows),
        last="after" if report["kept"] != "input" else "trained, not written",
        kept=KEPT[report["kept"]] + "".join(f"\n**{line}**\n" for line in rises(report)),
    )


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
