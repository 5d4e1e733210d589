"""Writing a pruned model as a directory that loads anywhere; it appears complete or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from structprune.checkpoint.export import CODE_FILES, check_export, config_values, own_code
from structprune.checkpoint.learnt_text import LEARNT
from structprune.checkpoint.output import Content, as_stored, check_output, output_draft, write_json, write_shards
from structprune.config import ExportSettings
from structprune.models import modeling_structprune
from structprune.models.checkpoint_files import TOKENIZER_FILES, is_byte_pair, read_json
from structprune.models.families import family_of
from structprune.models.joined import join_state
from structprune.models.loading import as_dtype
from structprune.models.modeling_structprune import DiffusionLM

CARRIED = (*TOKENIZER_FILES, "generation_config.json", LEARNT)
NARROW_TOKENIZERS = ("DreamTokenizer", "TokenizersBackend")  # from remote code, and only in transformers 5


def save_pruned(
    model: DiffusionLM,
    directory: str | Path,
    export: ExportSettings | None = None,
    *,
    files: dict[str, Content] | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write weights, config, tokenizer, generation settings and the modeling files.

    An `official` export of a source that ships its family's own code keeps that code, and `auto_map` leads to it.

    Args:
        export: export class, dtype and size of files; default `ExportSettings()`.
        files: additional files; a dict is written as JSON, text as it is, and a callable gets the path.
        overwrite: replace an existing directory once the new one is complete.
        check: is called with the directory before it takes its place; what it raises leaves nothing behind.
    Returns:
        The directory.
    Raises:
        UserError: see `check_output`; an export class that the model is not in; a full disk.
    """
    source = getattr(model, "source", None)
    values = source.values if source else None
    export = export or ExportSettings()
    check_export(model.config, values, export.compat)
    dtype = as_dtype(export.dtype) or (source.dtype if source else model.dtype)
    carried = source.directory if source else None
    needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    directory = check_output(directory, carried, overwrite, needed)
    family_files = own_code(carried, values) if export.compat == "official" else []
    with output_draft(directory, overwrite, files, needed) as draft:
        _write_weights(model, draft, dtype, export)
        name = str(dtype).removeprefix("torch.")
        write_json(draft / "config.json", config_values(model.config, values, export.compat, name, bool(family_files)))
        beside = [Path(modeling_structprune.__file__).with_name(name) for name in CODE_FILES]
        for path in (*family_files, *beside, *family_of(model.config).code):
            shutil.copyfile(path, draft / path.name)
        if carried is not None:
            _carry(carried, draft)
        if check is not None:
            check(draft)
    return directory


def _write_weights(model: DiffusionLM, draft: Path, dtype: torch.dtype, export: ExportSettings) -> None:
    """Write all weights, under the names and in the pieces of the export class' layout."""
    state = model.stored_state()
    joins = export.compat != "free"
    pieces = join_state(model, state) if joins else {name: (tensor,) for name, tensor in state.items()}

    def read(name: str) -> torch.Tensor:
        parts = [as_stored(name, part, dtype) for part in pieces[name]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    headers = {}
    for name, parts in pieces.items():
        shape = (sum(map(len, parts)), *parts[0].shape[1:]) if len(parts) > 1 else parts[0].shape
        headers[name] = torch.empty(shape, dtype=dtype, device="meta")
    write_shards(draft, headers, read, export.max_shard_size)


def _carry(source: Path, draft: Path) -> None:
    """Copy tokenizer, generation settings and marks of learnt text; name a tokenizer class that all transformers have.

    Without a class transformers would look for one through config.json, and ask whether to run the code it names.
    """
    for name in CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, draft / name)
    settings, byte_pair = draft / "tokenizer_config.json", is_byte_pair(draft)
    values = read_json(settings) if settings.exists() else {}
    complete = byte_pair or (draft / "tokenizer.json").exists()
    nameless = complete and not isinstance(values.get("tokenizer_class"), str)
    if nameless or "auto_map" in values or values.get("tokenizer_class") in NARROW_TOKENIZERS:
        values.pop("auto_map", None)
        kind = "Qwen2Tokenizer" if byte_pair else "PreTrainedTokenizerFast"  # as `load_tokenizer` reads it
        write_json(settings, values | {"tokenizer_class": kind})
