"""`structprune generate`."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from structprune.cli.options import BlockSize, Checkpoint, Debug, Device, Dtype, MaskId, Pickle
from structprune.errors import Interrupted, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from structprune.generation.denoise import Step
    from structprune.generation.settings import GenerateConfig
    from structprune.runs.generate import Cost, Generated, Prompt, TextGenerator

Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="Text to continue. Repeatable.", show_default="asked for, or stdin"),
]
Chat = Annotated[bool, typer.Option("--chat", help="Prompts go through the chat template (Instruct checkpoints).")]
GenLength = Annotated[int | None, typer.Option(help="Tokens to generate.", show_default="128")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="--gen-length, a token a step")]
BlockLength = Annotated[
    int | None, typer.Option(help="LLaDA, A2D: tokens of a block.", show_default="32 where --gen-length allows")
]
Threshold = Annotated[
    float | None, typer.Option(help="Also reveal every prediction with at least this probability: fewer steps.")
]
Temperature = Annotated[float | None, typer.Option(help="Of the choice of tokens.", show_default="0, the likeliest")]
Cache = Annotated[
    str | None,
    typer.Option(
        help="none, prefix or dual: faster, and approximate, but exact in block diffusion.", show_default="none"
    ),
]
Seed = Annotated[int | None, typer.Option(help="Random seed, where anything is drawn.", show_default="0")]
Json = Annotated[bool, typer.Option("--json", help="A line of JSON for every prompt.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="YAML file with sections model and generation.", show_default="built-in defaults"),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a configuration key: generation.top_p=0.95. Repeatable."),
]


def generate(
    checkpoint: Checkpoint,
    prompt: Prompts = None,
    chat: Chat = False,
    gen_length: GenLength = None,
    steps: Steps = None,
    block_length: BlockLength = None,
    threshold: Threshold = None,
    temperature: Temperature = None,
    cache: Cache = None,
    seed: Seed = None,
    as_json: Json = False,
    config: ConfigFile = None,
    sets: Sets = None,
    device: Device = None,
    dtype: Dtype = None,
    mask_id: MaskId = None,
    block_size: BlockSize = None,
    allow_pickle: Pickle = False,
    debug: Debug = False,
) -> None:
    """Options with a name of their own override --set and --config."""
    from structprune.generation.settings import GenerateConfig

    named = {
        "generation.chat": chat or None,
        "generation.gen_length": gen_length,
        "generation.steps": steps,
        "generation.block_length": block_length,
        "generation.threshold": threshold,
        "generation.temperature": temperature,
        "generation.cache": cache,
        "generation.seed": seed,
        "model.device": device,
        "model.dtype": dtype,
        "model.mask_id": mask_id,
        "model.block_size": block_size,
        "model.allow_pickle": allow_pickle or None,
    }
    settings = GenerateConfig.with_options(config, sets, named)
    prompts = prompt or _piped()
    if prompts is None and as_json:
        raise UserError("--json is for prompts that are given: add --prompt, or pipe one in")
    try:
        _generate_and_show(checkpoint, settings, prompts, as_json)
    except KeyboardInterrupt as error:
        raise Interrupted("the text under way is lost") from error


def _generate_and_show(checkpoint: str, settings: "GenerateConfig", prompts: list[str] | None, as_json: bool) -> None:
    """Progress and cost go to stderr, the text to stdout; without prompts, they are asked for."""
    from structprune.cli.console import warner
    from structprune.runs.generate import TextGenerator

    generator = TextGenerator.open(checkpoint, settings, prompts or ())
    if warning := generator.warning:
        warner(True)(warning)
    if prompts is None:
        _converse(generator, settings.generation.chat)
        return
    results, cost = _shown(generator, prompts)
    for result in results:
        _write(_json(result) if as_json else _for_stdout(result.text))
    print(f"structprune: {_cost_line(cost)}", file=sys.stderr)


def _write(text: str) -> None:
    """A line of standard output in UTF-8, whatever the locale; a reader that has gone away is no error."""
    try:
        if hasattr(sys.stdout, "buffer"):
            sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")
        else:
            sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end goes there


def _piped() -> list[str] | None:
    """Standard input as one prompt, without the line break at its end; None where it is a terminal.

    Raises:
        UserError: nothing is there, or no text.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    try:
        source = getattr(sys.stdin, "buffer", sys.stdin)
        content = "" if source is None else source.read()
        text = content.decode("utf-8") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise UserError("standard input is no UTF-8 text: give --prompt TEXT, or pipe text in") from error
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise UserError("no prompt: give --prompt TEXT, or pipe text in")
    return [text]


