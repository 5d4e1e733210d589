"""A hash of a checkpoint's content that does not read all of it."""

import hashlib
from pathlib import Path

from structprune.models.checkpoint_files import TOKENIZER_FILES, shard_names
from structprune.models.headers import read_header

WHOLE = ("config.json", *TOKENIZER_FILES)
PROBES, PROBE = 64, 1 << 12  # places in a shard, bytes at each
TENSOR_PROBE = 256  # bytes at the start, in the middle and at the end of every tensor


def fingerprint(directory: Path, allow_pickle: bool = False) -> str:
    """SHA-256 (first 16 hex digits) of the small files, and of every weight file's size and many small probes.

    Every tensor of a safetensors file is read in three places, so that weights that were trained or pruned differently
    have different fingerprints; a change of single values between the probes goes unnoticed. A copy of a checkpoint
    has the same fingerprint at any path.
    """
    digest = hashlib.sha256()
    for name in WHOLE:
        if (directory / name).is_file():
            digest.update(f"{name}\n".encode() + hashlib.sha256((directory / name).read_bytes()).digest())
    for name in shard_names(directory, allow_pickle):
        path = directory / name
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        places = [((size - PROBE) * probe // (PROBES - 1), PROBE) for probe in range(PROBES)]
        for header in read_header(path).values() if path.suffix == ".safetensors" else ():
            start, stop = header.span
            ends = (start, (start + stop) // 2, stop - TENSOR_PROBE)
            places += [(max(start, place), min(TENSOR_PROBE, stop - start)) for place in ends]
        with path.open("rb") as file:
            for place, count in sorted(places):
                file.seek(max(0, place))
                digest.update(file.read(count))
    return digest.hexdigest()[:16]
