"""Faster decoding against a token a step: passes, time in turns with it, equal tokens, and what the text costs.

Openings of held-out text are continued greedily by every form, one after another within a round, so that the ratio of a
round compares forms at the same moment. What the model itself thinks of the text it wrote, NELBO given the opening,
says whether other tokens are worse ones.

    python -m scripts.bench.bench_decoding [--checkpoint DIR --text FILE] [--out scripts/results/decoding.json]
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from scripts.tools.script_line import OneLineParser, check_counts, one_line, result_file, show_result, write_result
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.calibration.noise import stratified_noise
from structprune.calibration.windows import cut_windows
from structprune.errors import UserError
from structprune.evaluation.nelbo import maskable_tokens, masked_nelbo
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import sampler_options
from structprune.generation.settings import GenerationSettings, sampler_settings
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import pick_device, synchronise
from structprune.models.tokenizer import encode, load_tokenizer

PLAIN = "a token a step"
FORMS: dict[str, dict] = {
    PLAIN: {},
    "two tokens a step": {"half": True},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.5": {"threshold": 0.5},
    "threshold 0.2": {"threshold": 0.2},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "dual cache, threshold 0.9": {"cache": "dual", "threshold": 0.9},
}
COUNTS = {"openings": 8, "opening": 32, "tokens": 64, "block-length": 16, "rounds": 3}
SAMPLES = 4  # noisy copies that a text is judged on


@dataclass(frozen=True)
class Sizes:
    """Openings, tokens of each, tokens after each, tokens of a block, and timed rounds."""

    openings: int
    opening: int
    tokens: int
    block_length: int
    rounds: int


def has_blocks(model: DiffusionLM) -> bool:
    """Whether the model's sampler finishes blocks one after the other."""
    return "block_length" in sampler_options(model.config)


def read_openings(model: DiffusionLM, path: Path, sizes: Sizes) -> torch.Tensor:
    """(n, P) first tokens of windows of a text.

    Raises:
        UserError: too short a text.
    """
    tokens = torch.tensor(encode(load_tokenizer(model.source.directory), path.read_text(encoding="utf-8")))  # (M,)
    if len(tokens) < (need := sizes.openings * sizes.opening):
        raise UserError(f"the text '{path}' has {len(tokens)} tokens, and {need} are needed: lower --openings")
    return cut_windows(tokens, sizes.openings, sizes.opening, torch.Generator().manual_seed(0))  # (n, P)


def write(model: DiffusionLM, openings: torch.Tensor, form: dict, sizes: Sizes) -> tuple[torch.Tensor, int, float]:
    """Openings with what a form writes after them, (n, P + G), forward passes, and seconds; one opening at a time, as
    a user waits for it."""
    keys = {"gen_length": sizes.tokens} | ({"block_length": sizes.block_length} if has_blocks(model) else {})
    keys |= {key: value for key, value in form.items() if key != "half"}
    keys |= {"steps": sizes.tokens // 2} if form.get("half") else {}
    run = GenerationSettings(**keys)
    passes: list = []
    options = Options(batch=1, record=passes.append, cache=run.cache)
    synchronise(model.device)
    start = time.perf_counter()
    outputs = torch.stack(list(generate(model, list(openings), sampler_settings(model.config, run), options=options)))
    return outputs, len(passes), time.perf_counter() - start  # outputs are on the CPU: the device is done


@torch.no_grad()
def cost_of(model: DiffusionLM, ids: torch.Tensor, opening: int) -> float:
    """NELBO of generated tokens under the model that wrote them, given the openings, nats per token: (n, P + G)."""
    generator = torch.Generator().manual_seed(0)
    noisy, p = stratified_noise(ids, model.config.mask_token_id, generator, SAMPLES, model.edges_visible)  # (n, S, T)
    noisy[..., :opening] = ids[:, None, :opening]
    share = maskable_tokens(model, ids.shape[1]) / (ids.shape[1] - opening - model.edges_visible)
    return float(masked_nelbo(model, ids, noisy, p, 8).nelbo.mean()) * share


def measure(model: DiffusionLM, openings: torch.Tensor, sizes: Sizes) -> list[dict]:
    """A row for every form; times are medians over rounds, as ratios too."""
    forms = {name: form for name, form in FORMS.items() if has_blocks(model) or form.get("cache") != "dual"}
    texts, passes = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():  # untimed
        write(model, openings[:1], form, sizes)
    for _ in range(sizes.rounds):
        for name, form in forms.items():
            texts[name], passes[name], spent = write(model, openings, form, sizes)
            seconds[name].append(spent)
    plain = texts[PLAIN][:, sizes.opening :]  # (n, G)
    total = plain.numel()
    return [
        {
            "form": name,
            "passes_per_token": passes[name] / total,
            "tokens_per_second": total / median(seconds[name]),
            "speedup": median(one / own for one, own in zip(seconds[PLAIN], seconds[name], strict=True)),
            "equal": (texts[name][:, sizes.opening :] == plain).double().mean().item(),
            "nelbo": cost_of(model, texts[name], sizes.opening),
        }
        for name in forms
    ]


def table_of(rows: list[dict]) -> Table:
    """A line for every form."""
    table = Table(title=f"Against {PLAIN}, in turns with it")
    for title in ("form", "passes a token", "tokens/s", "speed-up", "equal tokens", "NELBO of the text"):
        table.add_column(title, justify="left" if title == "form" else "right")
    for row in rows:
        cells = (f"{row['passes_per_token']:.2f}", f"{row['tokens_per_second']:.0f}", f"{row['speedup']:.2f}x")
        table.add_row(row["form"], *cells, f"{100 * row['equal']:.1f} %", f"{row['nelbo']:.2f}")
    return table


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=model_directory(), help="default: the embedded model")
    parser.add_argument("--name", default="embedded model", help="of the checkpoint in tables (default %(default)s)")
    parser.add_argument("--text", type=Path, default=text_file("heldout.txt"), help="whose windows are opened")
    parser.add_counts(COUNTS)
    parser.add_device()
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/decoding.json"))
    given = parser.parse_args(arguments)
    check_counts(given, COUNTS)
    if given.tokens < 2:
        raise UserError(f"--tokens {given.tokens} are too few for two a step: give at least 2")
    if not given.text.is_file():
        raise UserError(f"--text: no text at '{given.text}': name a file")
    sizes = Sizes(given.openings, given.opening, given.tokens, given.block_length, given.rounds)
    model = load_model(given.checkpoint, device=pick_device(given.device))
    rows = measure(model, read_openings(model, given.text, sizes), sizes)
    facts = {"name": given.name, "text": given.text.name, "sizes": vars(sizes), "machine": describe_machine()}
    write_result(given.out, facts | {"rows": rows})
    show_result(table_of(rows), out=given.out, width=110)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_decoding", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
