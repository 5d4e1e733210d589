"""Official config.json -> our configuration: what is supported is built, what is not is refused by name."""

import re
from pathlib import Path

from transformers import PretrainedConfig

from structprune.errors import UserError, nearest
from structprune.models.checkpoint_files import read_json
from structprune.models.families import FAMILIES, Family

REFUSED_TYPES = {  # start of a model type or architecture, in lower case -> reason
    "llada2.*moe": "LLaDA2 is a mixture of experts with block diffusion: structprune cuts dense MLPs only",
    "llada2": "LLaDA2 is a block-diffusion model: structprune cuts dense, bidirectional models only",
    "llada_?moe": "LLaDA-MoE is a mixture of experts: structprune cuts dense MLPs only",
}
NOT_OURS = (  # of a LLaDA, tie_word_embeddings says nothing: its code ties the head by weight_tying
    "model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "_name_or_path", "rope_scaling", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip


def detect_family(values: dict, where: Path | str) -> Family:
    """The family of a config.json's contents.

    Raises:
        UserError: a model type that is not supported, with what is.
    """
    kind = str(values.get("model_type", ""))
    architecture = (values.get("architectures") or [""])[0]
    for family in FAMILIES:
        if kind in family.model_types or kind == family.config_class.model_type:
            return family
    for marker in (kind.lower(), architecture.lower()):
        for pattern, reason in REFUSED_TYPES.items():
            if re.match(pattern, marker):
                raise UserError(f"{where}: {reason}")
    known = [name for family in FAMILIES for name in family.model_types]
    raise UserError(f"{where}: unknown model_type '{kind}'{nearest(kind, known)}; supported: {', '.join(known)}")


def build_config(values: dict, family: Family, mask_id: int, where: Path | str) -> PretrainedConfig:
    """Our configuration from an official (or our own) config.json's contents.

    Raises:
        UserError: a required key is missing, or one has a value that this implementation does not compute.
    """
    for key in family.required:
        if not isinstance(values.get(key), int) or values[key] < 1:
            raise UserError(f"{where}: config.json has no positive integer '{key}', which {family.name} needs: add it")
    for key, allowed in family.supported.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{where}: {key} = {values[key]!r} is not supported ({family.name} needs {allowed[0]!r})")
    hidden, heads = values[family.keys["hidden"]], values[family.width_keys["query_heads"]]
    if values.get("head_dim") is None and hidden % heads:
        raise UserError(
            f"{where}: hidden size {hidden} is not a multiple of {heads} heads and head_dim is not given: add it"
        )
    kv_heads = values.get(family.width_keys["kv_heads"]) or heads
    if heads % kv_heads:
        raise UserError(f"{where}: {heads} heads are not a multiple of {kv_heads} key/value heads: correct either")
    rope = values.get("rope_parameters") or {}  # where transformers 5 keeps what rope_theta and rope_scaling were
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{where}: rope_type = {rope['rope_type']!r} is not supported (needs 'default')")
    arguments = {key: value for key, value in values.items() if key not in NOT_OURS}
    if rope.get("rope_theta") is not None:
        arguments["rope_theta"] = rope["rope_theta"]
    vocabulary = arguments.get(family.keys["vocabulary"]) or arguments["vocab_size"]
    if not 0 <= mask_id < vocabulary:
        raise UserError(f"{where}: mask id {mask_id} lies outside the embedding of {vocabulary} tokens")
    return family.config_class(**(arguments | {"mask_token_id": mask_id}))


def find_mask_id(values: dict, directory: Path, mask_id: int | None = None) -> int:
    """The mask token's id: `mask_id` if there is one, else the config's, else the tokenizer's `mask_token`.

    Raises:
        UserError: none of them has one.
    """
    if mask_id is not None:
        return mask_id
    if isinstance(values.get("mask_token_id"), int):
        return values["mask_token_id"]
    settings = directory / "tokenizer_config.json"
    content = read_json(settings) if settings.exists() else {}
    token = content.get("mask_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None:
        for number, entry in content.get("added_tokens_decoder", {}).items():
            if entry.get("content") == token:
                return int(number)
        vocabulary = directory / "tokenizer.json"
        for entry in read_json(vocabulary).get("added_tokens", []) if vocabulary.exists() else []:
            if entry.get("content") == token:
                return int(entry["id"])
    remedy = "give it with --mask-id, in Python and lm-eval as mask_id (LLaDA 126336, Dream 151666)"
    raise UserError(f"{directory}: no mask id in config.json or the tokenizer: {remedy}")
