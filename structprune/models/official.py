"""Official config.json -> our configuration: what is supported is built, what is not is refused by name."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from structprune.errors import UserError, nearest, shown
from structprune.models.checkpoint_files import read_json
from structprune.models.config_values import USED, WHOLE, check_heads, check_rope, check_values, check_whole
from structprune.models.configuration_structprune import LayoutConfig, layout_of
from structprune.models.families import FAMILIES, Family
from structprune.models.quiet import quiet_transformers

NOT_OURS = (
    "model_type", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "_name_or_path", "rope_scaling", "rope_parameters", "quantization_config",
    "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
    "attribute_map", "transformers_weights",  # would rename attributes, and weights
    "num_labels", "id2label", "label2id",  # of classifiers; transformers makes a table of as many as are named
)  # fmt: skip


def detect_family(values: dict, where: Path | str) -> Family:
    """The family of a config.json's contents.

    Raises:
        UserError: a model type that is not supported, with what is.
    """
    kind = str(values.get("model_type", ""))[:80]
    architectures = values.get("architectures")
    architecture = str(architectures[0])[:80] if isinstance(architectures, list) and architectures else ""
    if families := _families_of(kind):  # of several, that of the architecture, and of blocks where their size is known
        families = [family for family in families if family.architecture == architecture] or families
        blocks = values.get("block_size") is not None
        return next((family for family in families if family.in_blocks == blocks), families[0])
    known = list(dict.fromkeys(name for family in FAMILIES for name in family.model_types))
    raise UserError(f"{where}: unknown model_type '{kind}'{nearest(kind, known)}; supported: {', '.join(known)}")


def _families_of(kind: Any) -> list[Family]:
    return [family for family in FAMILIES if kind in (*family.model_types, family.config_class.model_type)]


def with_block_size(values: dict, given: int | None, where: Path | str) -> dict:
    """A config.json's contents with the size of blocks that the user gives, where config.json has none.

    Raises:
        UserError: it has another one, the model has no blocks, or the size is none.
    """
    if given is None:
        return values
    kind, said = str(values.get("model_type", ""))[:80], values.get("block_size")
    option, families = f"--block-size {given} (model.block_size)", _families_of(kind)
    if not any(family.in_blocks for family in families):
        raise UserError(f"{where}: {option} is for block diffusion models, and '{kind}' is none: leave it out")
    if said not in (None, given):
        raise UserError(f"{where}: config.json has block_size = {shown(said)}: leave out {option}")
    longest = values.get(families[0].keys["positions"])
    if type(given) is not int or given < 1 or (isinstance(longest, int) and given >= longest):
        below = f"below the model's {longest} positions" if isinstance(longest, int) else "from 1"
        raise UserError(f"{where}: {option} is not a number of tokens {below}: dllm trained with 32")
    return values | {"block_size": given}


def build_config(values: dict, family: Family, mask_id: int, where: Path | str) -> PretrainedConfig:
    """Our configuration from an official (or our own) config.json's contents.

    Raises:
        UserError: a required key is missing, or one has a value that this implementation does not compute.
    """
    check_values(values, family, where)
    for key, allowed in family.supported.items():
        absent = values.get(key) is None and not all(allowed)  # null is the default, where that is false or null too
        if key in values and not absent and values[key] not in allowed:
            value, needs = shown(values[key]), shown(allowed[0])
            raise UserError(f"{where}: {key} = {value} is not supported ({family.name} needs {needs})")
    check_heads(values, family, where)
    rope = check_rope(values, family, where)
    roles = {*family.keys.values(), *family.width_keys.values()}
    other_names = set(family.config_class.attribute_map) - roles  # of the same values, which could contradict them
    arguments = {
        key: value
        for key, value in values.items()
        # null is the default; and no key may take the place of a method
        if key not in (*NOT_OURS, *family.ignored, *other_names) and not (value is None and key in (*roles, *USED))
        if not callable(getattr(family.config_class, key, None))
    }
    if rope.get("rope_theta") is not None:
        arguments["rope_theta"] = rope["rope_theta"]
    if family.rope_types != ("default",):
        arguments["rope_scaling"] = rope
    vocabulary = arguments.get(family.keys["vocabulary"]) or arguments["vocab_size"]
    if not 0 <= mask_id < vocabulary:
        raise UserError(f"{where}: mask id {shown(mask_id)} lies outside the embedding of {vocabulary} tokens")
    own: dict[str, Any] = {"mask_token_id": mask_id}
    if issubclass(family.config_class, LayoutConfig) and values["model_type"] in family.model_types:
        own["published"] = layout_of(values)
    try:
        with quiet_transformers():
            return family.config_class(**(arguments | own))
    except Exception as error:  # keys that only transformers reads, such as layer_types
        reason = " ".join(str(error).split())[:200] or type(error).__name__  # its reason may come after its first line
        raise UserError(f"{where}: config.json cannot be used ({reason}): correct it") from error


def find_mask_id(values: dict, directory: Path, mask_id: int | None = None) -> int:
    """The mask token's id: `mask_id` if there is one, else the config's, else the tokenizer's `mask_token`.

    Raises:
        UserError: none of them has one.
    """
    if mask_id is not None:
        return mask_id
    if values.get("mask_token_id") is not None:
        check_whole("mask_token_id", values["mask_token_id"], *WHOLE["mask_token_id"], directory)
        return values["mask_token_id"]
    number = _mask_in_tokenizer(directory)
    if number is None:
        known = "LLaDA 126336, Dream 151666, A2D of Qwen3 151669, LLaDA2 156895"
        remedy = f"give it with --mask-id, in Python and lm-eval as mask_id ({known})"
        raise UserError(f"{directory}: no mask id in config.json or the tokenizer: {remedy}")
    return number


def _mask_in_tokenizer(directory: Path) -> int | None:
    """The id of the tokenizer's `mask_token`, from its settings alone; None where they name none."""
    settings, vocabulary = directory / "tokenizer_config.json", directory / "tokenizer.json"
    content = read_json(settings) if settings.exists() else {}
    token = content.get("mask_token")
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str):
        return None
    decoder = content.get("added_tokens_decoder")
    entries: list[tuple[Any, Any]] = []
    if isinstance(decoder, dict):
        entries += decoder.items()
    added = read_json(vocabulary).get("added_tokens") if vocabulary.exists() else None
    if isinstance(added, list):
        entries += [(entry.get("id"), entry) for entry in added if isinstance(entry, dict)]
    for number, entry in entries:
        if isinstance(entry, dict) and entry.get("content") == token and str(number).isdecimal():
            return int(number)
    return None
