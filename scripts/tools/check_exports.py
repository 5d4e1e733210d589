"""Every family in its export classes on their way: prune, load elsewhere, train two steps, save, export, convert.

Tiny random checkpoints of the official layouts are pruned and written; transformers loads them with the code beside the
weights, trains them, and saves them; `export` writes them again, and llama.cpp's file where its loader reads the class.
Differences are the largest of logits, against the model that was trained.

    python -m scripts.tools.check_exports [--out scripts/results/exports.json]
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from scripts.tools.check_versions import write_dense
from scripts.tools.reload_cases import CASES, MASK_ID
from scripts.tools.script_line import OneLineParser, one_line, result_file, show_result, write_result
from structprune import Plan, apply_plan, load_model, save_pruned
from structprune.bench.machine import describe_machine
from structprune.checkpoint.gguf_file import write_gguf
from structprune.config import ExportSettings
from structprune.errors import UserError
from structprune.models.official import detect_family
from structprune.runs.export import ExportRequest, export_checkpoint

STEPS, RATE = 2, 1e-2


def load(directory: Path) -> Any:
    """As a user loads it, without structprune."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits  # (B, T, V)


def train(model: Any, ids: torch.Tensor) -> None:
    """Two steps of the model's own masked-diffusion loss."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE)
    model.train()
    for step in range(STEPS):
        torch.manual_seed(step)
        optimiser.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
    model.eval()


def walk(name: str, folder: Path) -> dict:
    """One case: what every step changes, as plain data."""
    values, blocks, biases, compat = CASES[name]
    family = detect_family(values, folder).name
    # with the case's name, because transformers gives a later directory of one name the class of an earlier one
    dense, pruned, after, exported = (folder / f"{name}-{step}" for step in ("dense", "pruned", "trained", "exported"))
    write_dense(dense, values)
    model = apply_plan(load_model(dense), Plan(family, tuple(blocks)), output_bias=biases)
    save_pruned(model, pruned, ExportSettings(compat=compat))
    ids = torch.randint(0, MASK_ID, (2, 24), generator=torch.Generator().manual_seed(1))  # (B, T)
    trained = load(pruned)
    before = logits(trained, ids)
    train(trained, ids)
    expected = logits(trained, ids)
    trained.save_pretrained(after)
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if (pruned / file).exists():
            (after / file).write_bytes((pruned / file).read_bytes())
    kinds = [json.loads((each / "config.json").read_text())["model_type"] for each in (pruned, after)]
    facts = export_checkpoint(ExportRequest(str(after), exported, compat)).facts
    return {
        "case": name,
        "class": compat,
        "strictest_class": facts["class"],
        "changed_by_training": (expected - before).abs().max().item(),
        "layout_kept": kinds[0] == kinds[1],
        "differences": {
            "structprune": (logits(load_model(after), ids) - expected).abs().max().item(),
            "exported": facts["difference"],
            "elsewhere": (logits(load(exported), ids) - expected).abs().max().item(),
        },
        "gguf": converted(after, folder / "model.gguf"),
    }


def converted(directory: Path, out: Path) -> str:
    """Whether a trained model becomes a file for llama.cpp, or why not."""
    try:
        write_gguf(load_model(directory), out)
    except UserError as error:
        return str(error)
    return "written"


def table_of(rows: list[dict]) -> Table:
    table = Table(title="Prune, train, save, export, load elsewhere: largest differences of logits")
    for title in ("case", "class", "layout kept", "structprune", "exported", "elsewhere", "GGUF"):
        table.add_column(title)
    for row in rows:
        figures = (f"{value:g}" for value in row["differences"].values())
        kept = "yes" if row["layout_kept"] else "NO"
        table.add_row(row["case"], row["class"], kept, *figures, row["gguf"] if row["gguf"] == "written" else "no")
    return table


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/exports.json"))
    parser.add_argument("--cases", default=",".join(CASES), help="commas between (default: all)")
    options = parser.parse_args(arguments)
    names = options.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"--cases has the unknown '{unknown[0]}': give some of {', '.join(CASES)}")
    torch.set_num_threads(1)
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(walk(name, Path(folder)))
    settings = {"steps": STEPS, "learning_rate": RATE}
    write_result(options.out, {"settings": settings, "machine": describe_machine(), "rows": rows})
    show_result(table_of(rows), out=options.out, width=150)


def main(arguments: list[str] | None = None) -> int:
    return one_line("check_exports", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
