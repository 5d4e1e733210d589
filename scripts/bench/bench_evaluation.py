"""Scoring of multiple-choice items against the loop that LLaDA's paper describes: wall time, estimates, choices.

    python -m scripts.bench.bench_evaluation --piqa FILE [--model DIR] [--items N] [--out FILE]

FILE is PIQA as .jsonl, with labels in it or beside it. The loop (arXiv 2502.09992, Appendix B.5) takes one answer at
a time, a batch of 8 noisy copies of it, with guidance 16, and predicts every position. Both sides have PIQA's published
settings, 128 samples in blocks of 8 and guidance 0.5, the same model in fp32 and the same items. Items come in rounds;
within a round the sides take turns, and ratios are medians over rounds. Measured beside: how far estimates differ in
standard errors, how often adaptive sampling chooses as the full count of the same noise does, and how often two full
counts of different noise agree. Run it on a machine that does nothing else: about 8 minutes on 2 cores.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from scripts.tools.script_line import OneLineParser, one_line, result_file, write_result
from structprune import load_model
from structprune.assets import model_directory
from structprune.bench.machine import describe_machine
from structprune.cli.console import progress_bars
from structprune.errors import UserError
from structprune.evaluation.choices import Answer, Item, MonteCarlo, Scored, score_items
from structprune.evaluation.local_tasks import read_piqa
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.requests import to_item
from structprune.evaluation.texts import Texts
from structprune.models.encode import Batches
from structprune.models.modeling_structprune import DiffusionLM

OUT = Path(__file__).parents[1] / "results" / "evaluation_speed.json"
LOOP, FULL, ADAPTIVE, OTHER = "published loop", "full", "adaptive", "full, other seed"
WANTED = {FULL: 1.8, ADAPTIVE: 6.0}  # times faster than the loop
WANTED_AGREEMENT = 0.99
COUNTED = 10  # items whose operations are counted


def loop_answer(model: DiffusionLM, answer: Answer, settings: MonteCarlo, generator: torch.Generator) -> list[float]:
    """Means of the blocks of one answer's samples, in nats: the published way, one batch of copies after another."""
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
    """What `score_items` finds, by the published loop and noise of its own."""
    found = []
    for item in items:
        generator = item_generator(settings.seed, f"loop/{item.key}")
        blocks = [torch.tensor(loop_answer(model, answer, settings, generator)) for answer in item.answers]  # (K,) each
        means = tuple(each.mean().item() for each in blocks)
        errors = tuple(each.std().item() / len(each) ** 0.5 for each in blocks)
        found.append(Scored(item.key, means, errors, settings.samples))
    return found


