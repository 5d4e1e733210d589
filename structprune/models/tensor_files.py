"""Safetensors files of our own: whole or not at all, and byte for byte the same for the same content."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from structprune.errors import UserError
from structprune.files import first_line, whole_file
from structprune.models.headers import raw_header


def write_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors of any device and layout, and metadata.

    Raises:
        UserError: the file cannot be written; what was there before stays.
    """
    path = Path(path)
    # cloned, because safetensors refuses tensors that share memory
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    try:
        with whole_file(path) as draft:
            save_file(copies, draft, metadata=metadata)
            with draft.open("r+b") as file:  # safetensors writes metadata in another order every time
                header, start = raw_header(file)
                header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
                # as safetensors writes it, so that it takes the same room
                text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
                file.seek(8)
                file.write(text.ljust(start - 8))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({first_line(error)})") from error
