"""The referee of bench_masking.py: what a method must remove, computed in fp64 directly from its formulas.

Two correct implementations differ: rounding decides near ties, and in SparseGPT a single one changes every later weight
and block. So each side is judged by itself: given what it removed before, what it removes next is compared with exact
scores. Only the checkpoint and the ids are shared with the two sides.

Shapes: N windows, S levels, T positions, H heads, D head dim, C inputs, O outputs. Formulas: arXiv 2602.17664 (sinks),
2306.11695 (Wanda), 2301.00774 (SparseGPT), with the constants of the release.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

READERS = {"read": ("q_proj", "k_proj", "v_proj"), "mixed": ("attn_out",), "mlp": ("ff_proj", "up_proj")}
READERS["activated"] = ("ff_out",)
ALPHA, KAPPA = 5.0, 2.0  # of the soft sink mask
DAMPING, COLUMNS = 0.01, 128  # relative to the mean diagonal of the Gram matrix; columns whose mask is chosen at once


class Referee:
    """The dense model in fp64 on the benchmark's inputs; `judge` compares a side's weights with the exact ones.

    Args:
        folder: has the benchmark's `checkpoint` and `data.safetensors`.
        ratio: share of every linear's weights to remove.
    """

    def __init__(self, folder: Path, ratio: float):
        config = json.loads((folder / "checkpoint" / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "checkpoint" / "model.safetensors")
        data = load_file(folder / "data.safetensors")
        self.ratio, self._heads, self._eps = ratio, config["n_heads"], config["rms_norm_eps"]
        self._ids, self._noisy = data["ids"], data["noisy"]  # (N, T), (N, S, T)
        start = "model.transformer"
        self._embedding = weights[f"{start}.wte.weight"].double()  # (V, C)
        self._blocks: list[dict] = [{} for _ in range(config["n_layers"])]
        for name, value in weights.items():
            if name.startswith(f"{start}.blocks."):
                index, part = name.removeprefix(f"{start}.blocks.").removesuffix(".weight").split(".")
                self._blocks[int(index)][part] = value.double()
        size = config["d_model"] // config["n_heads"]
        # angles in fp32, because that rounding is part of the model, whose weights were trained with it
        frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, size, 2).float() / size)  # (D/2,)
        angles = torch.arange(self._ids.shape[1]).float()[:, None] * frequencies  # (T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, D)
        self._cos, self._sin = angles.cos().double(), angles.sin().double()
        self._noise: tuple[torch.Tensor, dict] | None = None

    def judge(self, method: str, pruned: dict[str, torch.Tensor]) -> dict:
        """The errors of a side.

        Args:
            pruned: its linears, `{block}.{name}` -> (O, C).
        Returns:
            misplaced: share of weights that are removed but must stay, or stay but must be removed.
            widest_gap: largest relative distance of a misplaced weight's score from the threshold.
            weights_differ: distance of the remaining weights from the exact ones, relative to the whole change.
        """
        with torch.inference_mode():
            if method == "sink-wanda":
                tally = Tally()
                for (index, name), norm in self._noise_pass()[1].items():
                    side = {linear: pruned[f"{index}.{linear}"].double() for linear in READERS[name]}
                    self._judge_rows(self._blocks[index], side, name, norm, tally)
                return tally.figures()
            weights = self._noise_pass()[0].mean(1) if method == "sink-sparsegpt" else None  # (N, T)
            return self._judge_walk(method, weights, pruned)

    def _run(self, part: dict, x: torch.Tensor) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """A block on (T, C): the inputs of its linears, the attention every position receives (T,), and its output."""
        read = self._normed(x, part["attn_norm"])  # (T, C)
        query, key, value = ((read @ part[name].T).unflatten(1, (self._heads, -1)) for name in READERS["read"])
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))  # (H, T, D)
        scores = self._turned(query) @ self._turned(key).transpose(1, 2) / math.sqrt(query.shape[-1])  # (H, T, T)
        attention = scores.softmax(-1)  # (H, T, T)
        mixed = (attention @ value).transpose(0, 1).flatten(1)  # (T, H*D)
        middle = x + mixed @ part["attn_out"].T  # (T, C)
        mlp = self._normed(middle, part["ff_norm"])  # (T, C)
        activated = torch.nn.functional.silu(mlp @ part["ff_proj"].T) * (mlp @ part["up_proj"].T)  # (T, M)
        inputs = {"read": read, "mixed": mixed, "mlp": mlp, "activated": activated}
        return inputs, attention.sum((0, 1)), middle + activated @ part["ff_out"].T

    def _normed(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return gain * x * (x.square().mean(-1, keepdim=True) + self._eps).rsqrt()

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE."""
        one, other = x.chunk(2, dim=-1)  # (H, T, D/2) each
        return x * self._cos + torch.cat((-other, one), dim=-1) * self._sin

    def _noise_pass(self) -> tuple[torch.Tensor, dict]:
        """Row weights ω (N, S, T) of the noisy copies, and Σ over copies of the norms of the weighted inputs (C,)."""
        if self._noise is None:
            weights = torch.zeros(self._noisy.shape, dtype=torch.float64)  # (N, S, T)
            norms: dict[tuple[int, str], torch.Tensor] = {}
            for copy, weight in zip(self._noisy.flatten(0, 1), weights.flatten(0, 1), strict=True):  # (T,) each
                x, mass = self._embedding[copy], torch.zeros(len(copy), dtype=torch.float64)  # (T, C), (T,)
                rows: dict[tuple[int, str], torch.Tensor] = {}
                for index, part in enumerate(self._blocks):
                    inputs, more, x = self._run(part, x)
                    mass = mass + more  # (T,)
                    rows |= {(index, name): value for name, value in inputs.items()}
                threshold = mass.mean() + KAPPA * mass.std(correction=0)
                weight.copy_(1 - torch.sigmoid(ALPHA * (mass - threshold)))  # (T,)
                for key, value in rows.items():
                    norms[key] = norms.get(key, 0) + (value * weight[:, None]).norm(dim=0)  # (C,)
            self._noise = weights, norms
        return self._noise

    def _judge_walk(self, method: str, weights: torch.Tensor | None, pruned: dict[str, torch.Tensor]) -> dict:
        """Judge some blocks, each on the outputs of the side's own earlier blocks.

        Args:
            weights: ω (N, T) of the rows; None for 1.
        """
        tally, states, last = Tally(), self._embedding[self._ids], len(self._blocks) - 1  # (N, T, C)
        for index, part in enumerate(self._blocks):
            judged = index in (0, 1, last // 2, last)  # not all, to save minutes
            grams: dict[str, torch.Tensor] = {}
            for row, x in enumerate(states if judged else ()):  # (T, C)
                for name, value in self._run(part, x)[0].items():
                    value = value if weights is None else value * weights[row, :, None]  # (T, C)
                    grams[name] = grams.get(name, 0) + value.T @ value  # (C, C)
            after = part | {name: pruned[f"{index}.{name}"].double() for names in READERS.values() for name in names}
            for name, gram in grams.items():
                if method == "wanda":
                    self._judge_rows(part, after, name, gram.diagonal().sqrt(), tally)
                    continue
                gram.diagonal().add_(DAMPING * gram.diagonal().mean())
                upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)  # (C, C) U: inverse = UᵀU
                for linear in READERS[name]:
                    right = replay(part[linear], upper, after[linear] == 0, self.ratio, tally)  # (O, C)
                    tally.compare(after[linear], right, part[linear])
            states = torch.stack([self._run(after, x)[2] for x in states])  # (N, T, C)
        return tally.figures()

    def _judge_rows(self, dense: dict, side: dict, name: str, norm: torch.Tensor, tally: "Tally") -> None:
        """Wanda: the lowest |W| · norm of every row are removed, and other weights do not change; norm (C,)."""
        for linear in READERS[name]:
            score = dense[linear].abs() * norm  # (O, C)
            threshold = score.sort(1).values[:, int(score.shape[1] * self.ratio) - 1, None]  # (O, 1)
            removed = side[linear] == 0
            tally.count(score, threshold, removed)
            tally.compare(side[linear], torch.where(removed, 0.0, dense[linear]), dense[linear])


