"""A checkpoint without its weights: a model on the meta device, from config.json and safetensors headers alone."""

from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.config import ModelSettings
from structprune.models.adapter import Adapter
from structprune.models.fingerprint import fingerprint
from structprune.models.headers import stored_headers
from structprune.models.joined import split_stored
from structprune.models.loading import DTYPES, as_dtype, check_dtypes, check_shapes, load_config, source_name
from structprune.models.modeling_structprune import DiffusionLM


@dataclass(frozen=True, eq=False)
class Ghost:
    """A checkpoint whose weights were not read; its model is on the meta device."""

    name: str  # the Hub id, or the directory's own name
    directory: Path
    model: DiffusionLM
    values: dict  # contents of config.json
    stored: torch.dtype  # of the weights
    hub: bool = False  # its weights may not be on this machine yet

    @property
    def source(self) -> str | Path:
        """What its weights are loaded from: the Hub id, or the directory."""
        return self.name if self.hub else self.directory

    def identity(self, allow_pickle: bool = False) -> str:
        """What its content is known by: of a Hub id the revision, as its weights may come later, else a fingerprint.

        Raises:
            UserError: a directory without weights.
        """
        return f"{self.name}@{self.directory.name}" if self.hub else fingerprint(self.directory, allow_pickle)

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.model)

    @property
    def stored_bytes(self) -> int:
        """Bytes of its weights on disk."""
        return self.model.num_parameters() * self.stored.itemsize


def read_ghost(source: str | Path, settings: ModelSettings) -> Ghost:
    """Read a checkpoint's configuration and headers; a directory that holds only config.json is enough.

    Raises:
        UserError: a checkpoint that cannot be loaded, as far as config.json and headers tell.
    """
    directory, family, config, values = load_config(source, settings.mask_id, block_size=settings.block_size)
    with torch.device("meta"):
        model = family.model_class(config)
    headers = split_stored(model, stored_headers(source, directory, settings.allow_pickle), directory)
    if headers:
        check_dtypes(headers, values, directory)
        check_shapes(model, headers, directory)
        dtypes = [DTYPES[header.dtype] for header in headers.values() if header.dtype in DTYPES]
        stored = max(dtypes, key=dtypes.count)
    else:
        name = str(values.get("torch_dtype") or values.get("dtype") or "bfloat16")
        stored = as_dtype(name.removeprefix("torch.")) or torch.bfloat16
    hub = not Path(source).is_dir()
    return Ghost(source_name(source, directory), directory, model, values, stored, hub)
