"""A Llama- or Qwen2-type causal checkpoint in Dream's official layout: what can be, its mask token, its weights.

Dream's layout is Qwen2's with an output head of its own, biases on queries, keys and values, and a mask token. Under a
causal attention mask the converted model computes the logits of the source. Shapes: C features, V tokens.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structprune.checkpoint.output import write_json, write_shards
from structprune.errors import UserError, nearest, shown
from structprune.models.checkpoint_files import TOKENIZER_FILES, read_json
from structprune.models.config_values import quantisation
from structprune.models.dream import DREAM
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.official import build_config
from structprune.models.tokenizer import TOKENS
from structprune.sinks.causal import sliding_window

CONVERTED = ("llama", "qwen2")  # model types whose blocks are Dream's
SPARE = re.compile(r"reserved|unused|extra_|place.?holder", re.IGNORECASE)  # names of tokens that no text has
UNREAD = {  # ends of keys of a GGUF file that transformers passes over -> what they describe
    ".rope.scaling.type": "rope scaling", ".rope.scaling.factor": "rope scaling", ".rope.scale_linear": "rope scaling",
    ".attention.sliding_window": "sliding windows",
}  # fmt: skip
NEW_MASK = "<|mask|>"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIASED, UNBIASED = ("q_proj", "k_proj", "v_proj"), ("o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MaskToken:
    """The mask token of a converted model."""

    text: str
    id: int
    rows: int  # of the embedding; more than the source has where the token is new

    def where(self, rows: int) -> str:
        """For people, which row it is of the source's `rows`."""
        return f"id {self.id}, a new row" if self.rows > rows else f"id {self.id}"


def check_source(config: Any, where: Path | str) -> None:
    """Check a transformers configuration against what Dream's layout can hold.

    Raises:
        UserError: another model type, scaled or partial rotary positions, attention windows, another activation,
            quantised weights.
    """
    if config.model_type not in CONVERTED:
        kinds = " and ".join(CONVERTED)
        raise UserError(f"{where} is of model type {shown(config.model_type)}: only {kinds} can be converted")
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{where} has rope_type = {shown(rope['rope_type'])}, but Dream's layout knows no scaled rotary positions:"
            " give a model without rope scaling"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{where} has partial_rotary_factor = {shown(rope['partial_rotary_factor'])}, but Dream rotates whole"
            " heads: give a model with 1.0"
        )
    if (window := sliding_window(config)) is not None:
        raise UserError(
            f"{where} attends within sliding windows of {window} positions, but Dream to all: give a model without"
            " sliding windows"
        )
    if config.hidden_act not in DREAM.supported["hidden_act"]:
        raise UserError(f"{where} has hidden_act = {shown(config.hidden_act)}, but Dream's is silu: give another model")
    if (method := quantisation(config.to_dict())) is not None:
        raise UserError(f"{where} is quantised ({method}): give the checkpoint it was made from")


