"""Text from a checkpoint by iterative denoising: `structprune generate`, without a console."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch

from structprune.errors import UserError, shown
from structprune.evaluation.texts import EDGES, Texts, chat_warning, model_names
from structprune.generation.denoise import Options, Step
from structprune.generation.generate import check_request
from structprune.generation.generate import generate as denoise
from structprune.generation.settings import GenerateConfig, GenerationSettings, sampler_settings
from structprune.models.families import family_of
from structprune.models.loading import load_model, source_of
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device
from structprune.models.tokenizer import load_tokenizer
from structprune.runs.ghost import read_ghost

Message = dict[str, str]  # role, content
Prompt = str | Sequence[Message]  # text, or with `generation.chat` a conversation whose next turn is the model's


@dataclass(frozen=True)
class Generated:
    """What was generated after one prompt.

    Attributes:
        prompt: as the model read it. text: up to EOS, without special tokens. ids: (G,) int64, all generated tokens.
    """

    prompt: str
    text: str
    ids: torch.Tensor


@dataclass(frozen=True)
class Cost:
    """What a generation took: tokens of all prompts, forward passes, seconds."""

    tokens: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class Observers:
    """What is told of a generation on its way: `step` before every forward pass; `track` wraps its steps."""

    step: Callable[[Step], None] = lambda step: None
    track: Callable[[Iterable], Iterable] = lambda steps: steps


UNOBSERVED = Observers()


def is_message(value: Any) -> TypeGuard[Message]:
    """Whether a value is a turn of a conversation."""
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


class Reader:
    """Prompts to tokens for one checkpoint, and back; needs no weights.

    Args:
        config: of the model. directory: of its checkpoint.
    Raises:
        UserError: no tokenizer, with `generation.chat` no chat template, or options that the sampler does not have.
    """

    def __init__(self, config: Any, directory: Path, run: GenerationSettings):
        self.settings = sampler_settings(config, run)
        tokenizer, edges = load_tokenizer(directory), family_of(config).text_edges
        texts = Texts.of(tokenizer, "none", run.chat)
        starts = () if run.chat else (getattr(tokenizer, f"{name}_id") for name in EDGES[edges][0])
        self.texts = replace(texts, start=tuple(token for token in starts if token is not None))
        self._config, self._chat = config, run.chat

    def read(self, prompts: Sequence[Prompt]) -> list[tuple[str, torch.Tensor]]:
        """Every prompt as the model reads it, as text and as (P,) int64.

        Raises:
            UserError: an empty prompt, one too long for the model, or one that holds the mask token.
        """
        texts = [self._text(prompt) for prompt in prompts]
        ids = [self.texts.prompt(text) for text in texts]  # N x (P,)
        check_request(self._config, ids, self.settings, Options())
        return list(zip(texts, ids, strict=True))

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            if any("\ud800" <= character <= "\udfff" for character in prompt):  # of bytes that were no UTF-8
                raise UserError(f"the prompt {shown(prompt)} is no UTF-8 text: encode it so")
            return self.texts.question(prompt)
        turns = [dict(each) for each in prompt if is_message(each)] if isinstance(prompt, Sequence) else []
        if not turns or len(turns) < len(prompt):
            raise UserError(
                f"the prompt {shown(prompt)} is no text and no list of messages with role and content: give either, a"
                " conversation in a list of its own"
            )
        if not self._chat:
            raise UserError("a conversation needs the chat template: set generation.chat = true, or give text")
        return self.texts.render(turns)


class TextGenerator:
    """A model that continues text.

    Args:
        model: as `load_model` returns it.
    Raises:
        UserError: a model without a source checkpoint; as `Reader`.
    """

    def __init__(self, model: DiffusionLM, config: GenerateConfig):
        self.model, self._run = model, config.generation
        self.reader = Reader(model.config, source_of(model).directory, self._run)
        self._random = torch.Generator().manual_seed(self._run.seed)

    @classmethod
    def open(cls, checkpoint: str | Path, config: GenerateConfig, prompts: Sequence[Prompt] = ()) -> "TextGenerator":
        """The model of a checkpoint directory or Hub id.

        Args:
            prompts: checked before weights are read.
        Raises:
            UserError: as `load_model`, `Reader` and `Reader.read`.
        """
        settings = config.model
        ghost = read_ghost(str(checkpoint), settings)
        Reader(ghost.model.config, ghost.directory, config.generation).read(prompts)
        device = pick_device(settings.device)
        return cls(load_model(checkpoint, settings.dtype, device, **settings.reading), config)

    @property
    def warning(self) -> str | None:
        """A line about a chat template that does not fit the checkpoint."""
        source = source_of(self.model)
        names = model_names(source.name or source.directory.name, source.directory)
        return chat_warning(names, bool(getattr(self.reader.texts.tokenizer, "chat_template", None)), self._run.chat)

    def run(self, prompts: Sequence[Prompt], observers: Observers = UNOBSERVED) -> tuple[list[Generated], Cost]:
        """What the model writes after every prompt, in their order, and what it took.

        Raises:
            UserError: as `Reader.read`.
        """
        texts, ids = zip(*self.reader.read(prompts), strict=True) if prompts else ((), ())
        passes = 0

        def record(step: Step) -> None:
            nonlocal passes
            passes += 1
            observers.step(step)

        run = self._run
        options = Options(
            generator=self._random, batch=run.batch, track=observers.track, record=record, cache=run.cache,
            refresh=run.refresh,
        )  # fmt: skip
        start = time.perf_counter()
        outputs = denoise(self.model, ids, self.reader.settings, options=options)
        seconds = time.perf_counter() - start
        tails = [output[len(prompt) :] for output, prompt in zip(outputs, ids, strict=True)]  # N x (G,)
        answers = [self.reader.texts.answer(tail) for tail in tails]
        results = [Generated(*each) for each in zip(texts, answers, tails, strict=True)]
        return results, Cost(sum(map(len, tails)), passes, seconds)


def generate(
    checkpoint: str | Path | DiffusionLM,
    prompts: str | Sequence[Prompt],
    config: GenerateConfig | None = None,
    observers: Observers = UNOBSERVED,
    **options: Any,
) -> Generated | list[Generated]:
    """Generate text after one prompt, or after each of several.

        structprune.generate("llada-0.5", "The capital of France is", gen_length=64).text

    Args:
        checkpoint: a directory, a Hub id, or a model of `structprune.load_model`.
        prompts: a text; or several, each a text or, with `chat=True`, a list of messages with `role` and `content`.
        config: `GenerateConfig`; default all defaults. Its section `model` is for a directory or Hub id only.
        options: keys of its section `generation`, which outrank it: gen_length=64, threshold=0.9, cache="prefix".
    Returns:
        One result for one text, else a list.
    Raises:
        UserError: anything the user can mend.
    """
    config = config or GenerateConfig()
    values = config.model_dump(exclude_unset=True)
    values["generation"] = values.get("generation", {}) | options
    config = GenerateConfig.build(values)
    if not isinstance(prompts, (str, list, tuple)):
        raise UserError(f"the prompts {shown(prompts)} are no text and no list: give one text, or a list of prompts")
    several = [prompts] if isinstance(prompts, str) else prompts
    if isinstance(checkpoint, DiffusionLM):
        if config.model.model_fields_set:
            key = min(config.model.model_fields_set)
            raise UserError(
                f"model.{key} has no effect on a model that is loaded: leave it out, or name the checkpoint"
            )
        generator = TextGenerator(checkpoint, config)
    else:
        generator = TextGenerator.open(checkpoint, config, several)
    results, _ = generator.run(several, observers)
    return results[0] if isinstance(prompts, str) else results
