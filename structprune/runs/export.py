"""A checkpoint written again for other readers: in another export class or dtype, with packed masks, or as GGUF."""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from structprune.checkpoint.card import exported_card, packed_card
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
from structprune.checkpoint.packed import FORMAT, Packing, check_zeros, choose_packing, pack_directory
from structprune.checkpoint.recovered import CARRIED
from structprune.checkpoint.save import save_pruned
from structprune.config import ExportSettings, ModelSettings
from structprune.errors import Interrupted, UserError
from structprune.masking.masks import Masks
from structprune.models.checkpoint_files import file_beside, read_json
from structprune.models.loading import Source, as_dtype, load_model, source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.progress import Track, untracked
from structprune.runs.ghost import Ghost, read_ghost

LONG_NAMES = {kind: str(dtype).removeprefix("torch.") for dtype, kind in STORED.items()}  # f16 -> float16
PROBE = (2, 32)  # sequences and tokens that logits are compared on
SHARD = 5_000_000_000  # bytes of the largest file of weights


@dataclass(frozen=True)
class ExportRequest:
    """What to write, and where.

    Attributes:
        source: checkpoint directory or Hub id.
        out: directory to write; None: none. compat: its export class.
        gguf: file to write; None: none. split: see `checkpoint.gguf_tokens.Vocabulary`.
        dtype: of the weights, as `float16` or `f16`, for a GGUF file alone also `q8_0`; None: the source's.
        format: of the masked weights in `out`, `compressed-tensors`; None: plain, with their zeros.
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
    format: str | None = None

    @property
    def kind(self) -> str | None:
        """The dtype under GGUF's name."""
        short = {long: kind for kind, long in LONG_NAMES.items()}
        return short.get(self.dtype, self.dtype) if self.dtype else None


@dataclass(frozen=True, eq=False)
class Checked:
    """The source of an export that can begin, and how its masked weights are packed; None: they are not."""

    ghost: Ghost
    packing: Packing | None


@dataclass(frozen=True)
class Exported:
    """What was written: `plan_facts`, and of a directory its dtype and the largest `difference` of logits and their
    `agreement`, of a file its `gguf_bytes`; of packed weights also `written_bytes` of all tensors."""

    request: ExportRequest
    facts: dict[str, Any]


def checked_export(request: ExportRequest) -> Checked:
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
    _check_format(request)
    ghost = read_ghost(request.source, request.model)
    config = ghost.model.config
    if request.out is not None:
        check_export(config, ghost.values, request.compat, "--compat ")
        plain = _bytes(ghost, request)
        twice = min(plain, SHARD) if request.format else 0  # of a shard, while it is packed
        check_output(request.out, ghost.directory, request.overwrite, plain + twice)
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
    return Checked(ghost, _packing(request, ghost))


def _check_format(request: ExportRequest) -> None:
    """Raise UserError for a format that there is not, or in a class whose code may read it wrongly."""
    if request.format not in (None, FORMAT):
        raise UserError(f"unknown --format '{request.format}': give {FORMAT}")
    if request.format is not None and request.compat != "free":
        reason = "whose code refuses releases that misread packed weights"
        raise UserError(f"--format {FORMAT} writes class free, {reason}: leave out --compat {request.compat}")


def _packing(request: ExportRequest, ghost: Ghost) -> Packing | None:
    """How the masks of a checkpoint are packed; None where that was not asked for.

    Raises:
        UserError: it has no masks, or none that can be packed.
    """
    if request.format is None or request.out is None:
        return None
    path = file_beside(request.source, ghost.directory, "masks.safetensors")
    if not path.is_file():
        reason = f"{ghost.name} has no masks.safetensors, so that no zeros are known"
        remedy = "mask it first (structprune prune --method nm or unstructured), or leave out --format"
        raise UserError(f"--format {FORMAT} packs masked weights, and {reason}: {remedy}")
    return choose_packing(Masks.load(path), ghost.model, _dtype(ghost, request).itemsize)


