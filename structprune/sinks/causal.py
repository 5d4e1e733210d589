"""Causal language models of transformers: loaded without remote code, and their attention during generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from structprune.errors import UserError
from structprune.files import first_line
from structprune.models.checkpoint_files import read_config
from structprune.models.loading import as_dtype
from structprune.models.quiet import quiet_transformers
from structprune.models.tokenizer import hidden_panics, is_panic
from structprune.progress import Track
from structprune.sinks.trajectory import Recorder, Trajectory
from structprune.statistics.sinks import head_mass
from structprune.workers import ALONE, Workers

ATTENTION = "structprune_sdpa"  # name of our attention function in transformers, which checks names with "sdpa"
_meter: ContextVar["CausalMeter | None"] = ContextVar("meter", default=None)


class CausalMeter:
    """Incoming attention of every layer, (B, H, T), summed over all queries so far.

    With a cache every query is computed once and its attention never changes, so a step only adds its new queries.
    """

    def __init__(self) -> None:
        self._layers: dict[int, torch.Tensor] = {}

    def add(self, layer: int, mass: torch.Tensor) -> None:
        """Add the mass (B, H, T) of new queries; T grows by their number."""
        total = self._layers.get(layer)
        if total is not None:
            mass[..., : total.shape[-1]] += total
        self._layers[layer] = mass

    @property
    def layers(self) -> list[torch.Tensor]:
        """The mass so far, layer by layer."""
        return [self._layers[index] for index in sorted(self._layers)]

    @contextmanager
    def on(self) -> Iterator["CausalMeter"]:
        """While open, measure models whose attention function is `ATTENTION`."""
        token = _meter.set(self)
        try:
            yield self
        finally:
            _meter.reset(token)


def _attend(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' `sdpa` attention, with the mass of every key added to the open meter."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    meter = _meter.get()
    if meter is not None:
        meter.add(module.layer_idx, head_mass(query, key, None, scaling, attention_mask, attention_mask is None))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)


def register_attention() -> None:
    """Register `ATTENTION` with transformers, with the attention masks of `sdpa`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def gguf_file(source: Path) -> str | None:
    """Name of the GGUF file to read: the path itself, or the only one in a directory without safetensors.

    Raises:
        UserError: a directory with several GGUF files.
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
    """Whether config.json or a GGUF file describes a causal language model of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if gguf_file(directory) is not None:
        return True
    kind = read_config(directory).get("model_type")
    return isinstance(kind, str) and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def read_causal(source: Path) -> tuple[Any, Any]:
    """Configuration and tokenizer of a causal language model, in transformers' own classes; reads no weights.

    Raises:
        UserError: they cannot be read, or belong to an encoder.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    with _reading(source) as (place, options):
        config = AutoConfig.from_pretrained(place, **options)
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        raise _not_causal(source, config.model_type)
    with _reading(source) as (place, options):
        return config, AutoTokenizer.from_pretrained(place, **options)


def _not_causal(source: Path, kind: str) -> UserError:
    return UserError(
        f"{source} is not a causal language model: with its config, positions of {kind} attend to later ones; give a"
        " decoder, such as Llama or Qwen"
    )


def load_causal(source: Path, dtype: str | None, device: torch.device) -> Any:
    """A causal language model in transformers' own classes.

    Args:
        dtype: default float32 on CPU, else the checkpoint's own.
    Raises:
        UserError: it cannot be read, or its positions also attend to later ones.
    """
    from transformers import AutoModelForCausalLM

    register_attention()
    load_dtype = as_dtype(dtype) or (torch.float32 if device.type == "cpu" else "auto")
    options: dict[str, Any] = {"dtype": load_dtype, "attn_implementation": ATTENTION}
    with _reading(source) as (place, more):
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options, **more)
        model, report = loaded
        if absent := sorted(report["missing_keys"]):  # transformers fills them with random numbers
            count, first = len(absent), absent[0]
            raise UserError(f"{source} lacks {count} weights of its model (first: {first}): download it again")
    if any(hasattr(module, "layer_idx") and getattr(module, "is_causal", True) is False for module in model.modules()):
        raise _not_causal(source, type(model).__name__)
    return model.to(device).eval()


@contextmanager
def _reading(source: Path) -> Iterator[tuple[Path, dict]]:
    """The path and options for transformers' `from_pretrained`; its errors become one line."""
    name = gguf_file(source)
    options: dict[str, Any] = {"trust_remote_code": False} | ({} if name is None else {"gguf_file": name})
    try:
        with quiet_transformers(), hidden_panics():
            yield source.parent if source.is_file() else source, options
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"reading {source} needs another package ({first_line(error)})") from error
    except BaseException as error:  # its loaders raise errors of many types
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise UserError(f"{source} cannot be read as a causal language model ({first_line(error)})") from error


def sliding_window(config) -> int | None:
    """The shortest attention window of a layer in a transformers configuration; None without windows."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)  # one per layer; None in families whose layers are all alike
    windows = {"sliding_attention": getattr(config, "sliding_window", None)}
    windows |= {"chunked_attention": getattr(config, "attention_chunk_size", None)}
    if getattr(config, "use_sliding_window", True) is False:
        del windows["sliding_attention"]
    sizes = [size for kind, size in windows.items() if size is not None and (kinds is None or kind in kinds)]
    return min(sizes, default=None)


def check_window(config, length: int, name: str) -> None:
    """Raise UserError for a text of `length` tokens longer than a sliding window, whose cache would drop its start."""
    window = sliding_window(config)
    if window is not None and length > window:
        raise UserError(
            f"{name} attends within a sliding window of {window} positions, fewer than the {length} of the run, so that"
            f" its first positions drop out: lower --length, or the prompt and --gen-length together, to {window}"
        )


@torch.no_grad()
def generation_trajectory(
    model, prompts: torch.Tensor, gen_length: int, track: Track, workers: Workers = ALONE
) -> Trajectory:
    """The model's own greedy generation from every prompt: at step s the text has P + s tokens.

    Generation continues after an EOS, as for masked diffusion LMs. Mass is counted per query that can see a position;
    the positions that all steps have in common lie in the prompt. The attention of a past query never changes, so the
    mass is a running mean over queries, and part of its stability comes from causality itself.

    Args:
        prompts: (N, P) int64.
        gen_length: S steps, one token each.
        workers: the processes that share the prompts.
    Raises:
        UserError: attention of this model cannot be measured, or its sliding window is too short.
    """
    from transformers import GenerationConfig

    check_window(model.config, prompts.shape[1] + gen_length, type(model).__name__)
    own, device = prompts[workers.span(len(prompts))], model.device  # (n, P)
    recorder = Recorder(len(own), causal=True)
    model.generation_config = GenerationConfig()  # the checkpoint's own may sample, penalise or stop early
    for row, prompt in enumerate(track(list(own), "generation")):  # (P,)
        with CausalMeter().on() as meter:

            def observe(ids, scores, row=row, meter=meter):
                if not meter.layers:
                    name = type(model).__name__
                    raise UserError(f"{name} does not use transformers' attention interface: give another model")
                recorder.add([ids.shape[1] - prompts.shape[1]], [row], ids, meter.layers)
                return scores

            model.generate(
                prompt[None].to(device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
                max_new_tokens=gen_length,
                do_sample=False,
                use_cache=True,
                logits_processor=[observe],
            )
    progress = torch.arange(gen_length).expand(len(prompts), -1) / gen_length  # (N, S)
    return recorder.joined(workers).finish("reverse", prompts.shape[1], progress)