def check_gguf(path: Path) -> None:
    """Check a GGUF file for what transformers does not read of it, so that the loaded model would be another one.

    Raises:
        UserError: scaled rotary positions, or attention windows.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for key, field in reader.fields.items():
        if remedy := next((text for end, text in UNREAD.items() if key.endswith(end)), None):
            part = field.parts[-1]  # (1,), or the bytes of a text
            value = bytes(part).decode(errors="replace") if part.dtype == "uint8" else part.tolist()[0]
            if value not in ("none", 1.0, 0):
                raise UserError(f"{path} has {key} = {shown(value)}: give a model without {remedy}")
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight" and (tensor.data != 1).any():
            raise UserError(f"{path} has scaled rotary positions (rope_freqs): give a model without rope scaling")


def choose_mask(tokenizer: Any, rows: int, text: str | None = None) -> MaskToken:
    """The mask token, which becomes the tokenizer's `mask_token`.

    Without `text`: the tokenizer's own mask token, else its first special token that is named as reserved or unused,
    else a new one, in a spare row of the embedding where there is one.

    Args:
        rows: of the embedding.
        text: an added token of the vocabulary without another use.
    Raises:
        UserError: `text` is not in the vocabulary, is an ordinary token or has another use; tokens without a row.
    """
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(f"the tokenizer has tokens up to id {largest}, but the embedding only {rows} rows: update it")
    added = {str(token): number for number, token in sorted(tokenizer.added_tokens_decoder.items())}
    template = str(tokenizer.chat_template or "")
    uses = {str(value): f"the tokenizer's {name}" for name in TOKENS if (value := getattr(tokenizer, name, None))}
    uses = {token: "in the chat template" for token in added if token in template} | uses
    if text is not None:
        _check_mask(text, tokenizer.get_vocab(), added, uses)
    else:
        spare = [token for token in added if SPARE.search(token) and token not in uses]
        text = tokenizer.mask_token or next(iter(spare), NEW_MASK)
    tokenizer.add_special_tokens({"mask_token": text})
    number = tokenizer.convert_tokens_to_ids(text)
    return MaskToken(text, number, max(rows, number + 1))


def _check_mask(text: str, vocabulary: dict[str, int], added: dict[str, int], uses: dict[str, str]) -> None:
    """Raise UserError unless a token is an added one without another use."""
    free = [token for token in added if token not in uses]
    choice = f"choose one of {shown(free)[1:-1]}, or leave it out" if free else "leave it out for a new token"
    if text not in vocabulary:
        raise UserError(f"--mask-token {shown(text)} is not in the vocabulary{nearest(text, free)}: {choice}")
    if text not in added:
        raise UserError(f"--mask-token {shown(text)} is an ordinary token, which text may hold: {choice}")
    if (use := uses.get(text)) and "mask_token" not in use:
        raise UserError(f"--mask-token {shown(text)} is {use}: {choice}")


def dream_values(config: Any, mask: MaskToken, tokenizer: Any, dtype: torch.dtype) -> dict:
    """config.json in Dream's official layout for a source's transformers configuration."""
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is None:
        end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    filler = config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    same = (
        "attention_dropout", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
        "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    )  # fmt: skip
    values = {key: getattr(config, key) for key in same}
    values |= {"model_type": DREAM.model_types[0], "architectures": ["DreamModel"], "vocab_size": mask.rows}
    values |= {"rope_theta": config.rope_parameters["rope_theta"], "rope_scaling": None, "tie_word_embeddings": False}
    values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_hidden_layers}
    values |= {"bos_token_id": config.bos_token_id if start is None else start, "eos_token_id": end}
    values |= {"pad_token_id": end if filler is None else filler, "mask_token_id": mask.id}
    values |= {"use_cache": False, "torch_dtype": str(dtype).removeprefix("torch.")}
    if size * config.num_attention_heads != config.hidden_size:
        values["head_dim"] = size  # Dream's own code has no such key; structprune and what it exports do
    return dict(sorted(values.items()))


def build_dream(causal: Any, values: dict, where: Path | str) -> DiffusionLM:
    """The converted model, in eval mode; it shares memory with `causal`, which is used up.

    Args:
        causal: the source, a model of transformers.
        values: of `dream_values`.
    Raises:
        UserError: it has biases that Dream's layout has no place for, or other weights than a Llama or Qwen2.
    """
    config = build_config(values, DREAM, values["mask_token_id"], where)
    with torch.device("meta"):
        model = DREAM.model_class(config)
    state = _dream_state(dict(causal.state_dict()), model.config.vocab_size, where)
    if difference := sorted(state.keys() ^ model.state_dict().keys()):
        raise UserError(f"{where}: {difference[0]} has no counterpart in Dream's layout: give another model")
    model.load_state_dict(state, assign=True)
    model.config.dtype = state[EMBEDDING].dtype
    return model.eval().requires_grad_(False)


def _dream_state(state: dict[str, torch.Tensor], rows: int, where: Path | str) -> dict[str, torch.Tensor]:
    """A source's weights under Dream's names: an untied head, `rows` tokens, a bias where Dream has one."""
    for name in [name for name in state if name.endswith(tuple(f"{part}.bias" for part in UNBIASED))]:
        if state.pop(name).any():
            raise UserError(f"{where} has {name}, but Dream's layout no such bias: give another model")
    for name in [name for name in state if name.endswith(tuple(f"{part}.weight" for part in BIASED))]:
        weight = state[name]  # (O, C)
        state.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(len(weight)))  # (O,)
    head = state.get(HEAD, state[EMBEDDING])  # (V, C)
    if head.data_ptr() == state[EMBEDDING].data_ptr():
        head = head.clone()  # (V, C)
    state[HEAD] = head
    for name in (EMBEDDING, HEAD):
        state[name] = _with_rows(state[name], rows)  # (rows, C)
    return state


def _with_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """(V, C) -> (rows, C): new rows are the mean of the others.

    So a new token's logit is the mean of all, and its probability at most 1 / V.
    """
    more = rows - len(weight)
    return torch.cat((weight, weight.mean(0, keepdim=True).expand(more, -1))) if more else weight  # (rows, C)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer under a class that every version of transformers has."""
    tokenizer.save_pretrained(directory)
    settings = directory / "tokenizer_config.json"
    values = read_json(settings)
    values.pop("auto_map", None)
    write_json(settings, values | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_dream(model: DiffusionLM, values: dict, tokenizer: Path, draft: Path) -> None:
    """Write weights in shards, config.json and the files of a tokenizer's directory into `draft`."""
    dtype, state = getattr(torch, values["torch_dtype"]), model.state_dict()
    headers = {name: torch.empty(tensor.shape, dtype=dtype, device="meta") for name, tensor in state.items()}
    write_shards(draft, headers, lambda name: state[name].detach().to("cpu", dtype).contiguous())
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, draft / name)
    write_json(draft / "config.json", values)
