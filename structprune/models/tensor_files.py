"""Safetensors files of our own: whole or not at all, and byte for byte the same for the same content."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from structprune.errors import UserError
from structprune.files import first_line, whole_file
from structprune.models.headers import raw_header
from structprune.models.maps import give_back_pages

NAMES = {  # torch's -> safetensors' dtype name, in the order in which the library writes tensors
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32", "uint32": "U32",
    "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16", "float8_e5m2fnuz":
    "F8_E5M2FNUZ", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
ORDER = list(NAMES)


def write_streamed(
    path: Path, headers: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file tensor by tensor, with the bytes that `safetensors.torch.save_file` would write.

    Args:
        headers: name -> tensor on the meta device, with the shape and dtype to write.
        read: name -> tensor to write, contiguous and on the CPU; called once for each.
    """
    kinds = {name: str(header.dtype).removeprefix("torch.") for name, header in headers.items()}
    names = sorted(headers, key=lambda name: (ORDER.index(kinds[name]), name))
    entries: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name in names:
        shape = list(headers[name].shape)
        start, end = end, end + math.prod(shape) * headers[name].dtype.itemsize
        entries[name] = {"dtype": NAMES[kinds[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(raw_bytes(read(name)))
            give_back_pages()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
