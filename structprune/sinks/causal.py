"""Causal language models of transformers: loaded without remote code, and their attention while they generate."""

from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Callable, Iterator

import torch

from structprune.errors import UserError
from structprune.models.checkpoint_files import read_json
from structprune.models.loading import as_dtype
from structprune.sinks.trajectory import Recorder, Trajectory
from structprune.statistics.sinks import head_mass

ATTENTION = "structprune_sdpa"  # under which transformers knows our attention function; "sdpa" in it has it checked
_meter: ContextVar["CausalMeter | None"] = ContextVar("meter", default=None)


class CausalMeter:
    """Incoming attention of every layer, (B, H, T), summed over all queries since the last `reset`.

    With a cache every query is computed once, and its attention never changes: what a step adds is all that is new.
    """

    def __init__(self):
        self._layers: dict[int, torch.Tensor] = {}

    def add(self, layer: int, mass: torch.Tensor) -> None:
        """Take in the mass (B, H, T) that new queries give; T grows by their number."""
        before = self._layers.get(layer)
        if before is not None:
            mass[..., : before.shape[-1]] += before
        self._layers[layer] = mass

    @property
    def layers(self) -> list[torch.Tensor]:
        """What there is so far, layer by layer."""
        return [self._layers[index] for index in sorted(self._layers)]

    @contextmanager
    def on(self) -> Iterator["CausalMeter"]:
        """Take in what models that attend by `ATTENTION` do while open."""
        token = _meter.set(self)
        try:
            yield self
        finally:
            _meter.reset(token)


def _attend(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' attention by `scaled_dot_product_attention`, and the mass it gives every key."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    meter = _meter.get()
    if meter is not None:
        meter.add(module.layer_idx, head_mass(query, key, None, scaling, attention_mask, attention_mask is None))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)


def register_attention() -> None:
    """Make `ATTENTION` known to transformers, with the masks that `sdpa` takes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def gguf_file(source: Path) -> str | None:
    """The name of the GGUF file to read: the path's own, or a directory's where it has neither config nor safetensors.

    Raises:
        UserError: a directory with several.
    """
    if source.is_file():
        return source.name if source.suffix == ".gguf" else None
    names = sorted(path.name for path in source.glob("*.gguf"))
    if not names or any(source.glob("*.safetensors")):
        return None
    if len(names) > 1:
        raise UserError(f"{source} holds {len(names)} GGUF files ({', '.join(names)}): name the one to read")
    return names[0]


def is_causal(directory: Path) -> bool:
    """Whether config.json (or a GGUF file) describes a model that transformers has as a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if gguf_file(directory) is not None:
        return True
    return read_json(directory / "config.json").get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def read_causal(source: Path):
    """A causal language model's configuration and tokenizer, of transformers' own classes; no weight is read.

    Raises:
        UserError: they cannot be read, or are of an encoder.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    with _reading(source) as (place, options):
        config = AutoConfig.from_pretrained(place, **options)
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        raise _both_ways(source, config.model_type)
    with _reading(source) as (place, options):
        return config, AutoTokenizer.from_pretrained(place, **options)


def _both_ways(source: Path, kind: str) -> UserError:
    return UserError(
        f"{source} is no causal language model: as its config has it, positions of {kind} attend to later ones; give a"
        " decoder, such as Llama or Qwen"
    )


def load_causal(source: Path, dtype: str | None, device: torch.device):
    """A causal language model of transformers' own classes.

    Args:
        dtype: default float32 on CPU, else the checkpoint's own.
    Raises:
        UserError: it cannot be read, or its positions also attend to later ones.
    """
    from transformers import AutoModelForCausalLM

    register_attention()
    wanted = as_dtype(dtype) or (torch.float32 if device.type == "cpu" else "auto")
    with _reading(source) as (place, options):
        model = AutoModelForCausalLM.from_pretrained(place, dtype=wanted, attn_implementation=ATTENTION, **options)
    if any(hasattr(module, "layer_idx") and getattr(module, "is_causal", True) is False for module in model.modules()):
        raise _both_ways(source, type(model).__name__)
    return model.to(device).eval()


@contextmanager
def _reading(source: Path) -> Iterator[tuple[Path, dict]]:
    """Where transformers is to read from, and with which options; what it raises becomes one line."""
    from transformers.utils import logging

    name = gguf_file(source)
    logging.disable_progress_bar()  # ours is on the same screen
    try:
        options = {"trust_remote_code": False} | ({} if name is None else {"gguf_file": name})
        yield source.parent if source.is_file() else source, options
    except ImportError as error:
        raise UserError(f"reading {source} needs another package ({_first_line(error)})") from error
    except Exception as error:  # transformers raises what its many loaders raise
        raise UserError(f"{source} cannot be read as a causal language model ({_first_line(error)})") from error
    finally:
        logging.enable_progress_bar()


def sliding_window(config) -> int | None:
    """The fewest positions that a layer looks back on, of a transformers configuration; None where all see all."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)  # of every layer; None in families whose layers are all alike
    windows = {"sliding_attention": getattr(config, "sliding_window", None)}
    windows |= {"chunked_attention": getattr(config, "attention_chunk_size", None)}
    if getattr(config, "use_sliding_window", True) is False:
        del windows["sliding_attention"]
    found = [size for kind, size in windows.items() if size is not None and (kinds is None or kind in kinds)]
    return min(found, default=None)


def check_window(config, length: int, name: str) -> None:
    """Raise UserError where a text of `length` tokens is longer than a sliding window: the cache forgets its start."""
    window = sliding_window(config)
    if window is not None and length > window:
        raise UserError(
            f"{name} attends within a sliding window of {window} positions, fewer than the {length} of the run, so that"
            f" its first positions drop out: take --length, or the prompt and --gen-length together, down to {window}"
        )


@torch.no_grad()
def generation_trajectory(model, prompts: torch.Tensor, gen_length: int, track: Callable) -> Trajectory:
    """The model's own greedy generation from every prompt: at step s the text has P + s tokens.

    Generation goes on after an EOS, as that of masked diffusion LMs does. Mass is per query that sees a position; the
    positions that every step can compare lie in the prompt. What a query has attended to never changes, so this is a
    running mean over queries, and some of its stability comes from causality itself.

    Args:
        prompts: (N, P) int64.
        gen_length: S steps, a token each.
    Raises:
        UserError: the model has no attention that could be measured, or one by a shorter sliding window.
    """
    from transformers import GenerationConfig

    check_window(model.config, prompts.shape[1] + gen_length, type(model).__name__)
    recorder, device = Recorder(len(prompts), causal=True), model.device
    model.generation_config = GenerationConfig()  # the checkpoint's own may sample, penalise or stop
    for row, prompt in enumerate(track(list(prompts), "generation")):  # (P,)
        with CausalMeter().on() as meter:

            def observe(ids, scores, row=row, meter=meter):
                if not meter.layers:
                    raise UserError(f"{type(model).__name__} does not attend by transformers' attention interface")
                recorder.add([ids.shape[1] - len(prompt)], [row], ids, meter.layers)
                return scores

            model.generate(
                prompt[None].to(device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
                max_new_tokens=gen_length,
                do_sample=False,
                use_cache=True,
                logits_processor=[observe],
            )
    done = torch.arange(gen_length).expand(len(prompts), -1) / gen_length  # (N, S)
    return recorder.finish("reverse", prompts.shape[1], done)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