def _line() -> str:
    """A line of a terminal; its prompt is no part of what is generated.

    Raises:
        EOFError: the input has ended.
    """
    if sys.stdout.isatty():
        return input("> ")
    print("> ", end="", file=sys.stderr, flush=True)
    return input()


def _converse(generator: "TextGenerator", chat: bool) -> None:
    """Prompts line by line until the end of input; with a chat template, each is the next turn of a conversation,
    which begins anew where it does not fit any more."""
    from structprune.report.denoising import printable

    messages: list[dict[str, str]] = []
    print("A line is a prompt; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = _line()
        except EOFError:
            print(file=sys.stderr)
            return
        if not line.strip():
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            (result,), cost = _shown(generator, [asked if chat else line])
        except UserError as error:  # such as a prompt that is too long: the next may be shorter
            print(f"structprune: error: {printable(str(error))}", file=sys.stderr)
            if messages:
                print("The conversation begins anew.", file=sys.stderr)
                messages = []
            continue
        messages = [*asked, {"role": "assistant", "content": result.text}] if chat else []
        _write(_for_stdout(result.text))
        print(f"structprune: {_cost_line(cost)}", file=sys.stderr)


def _shown(generator: "TextGenerator", prompts: "Sequence[Prompt]") -> "tuple[list[Generated], Cost]":
    """Generate; on a terminal one prompt is shown while it is denoised, of several a progress bar."""
    from rich.console import Console

    from structprune.cli.console import progress_bars
    from structprune.runs.generate import Observers

    console = Console(stderr=True)
    if len(prompts) == 1:
        with _live(console, generator) as show:
            return generator.run(prompts, Observers(step=show))
    with progress_bars(console) as track:
        return generator.run(prompts, Observers(track=lambda steps: track(steps, "denoising")))


@contextmanager
def _live(console: "Console", generator: "TextGenerator") -> "Iterator[Callable[[Step], None]]":
    """Yields what shows the text of a step while it is denoised; nothing is shown where there is no terminal."""
    if not console.is_interactive:
        yield lambda step: None
        return
    from rich.live import Live

    from structprune.report.denoising import denoising_text

    length, mask_id = generator.reader.settings.gen_length, generator.model.config.mask_token_id
    before: list[int] = []
    with Live(console=console, transient=True, refresh_per_second=12, vertical_overflow="crop") as live:

        def show(step: "Step") -> None:
            nonlocal before
            ids = step.ids[0, -length:].tolist()
            live.update(denoising_text(ids, before, mask_id, generator.reader.texts.tokenizer.decode))
            before = ids

        yield show


def _for_stdout(text: str) -> str:
    """Text as it is, but on a terminal without characters that it would obey."""
    from structprune.report.denoising import printable

    return printable(text) if sys.stdout.isatty() else text


def _json(result: "Generated") -> str:
    return json.dumps({"prompt": result.prompt, "text": result.text, "ids": result.ids.tolist()}, ensure_ascii=False)


def _cost_line(cost: "Cost") -> str:
    rate = cost.tokens / cost.seconds if cost.seconds else 0.0
    return f"{cost.tokens} tokens in {cost.passes} passes and {cost.seconds:.1f} s, {rate:.1f} tokens/s"
