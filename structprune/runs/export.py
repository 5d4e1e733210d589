"""A checkpoint written again for other readers: in another export class or dtype, or as a GGUF file."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from structprune.checkpoint.card import exported_card
from structprune.checkpoint.export import CLASSES, check_export, export_class, obstacles, own_code
from structprune.checkpoint.gguf_file import (
    STORED,
    check_gguf,
    check_gguf_place,
    needed_bytes,
    require_gguf,
    write_gguf,
)
from structprune.checkpoint.gguf_tokens import Vocabulary
from structprune.checkpoint.lineage import EXPORTS
from structprune.checkpoint.output import Content, check_output, write_json
from structprune.checkpoint.recovered import CARRIED
from structprune.checkpoint.save import save_pruned
from structprune.config import ExportSettings, ModelSettings
from structprune.errors import Interrupted, UserError
from structprune.models.checkpoint_files import read_json
from structprune.models.loading import Source, as_dtype, load_model, source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.runs.ghost import Ghost, read_ghost

LONG_NAMES = {kind: str(dtype).removeprefix("torch.") for dtype, kind in STORED.items()}  # f16 -> float16
PROBE = (2, 32)  # sequences and tokens that logits are compared on


@dataclass(frozen=True)
class ExportRequest:
    """What to write, and where.

    Attributes:
        source: checkpoint directory or Hub id.
        out: directory to write; None: none. compat: its export class.
        gguf: file to write; None: none. split: see `checkpoint.gguf_tokens.Vocabulary`.
        dtype: of the weights, as `float16` or `f16`, for a GGUF file alone also `q8_0`; None: the source's.
        model: its mask id, and whether .bin shards are read.
    """

    source: str
    out: Path | None = None
    compat: str = "free"
    gguf: Path | None = None
    split: str | None = None
    dtype: str | None = None
    overwrite: bool = False
    model: ModelSettings = ModelSettings()

    @property
    def kind(self) -> str | None:
        """The dtype under GGUF's name."""
        short = {long: kind for kind, long in LONG_NAMES.items()}
        return short.get(self.dtype, self.dtype) if self.dtype else None


@dataclass(frozen=True)
class Exported:
    """What was written: `plan_facts`, and of a directory its dtype and the largest `difference` of logits and their
    `agreement`, of a file its `gguf_bytes`."""

    request: ExportRequest
    facts: dict[str, Any]


def checked_export(request: ExportRequest) -> Ghost:
    """The source of an export that can begin, of which no weights were read.

    Raises:
        UserError: nothing to write, or anything that cannot be, with the class that could.
    """
    kinds = (*LONG_NAMES, *LONG_NAMES.values(), *(("q8_0",) if request.gguf else ()))
    if request.dtype is not None and request.dtype not in kinds:
        remedy = "" if request.gguf else ", or q8_0 with --gguf"
        raise UserError(f"unknown --dtype '{request.dtype}': give {', '.join(LONG_NAMES)}{remedy}")
    if request.out is not None and request.kind == "q8_0":
        raise UserError("--dtype q8_0 is for a GGUF file alone: leave out --out")
    if request.compat not in CLASSES:
        raise UserError(f"unknown --compat '{request.compat}': give {', '.join(CLASSES)}")
    ghost = read_ghost(request.source, request.model)
    config = ghost.model.config
    if request.out is not None:
        check_export(config, ghost.values, request.compat, "--compat ")
        check_output(request.out, ghost.directory, request.overwrite, _bytes(ghost, request))
        _earlier_report(ghost.directory)
    if request.gguf is not None:
        require_gguf()
        check_gguf(config, ghost.values)
        size = needed_bytes(ghost.model.num_parameters(), request.kind, ghost.stored)
        check_gguf_place(request.gguf, ghost.directory, size, request.overwrite)
        Vocabulary(ghost.directory, ghost.adapter.vocabulary, request.split)
    if request.out is not None and request.gguf is not None:
        one, other = request.out.absolute(), request.gguf.absolute()
        if one == other or one in other.parents or other in one.parents:
            raise UserError(
                f"--out {request.out} and --gguf {request.gguf} lie in each other: give them places of their own"
            )
    return ghost


def export_checkpoint(request: ExportRequest, track: Track = untracked) -> Exported:
    """Write what is asked for; each output appears whole or not at all, and a directory only after its logits agree.

    Args:
        track: wraps long iterations, `track(items, title)`.
    Raises:
        UserError: anything the user can mend, before weights are read where it can be known then.
    """
    ghost = checked_export(request)
    target = as_dtype(LONG_NAMES.get(request.kind or ""))
    compared = "auto" if target in (None, ghost.stored) else torch.float32  # so that only the weights' rounding shows
    mask_id, pickles = request.model.mask_id, request.model.allow_pickle
    own = request.compat == "official"  # whose Python files are copied
    model = load_model(request.source, compared, mask_id=mask_id, allow_pickle=pickles, code=own)
    facts = plan_facts(request, ghost)
    if request.gguf is not None:
        write_gguf(model, request.gguf, request.kind, request.split, track)
        facts["gguf_bytes"] = request.gguf.stat().st_size
    if request.out is None:
        return Exported(request, facts)
    try:
        return Exported(request, facts | _write_directory(model, request, compared))
    except KeyboardInterrupt as error:
        if request.gguf is None:
            raise
        raise Interrupted(f"'{request.gguf}' is complete, '{request.out}' was not written") from error