def take_items(options: argparse.Namespace, model: DiffusionLM) -> list[Item]:
    """Items spread evenly over the file, of those that fit the model."""
    texts = Texts.open(options.model, "none")
    items = [to_item(document, texts) for document in read_piqa(options.piqa, None, 0, None, texts).documents]
    longest = model.config.max_sequence_length
    items = [item for item in items if max(len(each.prompt) + len(each.target) for each in item.answers) <= longest]
    if len(items) < options.items:
        raise UserError(f"--items = {options.items}: {options.piqa} has {len(items)} that fit the model")
    return [items[index * len(items) // options.items] for index in range(options.items)]


def measure(model: DiffusionLM, items: list[Item], options: argparse.Namespace) -> tuple[dict, dict]:
    """Seconds of every side per round, and what every side found for every item."""
    base = {"samples": options.samples, "block": options.block, "cfg_scale": options.cfg_scale}
    ways = {FULL: MonteCarlo(**base), ADAPTIVE: MonteCarlo(**base, adaptive=True), OTHER: MonteCarlo(**base, seed=1)}
    sides = {LOOP: lambda part: score_by_loop(model, part, ways[FULL])}
    for name, settings in ways.items():
        batch = Batches.automatic(torch.device("cpu"))
        sides[name] = lambda part, settings=settings, batch=batch: score_items(model, part, settings, batch)
    for score in sides.values():  # once before the clock runs
        score(items[:1])
    seconds, found = {side: [] for side in sides}, {side: [] for side in sides}
    parts = [items[index :: options.rounds] for index in range(options.rounds)]
    with progress_bars() as track:
        for part, side in track([(part, side) for part in parts for side in sides], "scoring"):
            start = time.perf_counter()
            found[side] += sides[side](part)
            seconds[side].append(time.perf_counter() - start)
    return seconds, found


def arithmetic(model: DiffusionLM, items: list[Item], settings: MonteCarlo) -> dict:
    """Operations of the matrix products of both sides for some items: what a machine at its peak would gain."""
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
    """Distribution of differences between two estimates of an answer over their joint standard error."""
    z = []
    for a, b in zip(one, other, strict=True):
        for first, second, *errors in zip(a.log_likelihoods, b.log_likelihoods, a.errors, b.errors):
            spread = sum(error**2 for error in errors) ** 0.5
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
            chosen = [max(range(len(by)), key=lambda i: each.log_likelihoods[i] / by[i]) for each in (a, b)]
            same[name] += chosen[0] == chosen[1]
    return {name: count / len(one) for name, count in same.items()}


def summarise(items: list[Item], seconds: dict, found: dict) -> dict:
    """Ratios round by round and in all, deviations and agreements."""
    faster = {}
    for side in (FULL, ADAPTIVE):
        ratios = [a / b for a, b in zip(seconds[LOOP], seconds[side], strict=True)]
        total = sum(seconds[LOOP]) / sum(seconds[side])
        faster[side] = {"median": median(ratios), "low": min(ratios), "high": max(ratios), "in_all": total}
        faster[side] |= {"wanted": WANTED[side]}
    drawn = [scored.samples for scored in found[ADAPTIVE]]
    return {
        "seconds": seconds,
        "times_faster": faster,
        "adaptive_samples": {"mean": mean(drawn), "median": median(drawn), "full": found[FULL][0].samples},
        "deviations": {FULL: deviations(found[FULL], found[LOOP]), OTHER: deviations(found[FULL], found[OTHER])},
        "standard_errors": {
            side: median(error for scored in found[side] for error in scored.errors) for side in (LOOP, FULL, OTHER)
        },
        "agreement": {
            f"{ADAPTIVE} with {FULL}": agreement(items, found[ADAPTIVE], found[FULL]),
            f"{OTHER} with {FULL}": agreement(items, found[OTHER], found[FULL]),
            f"{LOOP} with {FULL}": agreement(items, found[LOOP], found[FULL]),
        },
    }


def result_table(result: dict, options: argparse.Namespace) -> Table:
    table = Table(title=f"{options.items} items, {options.samples} samples, guidance {options.cfg_scale}")
    for name in ("", "seconds", "faster (range)", "wanted", "same choice as full: raw", "normalised"):
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
    z, drawn = result["deviations"][FULL], result["adaptive_samples"]
    table.caption = (
        f"full minus loop in standard errors: mean {z['mean']:.2f}, deviation {z['deviation']:.2f}, "
        f"{z['within_2']:.3f} within 2; adaptive drew {drawn['mean']:.1f} of {drawn['full']} samples, "
        f"agreement wanted {WANTED_AGREEMENT}; the loop's matrix products are "
        f"{result['arithmetic']['ratio']:.2f} times those of the full count"
    )
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(__doc__)
    parser.add_argument("--piqa", type=Path, required=True, metavar="FILE", help="PIQA, one JSON object a line")
    parser.add_argument("--model", type=Path, default=model_directory(), help="LLaDA (default: the embedded model)")
    for name, value in {"items": 70, "rounds": 5, "samples": 128, "block": 8, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--cfg-scale", type=float, default=0.5, help="default %(default)s")
    parser.add_argument("--out", type=result_file, default=OUT, help="default %(default)s")
    options = parser.parse_args(arguments)
    for name in ("items", "rounds", "threads"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} = {getattr(options, name)}: give at least 1")
    if options.items < options.rounds:
        raise UserError(f"--items = {options.items} are too few for --rounds = {options.rounds}: give one a round")
    if options.samples < 2 * options.block:
        raise UserError(f"--samples = {options.samples}: standard errors need two blocks of {options.block} at least")
    return options


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"bench_evaluation: the machine is busy (load {load:.1f}), so times mean little", file=sys.stderr)
    model = load_model(options.model)
    items = take_items(options, model)
    result = summarise(items, *measure(model, items, options))
    base = MonteCarlo(options.samples, options.block, options.cfg_scale)
    result["arithmetic"] = arithmetic(model, items[:: max(1, len(items) // COUNTED)][:COUNTED], base)
    kept = ("items", "rounds", "samples", "block", "cfg_scale")
    settings = {name: getattr(options, name) for name in kept} | {"dtype": "float32", "load_before": load}
    settings |= {
        "model": options.model.name,
        "tokens": sum(len(a.prompt) + len(a.target) for i in items for a in i.answers),
    }
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(result_table(result, options))
    write_result(options.out, {"machine": describe_machine(), "settings": settings} | result)
    console.print(f"Wrote {options.out}", soft_wrap=True)
    return 0


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_evaluation", lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
