"""What identifies a checkpoint's content, without reading all of it."""

import hashlib
from pathlib import Path

from structprune.models.checkpoint_files import shard_names

WHOLE = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")
HEAD, PROBES, PROBE = 1 << 20, 64, 1 << 12  # bytes at the start of a shard, places beyond, bytes at each


def fingerprint(directory: Path, allow_pickle: bool = False) -> str:
    """SHA-256 (first 16 hex digits) of small files whole, and of each weight file its size, start and probes.

    Weights that were trained or pruned otherwise differ nearly everywhere, so the probes tell them apart; a copy of
    a checkpoint has the same fingerprint wherever it is.
    """
    digest = hashlib.sha256()
    for name in WHOLE:
        if (directory / name).is_file():
            digest.update(f"{name}\n".encode() + hashlib.sha256((directory / name).read_bytes()).digest())
    for name in shard_names(directory, allow_pickle):
        size = (directory / name).stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with open(directory / name, "rb") as file:
            digest.update(file.read(HEAD))
            for probe in range(PROBES):
                file.seek(max(0, (size - PROBE) * (probe + 1) // PROBES))
                digest.update(file.read(PROBE))
    return digest.hexdigest()[:16]