def plan_facts(request: ExportRequest, ghost: Ghost) -> dict[str, Any]:
    """What an export would write of what, with about so many bytes, and why not in stricter classes (class -> reason),
    as plain data."""
    reasons = obstacles(ghost.model.config, ghost.values)
    return {
        "source": ghost.name,
        "parameters": ghost.model.num_parameters(),
        "stored": _name(ghost.stored),
        "class": export_class(ghost.model.config, ghost.values),
        "reasons": {name: reasons[name] for name in CLASSES if name in reasons},
        "out": request.out and str(request.out),
        "compat": request.compat,
        "out_bytes": _bytes(ghost, request),
        "gguf": request.gguf and str(request.gguf),
        "gguf_bytes": needed_bytes(ghost.model.num_parameters(), request.kind, ghost.stored),
    }


def _bytes(ghost: Ghost, request: ExportRequest) -> int:
    dtype = as_dtype(LONG_NAMES.get(request.kind or "")) or ghost.stored
    return ghost.model.num_parameters() * dtype.itemsize


def _write_directory(model: DiffusionLM, request: ExportRequest, compared: str | torch.dtype) -> dict[str, Any]:
    """Write the directory, once its logits, computed in the dtype `compared`, are those of the source.

    The model is gone afterwards, so that two copies of the weights are never in memory at once.
    """
    assert request.out is not None
    values = {"compat": request.compat, "dtype": LONG_NAMES.get(request.kind or "")}
    settings = ExportSettings.model_validate(values)
    facts: dict[str, Any] = {"compat": request.compat, "dtype": settings.dtype or _name(source_of(model).dtype)}
    ids = _probe(model)  # (B, T)
    with torch.inference_mode():
        expected = model(ids).logits  # (B, T, V)

    def check(draft: Path) -> None:
        cast(Any, model).to("meta")
        facts.update(compare_logits(expected, ids, load_model(draft, compared, mask_id=model.config.mask_token_id)))
        if compared == "auto" and facts["difference"]:
            raise RuntimeError(f"the export's logits are {facts['difference']:g} off: please report this")

    facts["source"] = source_of(model).name
    files = _carried(source_of(model), facts)
    save_pruned(model, request.out, settings, files=files, overwrite=request.overwrite, check=check)
    return facts


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _probe(model: DiffusionLM) -> torch.Tensor:
    """Random ids, half of them masked: (B, T)."""
    generator, mask_id = torch.Generator().manual_seed(0), model.config.mask_token_id
    ids = torch.randint(model.config.vocab_size, PROBE, generator=generator)  # (B, T)
    return ids.masked_fill(torch.rand(PROBE, generator=generator) < 0.5, mask_id)


def compare_logits(expected: torch.Tensor, ids: torch.Tensor, model: DiffusionLM) -> dict[str, float]:
    """The largest difference of a model's logits from `expected`, (B, T, V), and the share of equal predictions."""
    with torch.inference_mode():
        logits = model(ids).logits  # (B, T, V)
    same = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return {"difference": (logits.float() - expected.float()).abs().max().item(), "agreement": same}


def _earlier_report(directory: Path) -> dict:
    """The contents of report.json beside a checkpoint; empty where there is none."""
    return read_json(directory / "report.json") if (directory / "report.json").is_file() else {}


def _carried(source: Source, facts: dict[str, Any]) -> dict[str, Content]:
    """What an export has beside weights, tokenizer and code: the source's reports and card, with this export noted."""
    directory = source.directory
    files: dict[str, Content] = {
        name: partial(_copy, directory / name) for name in CARRIED if (directory / name).is_file()
    }
    before, now = _earlier_report(directory), {}
    if "own_code" in before:
        kept = own_code(directory, source.values) if facts["compat"] == "official" else []
        now = {"own_code": [path.name for path in kept]}
    if (directory / "README.md").is_file():
        card = (directory / "README.md").read_text(encoding="utf-8")
        files["README.md"] = exported_card(card, before, now, facts["compat"])
    # once the logits are compared, which is before files are written
    noted = {EXPORTS: [*before.get(EXPORTS, []), facts]}
    files["report.json"] = lambda path: write_json(path, before | now | noted)
    return files


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
