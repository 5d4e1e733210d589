"""`structprune eval`."""

from pathlib import Path
from typing import Annotated

import typer

from structprune.cli.options import ConfigFile, Debug, Device, MaskId, Pickle, Sets
from structprune.errors import UserError

EVAL_HELP = """Evaluate checkpoints on text and tasks, and say whether they differ from the first.

Finished work is stored: the same command continues where an earlier one ended.

Several GPUs: accelerate launch -m structprune eval ... (on CPU: torchrun --nproc-per-node N -m structprune eval ...)

[bold]Examples[/bold]

structprune eval ./llada ./llada-0.5 --text heldout.txt

structprune eval ./llada ./llada-0.5 --tasks piqa:valid.jsonl --limit 200 --adaptive

structprune eval GSAI-ML/LLaDA-8B-Base ./llada-0.5 --tasks piqa,arc_challenge,winogrande (needs structprune\\[eval])

structprune eval ./llada-0.3 --text heldout.txt --out later --against structprune-eval

[bold]Tasks[/bold]

piqa:FILE and gsm8k:FILE\\[:TRAIN] are read from disk; others are lm-eval's. mmlu, arc_challenge, arc_easy, piqa,

winogrande, gsm8k, hellaswag, gpqa_main_n_shot and race have their published settings.

A copy of one of configs/eval/*.yaml, changed, can be named instead.

[bold]Keys worth knowing[/bold] (all of them, with defaults: structprune/evaluation/settings.py)

evaluation.windows, length, noise: of the text; evaluation.samples, cfg_scale, sampling: of answers

evaluation.generation: options of the sampler, such as {gen_length: 256, steps: 128}

model.dtype: float32, bfloat16, float16
"""

Checkpoints = Annotated[
    list[str], typer.Argument(help="Checkpoint directories or Hub ids; the first is compared with.")
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text", help="Text to measure the NELBO of: .txt, .jsonl, .parquet, wikitext2, c4, or a Hub dataset."
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="LIST", help="piqa:FILE, gsm8k:FILE, or tasks of lm-eval; commas between."),
]
Limit = Annotated[int | None, typer.Option("--limit", help="The most documents of a task.")]
Adaptive = Annotated[bool, typer.Option("--adaptive", help="Stop sampling a question once its choice is decided.")]
Chat = Annotated[bool, typer.Option("--chat", help="Prompts go through the chat template (Instruct checkpoints).")]
Against = Annotated[
    Path | None, typer.Option("--against", metavar="DIR", help="Also compare with the results of an earlier run.")
]
Forget = Annotated[
    bool,
    typer.Option("--overwrite", help="Remove earlier results in --out (those of the same run only if it is finished)."),
]
Results = Annotated[Path, typer.Option("--out", help="Directory of the results.")]


def evaluate(
    checkpoints: Checkpoints,
    text: Text = None,
    tasks: Tasks = None,
    limit: Limit = None,
    adaptive: Adaptive = False,
    chat: Chat = False,
    config: ConfigFile = None,
    sets: Sets = None,
    out: Results = Path("structprune-eval"),
    against: Against = None,
    device: Device = None,
    mask_id: MaskId = None,
    allow_pickle: Pickle = False,
    overwrite: Forget = False,
    debug: Debug = False,
) -> None:
    """Options with a name of their own override --set and --config."""
    from structprune.cli.show import evaluate_and_show
    from structprune.evaluation.settings import EvaluationConfig

    named = {
        "evaluation.source": text,
        "evaluation.tasks": None if tasks is None else _split(tasks),
        "evaluation.limit": limit,
        "evaluation.adaptive": adaptive or None,
        "evaluation.chat": chat or None,
        "model.device": device,
        "model.mask_id": mask_id,
        "model.allow_pickle": allow_pickle or None,
    }
    overrides = EvaluationConfig.parse(sets or []) | {key: value for key, value in named.items() if value is not None}
    evaluate_and_show(checkpoints, EvaluationConfig.load(config, overrides), out, against, overwrite)


def _split(tasks: str) -> list[str]:
    """The names between commas.

    Raises:
        UserError: one is empty.
    """
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise UserError(f"--tasks '{tasks}' has an empty name: write them with single commas between")
    return names
