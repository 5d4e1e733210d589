"""Official checkpoint directory or Hub id -> our model, with no code from the checkpoint executed."""

from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.errors import UserError
from structprune.models.checkpoint_files import locate, read_headers, read_json, shard_names
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.official import build_config, detect_family, find_mask_id

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class Source:
    """Where a model came from: its directory, its config.json's contents, and the dtype its weights are stored in."""

    directory: Path
    values: dict
    dtype: torch.dtype


def as_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """A torch dtype from its name ("bfloat16"); None and dtypes pass through.

    Raises:
        UserError: not a floating-point dtype's name.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    value = getattr(torch, str(name), None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise UserError(f"unknown dtype '{name}': give float32, bfloat16 or float16")
    return value


def load_config(source: str | Path, mask_id: int | None = None):
    """Our configuration and family of a checkpoint; reads config.json (and the tokenizer's settings) only.

    Returns:
        (directory, family, config, config.json's contents)
    """
    directory = locate(source)
    values = read_json(directory / "config.json")
    family = detect_family(values, directory)
    config = build_config(values, family, find_mask_id(values, directory, mask_id), directory)
    return directory, family, config, values


def load_model(source, dtype=None, device=None, mask_id: int | None = None, allow_pickle: bool = False) -> DiffusionLM:
    """Load an official LLaDA, LLaDA-1.5, MMaDA or Dream checkpoint, or one that structprune wrote.

    Args:
        source: directory, or Hub id.
        dtype: of the weights in memory; default float32 on CPU (bf16 products are far slower there), the
            checkpoint's own on an accelerator.
        device: default CPU.
        mask_id: the mask token's id, where neither config nor tokenizer has it.
        allow_pickle: also read `.bin` shards, with `torch.load(weights_only=True)`.
    Returns:
        A `transformers.PreTrainedModel` in eval mode; `model.source` says where it came from.
    Raises:
        UserError: anything wrong with the checkpoint, in one line.
    """
    directory, family, config, values = load_config(source, mask_id)
    device = torch.device("cpu" if device is None else device)
    with torch.device("meta"):
        model = family.model_class(config)
    names = shard_names(directory, allow_pickle)
    if not names[0].endswith(".bin"):
        check_shapes(model, {n: h.shape for n, h in read_headers(directory, names).items()}, directory)
    state = {}
    for name in names:
        state |= _read_shard(directory / name)
    check_shapes(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, directory)
    stored = max((t.dtype for t in state.values()), key=[t.dtype for t in state.values()].count)
    dtype = as_dtype(dtype) or (torch.float32 if device.type == "cpu" else stored)
    wanted = model.state_dict().keys()
    placed = {name: state.pop(name).to(device, dtype) for name in wanted}
    model.load_state_dict(placed, assign=True)
    model.config.dtype = dtype
    model.source = Source(directory, values, stored)
    return model.eval()


def check_shapes(model: DiffusionLM, shapes: dict[str, tuple[int, ...]], directory: Path) -> None:
    """Stored tensors against the model that the config describes.

    Raises:
        UserError: one is missing, unknown, or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in wanted.items():
        if name not in shapes:
            raise UserError(f"{directory}: the weights lack {name}, which config.json asks for")
        if shapes[name] != shape:
            raise UserError(f"{directory}: {name} is {shapes[name]}, but config.json asks for {shape}")
    extra = [name for name in shapes if name not in wanted and not name.endswith("inv_freq")]
    if extra:
        raise UserError(f"{directory}: {len(extra)} weights are not in the model config.json describes (first: {extra[0]})")


def _read_shard(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".bin":
        state = torch.load(path, map_location="cpu", weights_only=True)
    else:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read ({error}): download it again") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds NaN or Inf: the shard is damaged, download it again")
    return state


def load_tokenizer(directory: str | Path):
    """The checkpoint's own tokenizer, by transformers' classes only (no remote code).

    Raises:
        UserError: the directory has none that can be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = Path(directory)
    if (directory / "tokenizer.json").exists():
        try:  # the official files name classes that only their remote code has; tokenizer.json is all there is to it
            return PreTrainedTokenizerFast.from_pretrained(directory)
        except Exception as error:
            raise UserError(f"{directory}: the tokenizer cannot be read ({str(error).splitlines()[0]})") from error
    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception as error:
        raise UserError(f"{directory}: no tokenizer.json, and no tokenizer that can be read without remote code") from error