def replay(dense: torch.Tensor, upper: torch.Tensor, removed: torch.Tensor, ratio: float, tally: "Tally"):
    """The weights (O, C) after SparseGPT has removed the weights `removed`; scores are counted block by block."""
    weight, diagonal = dense.T.clone(), upper.diagonal()  # (C, O), (C,)
    for start in range(0, len(weight), COLUMNS):
        stop = min(start + COLUMNS, len(weight))
        score = (weight[start:stop] / diagonal[start:stop, None]).square()  # (b, O)
        tally.count(score, score.flatten().sort().values[int(score.numel() * ratio)], removed.T[start:stop])
        errors = torch.zeros_like(score)  # (b, O)
        for column in range(start, stop):
            errors[column - start] = weight[column] * removed[:, column] / diagonal[column]  # (O,)
            weight[column:stop].addr_(upper[column, column:stop], errors[column - start], alpha=-1)  # (., O)
        weight[stop:] -= upper[start:stop, stop:].T @ errors  # (C - stop, O)
    return torch.where(removed, 0.0, weight.T)


class Tally:
    """Sums of `Referee.judge` over linears."""

    def __init__(self):
        self._weights = self._misplaced = 0
        self._gap = self._error = self._change = 0.0  # the last two: squared lengths

    def count(self, score: torch.Tensor, threshold: torch.Tensor, removed: torch.Tensor) -> None:
        """Count weights: those with scores up to the threshold must be removed, and no others."""
        wrong = (score <= threshold) != removed
        self._weights, self._misplaced = self._weights + wrong.numel(), self._misplaced + int(wrong.sum())
        gaps = (score / threshold - 1).abs()[wrong]
        self._gap = max([self._gap, *gaps.tolist()])

    def compare(self, side: torch.Tensor, right: torch.Tensor, dense: torch.Tensor) -> None:
        """Compare a side's weights with the exact ones."""
        self._error += float((side - right).square().sum())
        self._change += float((dense - right).square().sum())

    def figures(self) -> dict:
        error = math.sqrt(self._error / self._change)
        return {"misplaced": self._misplaced / self._weights, "widest_gap": self._gap, "weights_differ": error}
