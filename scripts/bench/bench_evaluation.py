"""Scoring of multiple-choice items, compared with the loop of LLaDA's paper: wall time, estimates, choices.

    python -m scripts.bench.bench_evaluation --piqa FILE [--model DIR] [--items N] [--out FILE]

FILE is PIQA as .jsonl, with labels in it or beside it. The loop (arXiv 2502.09992, Appendix B.5) takes one answer at
a time, in batches of 8 noisy copies (16 with guidance), and predicts every position. Both sides use PIQA's published
settings (128 samples in blocks of 8, guidance 0.5), the same model in fp32 and the same items. Items come in rounds;
within a round the sides take turns, and ratios are medians over rounds. Also measured: the differences of estimates in
standard errors, how often adaptive sampling makes the same choice as all samples of the same noise, and how often two
full counts with different noise agree. Run it on an idle machine; it takes about 8 minutes on 2 cores.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from scripts.tools.script_line import (
    OneLineParser,
    check_counts,
    one_line,
    result_file,
    show_result,
    warn_if_busy,
    write_result,
)
from structprune import load_model
from structprune.assets import model_directory
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.evaluation.choices import Answer, Item, MonteCarlo, Scored, score_items
from structprune.evaluation.documents import Choices
from structprune.evaluation.local_tasks import read_piqa
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.requests import to_item
from structprune.evaluation.texts import Texts
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM

OUT = Path(__file__).parents[1] / "results" / "evaluation_speed.json"
LOOP, FULL, ADAPTIVE, OTHER = "published loop", "full", "adaptive", "full, other seed"
GOALS = {FULL: 1.8, ADAPTIVE: 6.0}  # times faster than the loop
AGREEMENT_GOAL = 0.99
COUNTED = 10  # items whose operations are counted


def loop_answer(model: DiffusionLM, answer: Answer, settings: MonteCarlo, generator: torch.Generator) -> list[float]:
    """Block means of one answer's samples, in nats, as published: one batch of copies after another."""
    mask_id, block = model.config.mask_token_id, settings.block
    prompt, length = len(answer.prompt), len(answer.target)
    sequence = torch.cat((answer.prompt, answer.target)).repeat(block, 1)  # (b, T)
    values = []
    for _ in range(settings.blocks):
        first = torch.randint(1, length + 1, (), generator=generator).item()
        counts = torch.linspace(first, first + (block - 1) * (length / block), block).round().long()  # (b,)
        counts = (counts - 1) % length + 1  # (b,)
        masked = torch.zeros_like(sequence, dtype=torch.bool)  # (b, T)
        for row, count in enumerate(counts.tolist()):
            masked[row, prompt + torch.randperm(length, generator=generator)[:count]] = True
        noisy = sequence.masked_fill(masked, mask_id)  # (b, T)
        if settings.cfg_scale:
            bare = noisy.clone()  # (b, T)
            bare[:, :prompt] = mask_id
            conditional, without = model(torch.cat((noisy, bare))).logits.chunk(2)  # 2 x (b, T, V)
            logits = without + (1 + settings.cfg_scale) * (conditional - without)  # (b, T, V)
        else:
            logits = model(noisy).logits  # (b, T, V)
        share = (counts / length)[:, None].expand_as(masked)  # (b, T)
        loss = F.cross_entropy(logits[masked], sequence[masked], reduction="none") / share[masked]  # (M,)
        values.append(-loss.sum().item() / block)
    return values


@torch.inference_mode()
def score_by_loop(model: DiffusionLM, items: list[Item], settings: MonteCarlo) -> list[Scored]:
    """As `score_items`, with the published loop and noise of its own."""
    results = []
    for item in items:
        generator = item_generator(settings.seed, f"loop/{item.key}")
        blocks = [torch.tensor(loop_answer(model, answer, settings, generator)) for answer in item.answers]  # (K,) each
        means = tuple(each.mean().item() for each in blocks)
        errors = tuple(each.std().item() / len(each) ** 0.5 for each in blocks)
        results.append(Scored(item.key, means, errors, settings.samples))
    return results


