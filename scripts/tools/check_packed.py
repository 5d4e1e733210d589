"""Packed masks under several releases of transformers and compressed-tensors: read as they were, or refused.

The embedded LLaDA and a tiny random Dream are masked, 2:4 and unstructured, and exported twice: plain, and packed by
`--format compressed-tensors`. Every pair of releases gets a virtual environment without structprune, in which both are
loaded and every tensor and logit compared. A pair that the code beside the weights is to refuse must be refused in one
line.

    python -m scripts.tools.check_packed [--releases 4.55.4+0.14.0.1] [--work DIR] [--out scripts/results/packed.json]
"""

import sys
import tempfile
from pathlib import Path

import torch
from rich.table import Table

from scripts.tools.check_versions import environment, run_check, write_dense
from scripts.tools.reload_cases import DREAM_VALUES
from scripts.tools.script_line import OneLineParser, one_line, result_file, show_result, write_result
from structprune.assets import model_directory
from structprune.bench.machine import describe_machine
from structprune.checkpoint.masked import save_masked
from structprune.errors import UserError
from structprune.masking.masks import Masks, pack_bits
from structprune.masking.patterns import group_mask, row_mask
from structprune.models.adapter import Adapter
from structprune.models.configuration_structprune import DROPPED, UNPACKED_BY, release
from structprune.models.loading import load_model
from structprune.runs.export import ExportRequest, export_checkpoint

RELEASES = "4.51.3+0.12.2,4.55.4+0.14.0.1,4.57.6+0.14.0.1,4.57.6+0.15.0.1,latest+latest"
PATTERNS = {"2of4": lambda score: group_mask(score, 2, 4), "half": lambda score: row_mask(score, 0.5)}
CHECK = Path(__file__).with_name("packed_check.py")


def write_masked(source: Path, directory: Path, pattern: str) -> Path:
    """A checkpoint with its smallest weights at zero, and their masks."""
    model, packed, shapes = load_model(source, "auto"), {}, {}
    for block in Adapter(model).blocks:
        for role, module in block.names.items():
            weight = block[role].weight.detach()  # (O, C)
            packed[f"{module}.weight"] = pack_bits(PATTERNS[pattern](weight.abs().float()))
            shapes[f"{module}.weight"] = (weight.shape[0], weight.shape[1])
    masks = Masks(packed, shapes)
    masks.apply(model)
    return save_masked(model, directory, changed=packed, files={"masks.safetensors": masks.save})


def make_cases(work: Path) -> list[dict]:
    """Masked checkpoints, exported plain and packed, with their sizes."""
    write_dense(work / "dream", DREAM_VALUES)
    cases = []
    for family, source in (("llada", model_directory()), ("dream", work / "dream")):
        for pattern in PATTERNS:
            name = f"{family}-{pattern}"
            masked = write_masked(source, work / "masked" / name, pattern)
            places = {kind: work / kind / name for kind in ("plain", "packed")}
            export_checkpoint(ExportRequest(str(masked), places["plain"]))
            request = ExportRequest(str(masked), places["packed"], format="compressed-tensors")
            facts = export_checkpoint(request).facts
            sizes = {key: facts[key] for key in ("layout", "dtype", "plain_bytes", "written_bytes")}
            cases.append({"name": name, **{kind: str(place) for kind, place in places.items()}, **sizes})
    return cases


def is_read(layout: str, versions: dict[str, str]) -> bool:
    """Whether a layout is to be read, not refused, by these releases."""
    first, end = UNPACKED_BY[layout]
    return first <= release(versions["transformers"]) < end and release(versions["compressed-tensors"]) < DROPPED


def outcome(case: dict, result: dict, versions: dict[str, str]) -> dict:
    """A row: one case in one environment, and whether it went as it is to."""
    readable = is_read(case["layout"], versions)
    exact = result.get("tensors_that_differ") == 0 and result.get("logits") == 0
    refused = "refused" in result and "\n" not in result["refused"] and case["layout"] in result["refused"]
    facts = {key: case[key] for key in ("layout", "dtype", "plain_bytes", "written_bytes")}
    good = (exact and "refused" not in result) if readable else refused
    return {"case": case["name"], **facts, "versions": versions, "good": good, **result}


def table_of(rows: list[dict]) -> Table:
    table = Table(title="Packed masks: loaded by transformers against the plain checkpoint")
    for title in ("case", "layout", "transformers", "compressed-tensors", "outcome", "saved again", ""):
        table.add_column(title)
    for row in rows:
        said = row.get("error") or ("refused" if "refused" in row else f"{row['tensors_that_differ']} tensors differ")
        said += f", logits {row['logits']:g} off" if "logits" in row else ""
        releases = [row["versions"].get(name, "?") for name in ("transformers", "compressed-tensors")]
        verdict = "ok" if row["good"] else "FAILED"
        table.add_row(row["case"], row["layout"], *releases, said, row.get("saved_again", ""), verdict)
    return table


def run(arguments: list[str] | None) -> int:
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--releases", default=RELEASES, help="transformers+compressed-tensors, commas between")
    parser.add_argument("--work", type=Path, help="directory to keep and reuse the environments in")
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/packed.json"))
    options = parser.parse_args(arguments)
    pairs = [tuple(pair.split("+")) for pair in options.releases.split(",")]
    if wrong := [pair for pair in pairs if len(pair) != 2 or not all(pair)]:
        raise UserError(f"--releases has '{'+'.join(wrong[0])}': give pairs such as 4.55.4+0.14.0.1")
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        cases = make_cases(work)
        for transformers, unpacker in pairs:
            python = environment(options.work or work / "envs", transformers, {"compressed-tensors": unpacker})
            report = run_check(python, cases, work, check=CHECK)
            versions = report["versions"] or {"transformers": transformers, "compressed-tensors": unpacker}
            rows += [outcome(case, report["cases"][case["name"]], versions) for case in cases]
    write_result(options.out, {"machine": describe_machine(), "rows": rows})
    show_result(table_of(rows), out=options.out, width=160)
    return 0 if all(row["good"] for row in rows) else 1


def main(arguments: list[str] | None = None) -> int:
    return one_line("check_packed", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