def export_checkpoint(request: ExportRequest, track: Track = untracked) -> Exported:
    """Write what is asked for; each output appears whole or not at all, and a directory only after its logits agree.

    Args:
        track: wraps long iterations, `track(items, title)`.
    Raises:
        UserError: anything the user can mend, before weights are read where it can be known then.
    """
    checked = checked_export(request)
    ghost = checked.ghost
    target = as_dtype(LONG_NAMES.get(request.kind or ""))
    compared = "auto" if target in (None, ghost.stored) else torch.float32  # so that only the weights' rounding shows
    own = request.compat == "official"  # whose Python files are copied
    model = load_model(request.source, compared, code=own, **request.model.reading)
    if checked.packing is not None:
        check_zeros(model, checked.packing.masks)
    facts = plan_facts(request, checked)
    if request.gguf is not None:
        write_gguf(model, request.gguf, request.kind, request.split, track)
        facts["gguf_bytes"] = request.gguf.stat().st_size
    if request.out is None:
        return Exported(request, facts)
    try:
        return Exported(request, facts | _write_directory(model, request, compared, checked.packing))
    except KeyboardInterrupt as error:
        if request.gguf is None:
            raise
        raise Interrupted(f"'{request.gguf}' is complete, '{request.out}' was not written") from error


def plan_facts(request: ExportRequest, checked: Checked) -> dict[str, Any]:
    """What an export would write of what, with about so many bytes, and why not in stricter classes (class -> reason),
    as plain data, with whether llama.cpp knows the family (`llama_cpp`); of packed weights their `layout`, how many are
    `packed`, and the `plain_bytes` of all weights."""
    ghost, packing, plain = checked.ghost, checked.packing, _bytes(checked.ghost, request)
    saved = packing.saved_bytes(_dtype(ghost, request).itemsize) if packing else 0
    packed = {"layout": packing.layout, "packed": len(packing.kept), "plain_bytes": plain} if packing else {}
    reasons = obstacles(ghost.model.config, ghost.values)
    return {
        "source": ghost.name,
        "parameters": ghost.model.num_parameters(),
        "stored": _name(ghost.stored),
        "class": export_class(ghost.model.config, ghost.values),
        "reasons": {name: reasons[name] for name in CLASSES if name in reasons},
        "out": request.out and str(request.out),
        "compat": request.compat,
        "llama_cpp": ghost.adapter.family.gguf is not None,
        "out_bytes": plain - saved,
        "gguf": request.gguf and str(request.gguf),
        "gguf_bytes": needed_bytes(ghost.model.num_parameters(), request.kind, ghost.stored),
        **packed,
    }


def _dtype(ghost: Ghost, request: ExportRequest) -> torch.dtype:
    """Of the weights that are written."""
    return as_dtype(LONG_NAMES.get(request.kind or "")) or ghost.stored


def _bytes(ghost: Ghost, request: ExportRequest) -> int:
    """Of the weights, unpacked."""
    return ghost.model.num_parameters() * _dtype(ghost, request).itemsize


def _write_directory(
    model: DiffusionLM, request: ExportRequest, compared: str | torch.dtype, packing: Packing | None
) -> dict[str, Any]:
    """Write the directory, once its logits, computed in the dtype `compared`, are those of the source; then pack it.

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
        if packing is not None:
            facts["written_bytes"] = pack_directory(draft, packing)

    facts["source"] = source_of(model).name
    if packing is not None:
        facts |= {"format": request.format, "layout": packing.layout}
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
        card = exported_card(card, before, now, facts["compat"])
        files["README.md"] = packed_card(card, facts["layout"]) if "layout" in facts else card
    # once the logits are compared, which is before files are written
    noted = {EXPORTS: [*before.get(EXPORTS, []), facts]}
    files["report.json"] = lambda path: write_json(path, before | now | noted)
    return files


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
