"""Settings of a recovery that contradict each other, leave each other without effect, or cannot be met here."""

import torch

from structprune.config.effects import CAUSAL, refuse_idle
from structprune.errors import UserError, nearest
from structprune.models.encode import causal_weight
from structprune.models.modeling_structprune import DiffusionLM
from structprune.recovery.settings import RecoverConfig


def check_settings(config: RecoverConfig) -> None:
    """Raise UserError for choices that contradict each other or have no effect."""
    loss, train, cache = config.loss, config.train, config.teacher.cache
    if loss.kl == loss.cross_entropy == 0:
        raise UserError("loss.kl and loss.cross_entropy are both 0: nothing would be learnt, so set one of them")
    if cache is not None and loss.temperature != 1:
        raise UserError(
            f"teacher.cache = {cache} keeps predictions at temperature 1: leave it out, or loss.temperature ="
            f" {loss.temperature:g}"
        )
    if cache is not None and loss.streams > 0:
        raise UserError(
            f"teacher.cache = {cache} keeps predictions alone: leave it out, or loss.streams = {loss.streams:g}"
        )
    refuse_idle(
        config,
        [
            ("train", ("rank", "alpha", "targets"), train.method == "full", "train.method = lora"),
            ("loss", ("least_rate",), loss.weighting != "nelbo", "loss.weighting = nelbo"),
            ("loss", ("streams", "temperature", "teacher_share", "noisy_share"), loss.kl == 0, "loss.kl above 0"),
            ("teacher", ("cache",), loss.kl == 0, "loss.kl above 0"),
            ("teacher", ("top",), cache is None, "teacher.cache"),
        ],
    )
    check_stages(config)
    check_loggers(train.report_to)


def with_causal(config: RecoverConfig, model: DiffusionLM) -> RecoverConfig:
    """The configuration with the weight of the causal loss that the model's config has, where it names none.

    Raises:
        UserError: it names one, and the model is not causal too; a cache, which has no predictions of next tokens.
    """
    given, cache = config.loss.causal, config.teacher.cache
    if not model.layout.causal:
        if given is not None:
            raise UserError(f"loss.causal = {given:g} has no effect without {CAUSAL}: leave it out")
        return config
    weight = causal_weight(model) if given is None else given
    if cache is not None and weight > 0:
        raise UserError(
            f"teacher.cache = {cache} keeps predictions of masked tokens alone: leave it out, or set loss.causal = 0"
        )
    return config.model_copy(update={"loss": config.loss.model_copy(update={"causal": weight})})


def check_stages(config: RecoverConfig) -> None:
    """Raise UserError where a stage has too few tokens for a step, or a choice of a stage that is left out is made."""
    blocks, train = config.blocks, config.train
    step = train.batch * config.data.length
    for name, tokens, optional in (
        ("train", train.tokens, blocks.tokens > 0),
        ("blocks", blocks.tokens, True),
    ):
        if tokens < step and not (optional and tokens == 0):
            raise UserError(
                f"{name}.tokens = {tokens} is less than a step of train.batch x data.length = {step} tokens: raise it,"
                " or lower those"
            )
    only, need = train.tokens == 0, "train.tokens above 0"
    of_passes = ("tokens", "schedule", "warmup", "weight_decay", "clip", "batch", "pass_windows", "precision")
    of_training = tuple(key for key in type(train).model_fields if key not in of_passes)
    of_loss = ("streams", "causal", "temperature", "weighting", "teacher_share", "noisy_share")
    refuse_idle(
        config,
        [
            ("blocks", tuple(type(blocks).model_fields), blocks.tokens == 0, "blocks.tokens above 0"),
            ("train", of_training, only, need),
            ("loss", of_loss, only, need),
            ("teacher", ("cache", "top"), only, need),
            ("teacher", ("offload",), only and blocks.offload, need),
        ],
    )


def check_loggers(names: tuple[str, ...]) -> None:
    """Raise UserError for loggers that transformers does not know, or whose library is not installed."""
    if not names:
        return
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            close = nearest(name, list(INTEGRATION_TO_CALLBACK))
            choices = "" if close else f": choose from {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise UserError(f"train.report_to names an unknown logger '{name}'{close}{choices}")
        if name not in get_available_reporting_integrations():
            raise UserError(
                f"train.report_to = {name} needs its library, which is not installed: install it, or leave it out"
            )


def check_device(config: RecoverConfig, device: torch.device, launched: bool) -> None:
    """Raise UserError for a device that a training cannot be put on.

    Args:
        launched: whether a launcher chose the device of this process.
    """
    if config.teacher.offload and device.type == "cpu":
        raise UserError("teacher.offload = true has no effect on a CPU: leave it out, or compute on an accelerator")
    if config.blocks.offload and device.type == "cpu":
        raise UserError("blocks.offload = true has no effect on a CPU: leave it out, or compute on an accelerator")
    if not launched and device.index:
        raise UserError(
            f"a training takes the first GPU that it sees, not '{device}': give cuda, and CUDA_VISIBLE_DEVICES ="
            f" {device.index} before the command"
        )