def take_items(options: argparse.Namespace, model: DiffusionLM) -> list[Item]:
    """Items evenly spaced over those of the file that fit the model."""
    texts = Texts.open(options.model, "none")
    documents = read_piqa(options.piqa, None, 0, None, texts).documents
    items = [to_item(document, texts) for document in documents if isinstance(document, Choices)]
    longest = model.config.max_sequence_length
    items = [item for item in items if max(len(each.prompt) + len(each.target) for each in item.answers) <= longest]
    if len(items) < options.items:
        raise UserError(f"--items = {options.items}: {options.piqa} has {len(items)} that fit the model")
    return [items[index * len(items) // options.items] for index in range(options.items)]


def measure(model: DiffusionLM, items: list[Item], options: argparse.Namespace) -> tuple[dict, dict]:
    """Seconds of every side per round, and the scores of every side for every item."""
    base = {"samples": options.samples, "block": options.block, "cfg_scale": options.cfg_scale}
    ways = {FULL: MonteCarlo(**base), ADAPTIVE: MonteCarlo(**base, adaptive=True), OTHER: MonteCarlo(**base, seed=1)}
    sides: dict[str, Callable[[list[Item]], list[Scored]]] = {LOOP: partial(score_by_loop, model, settings=ways[FULL])}
    for name, settings in ways.items():
        batch = Batches.automatic(torch.device("cpu"))
        sides[name] = partial(score_items, model, settings=settings, batch=batch)
    for score in sides.values():  # untimed warm-up
        score(items[:1])
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    scores: dict[str, list[Scored]] = {side: [] for side in sides}
    parts = [items[index :: options.rounds] for index in range(options.rounds)]
    with progress_bars() as track:
        for part, side in track([(part, side) for part in parts for side in sides], "scoring"):
            start = time.perf_counter()
            scores[side] += sides[side](part)
            seconds[side].append(time.perf_counter() - start)
    return seconds, scores


def arithmetic(model: DiffusionLM, items: list[Item], settings: MonteCarlo) -> dict:
    """Operations in matrix products of both sides for some items: the gain on a machine at its peak."""
    counts = {}
    batch = Batches.automatic(torch.device("cpu"))
    for side, score in (
        (LOOP, lambda: score_by_loop(model, items, settings)),
        (FULL, lambda: score_items(model, items, settings, batch)),
    ):
        with FlopCounterMode(display=False) as counter:
            score()
        counts[side] = counter.get_total_flops()
    return {"items": len(items), "operations": counts, "ratio": counts[LOOP] / counts[FULL]}


def deviations(one: list[Scored], other: list[Scored]) -> dict:
    """Distribution of the difference between two estimates of an answer over their joint standard error."""
    z: list[float] = []
    for a, b in zip(one, other, strict=True):
        for first, second, *errors in zip(a.log_likelihoods, b.log_likelihoods, a.errors, b.errors, strict=True):
            spread = sum(error**2 for error in errors if error is not None) ** 0.5
            z += [(first - second) / spread] if spread else []
    values = torch.tensor(z, dtype=torch.float64)
    within = {f"within_{limit}": (values.abs() <= limit).double().mean().item() for limit in (1, 2, 3)}
    quantiles = torch.quantile(values, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)).tolist()
    return {"answers": len(z), "mean": mean(z), "deviation": values.std().item(), "quantiles": quantiles} | within


def agreement(items: list[Item], one: list[Scored], other: list[Scored]) -> dict:
    """Share of items with the same choice, by sum and by sum over size."""
    sizes = {item.key: [answer.size for answer in item.answers] for item in items}
    same = {"raw": 0, "normalised": 0}
    for a, b in zip(one, other, strict=True):
        for name, by in (("raw", [1] * len(sizes[a.key])), ("normalised", sizes[a.key])):
            same[name] += _choice(a, by) == _choice(b, by)
    return {name: count / len(one) for name, count in same.items()}


def _choice(scored: Scored, by: list) -> int:
    """The answer with the largest log-likelihood over its size."""
    return max(range(len(by)), key=lambda answer: scored.log_likelihoods[answer] / by[answer])


def summarise(items: list[Item], seconds: dict, scores: dict) -> dict:
    """Ratios by round and in total, deviations and agreements."""
    faster = {}
    for side in (FULL, ADAPTIVE):
        ratios = [a / b for a, b in zip(seconds[LOOP], seconds[side], strict=True)]
        total = sum(seconds[LOOP]) / sum(seconds[side])
        faster[side] = {"median": median(ratios), "low": min(ratios), "high": max(ratios), "in_all": total}
        faster[side] |= {"wanted": GOALS[side]}
    samples = [scored.samples for scored in scores[ADAPTIVE]]
    return {
        "seconds": seconds,
        "times_faster": faster,
        "adaptive_samples": {"mean": mean(samples), "median": median(samples), "full": scores[FULL][0].samples},
        "deviations": {FULL: deviations(scores[FULL], scores[LOOP]), OTHER: deviations(scores[FULL], scores[OTHER])},
        "standard_errors": {
            side: median(error for scored in scores[side] for error in scored.errors) for side in (LOOP, FULL, OTHER)
        },
        "agreement": {
            f"{ADAPTIVE} with {FULL}": agreement(items, scores[ADAPTIVE], scores[FULL]),
            f"{OTHER} with {FULL}": agreement(items, scores[OTHER], scores[FULL]),
            f"{LOOP} with {FULL}": agreement(items, scores[LOOP], scores[FULL]),
        },
    }


def result_table(result: dict, options: argparse.Namespace) -> Table:
    table = Table(title=f"{options.items} items, {options.samples} samples, guidance {options.cfg_scale}")
    for name in ("", "seconds", "faster (range)", "goal", "same choice as full: raw", "normalised"):
        table.add_column(name, justify="right")
    for side, seconds in result["seconds"].items():
        faster, same = result["times_faster"].get(side), result["agreement"].get(f"{side} with {FULL}")
        table.add_row(
            side,
            f"{sum(seconds):.1f}",
            f"{faster['median']:.2f} x ({faster['low']:.2f} to {faster['high']:.2f})" if faster else "",
            f"{faster['wanted']} x" if faster else "",
            *([f"{same[name]:.3f}" for name in ("raw", "normalised")] if same else ["", ""]),
        )
    z, samples = result["deviations"][FULL], result["adaptive_samples"]
    table.caption = (
        f"full minus loop in standard errors: mean {z['mean']:.2f}, deviation {z['deviation']:.2f}, "
        f"{z['within_2']:.3f} within 2; adaptive drew {samples['mean']:.1f} of {samples['full']} samples, "
        f"goal for its agreement {AGREEMENT_GOAL}; the loop's matrix products have "
        f"{result['arithmetic']['ratio']:.2f} times the operations of the full count"
    )
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--piqa", type=Path, required=True, metavar="FILE", help="PIQA, one JSON object a line")
    parser.add_argument("--model", type=Path, default=model_directory(), help="LLaDA (default: the embedded model)")
    parser.add_counts({"items": 70, "rounds": 5, "samples": 128, "block": 8, "threads": 2})
    parser.add_argument("--cfg-scale", type=float, default=0.5, help="default %(default)s")
    parser.add_argument("--out", type=result_file, default=OUT, help="default %(default)s")
    options = parser.parse_args(arguments)
    check_counts(options, ("items", "rounds", "threads"))
    if options.items < options.rounds:
        raise UserError(
            f"--items = {options.items} are too few for --rounds = {options.rounds}: give at least one per round"
        )
    if options.samples < 2 * options.block:
        raise UserError(f"--samples = {options.samples}: standard errors need at least two blocks of {options.block}")
    return options


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    load = warn_if_busy("bench_evaluation")
    model = load_model(options.model)
    items = take_items(options, model)
    result = summarise(items, *measure(model, items, options))
    base = MonteCarlo(options.samples, options.block, options.cfg_scale)
    result["arithmetic"] = arithmetic(model, items[:: max(1, len(items) // COUNTED)][:COUNTED], base)
    names = ("items", "rounds", "samples", "block", "cfg_scale")
    settings = {name: getattr(options, name) for name in names} | {"dtype": "float32", "load_before": load}
    settings |= {
        "model": options.model.name,
        "tokens": sum(len(a.prompt) + len(a.target) for i in items for a in i.answers),
    }
    write_result(options.out, {"machine": describe_machine(), "settings": settings} | result)
    show_result(result_table(result, options), out=options.out, width=160)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_evaluation", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
