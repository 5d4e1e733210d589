"""The referee of bench_masking.py: what a method must remove, in fp64, straight from its formulas.

Two right implementations differ: a near tie falls either way by rounding, and in SparseGPT a single one changes every
later weight and block. So each side is judged by itself. What it removed before is taken as given, and what it removes
next is compared with what exact scores say. Nothing here is shared with either side but the checkpoint and the ids.

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
DAMPING, COLUMNS = 0.01, 128  # relative to the mean diagonal of the Gram matrix; columns that choose together


class Referee:
    """The dense model in fp64 on the benchmark's inputs; `judge` compares a side's weights with what is right.

    Args:
        folder: with the benchmark's `checkpoint` and `data.safetensors`.
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
        # the angles in fp32, because that rounding belongs to the model: its weights were trained with it
        frequencies = 1.0 / config["rope_theta"] ** (torch.arange(0, size, 2).float() / size)  # (D/2,)
        angles = torch.arange(self._ids.shape[1]).float()[:, None] * frequencies  # (T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, D)
        self._cos, self._sin = angles.cos().double(), angles.sin().double()
        self._noise: tuple | None = None

    def judge(self, method: str, pruned: dict[str, torch.Tensor]) -> dict:
        """How far a side is from right, `pruned`: its linears, `{block}.{name}` -> (O, C).

        Returns:
            misplaced: share of the weights that are removed but must stay, or the other way round.
            widest_gap: the largest relative distance of a misplaced weight's score from the threshold.
            weights_differ: distance of the kept weights from what they must be, over the length of the whole change.
        """
        with torch.inference_mode():
            if method == "sink-wanda":
                tally = Tally()
                for (index, name), norm in self._noise_pass()[1].items():
                    side = {linear: pruned[f"{index}.{linear}"].double() for linear in READERS[name]}
                    self._judge_rows(self._blocks[index], side, name, norm, tally)
                return tally.found()
            weights = self._noise_pass()[0].mean(1) if method == "sink-sparsegpt" else None  # (N, T)
            return self._judge_walk(method, weights, pruned)

    def _run(self, part: dict, x: torch.Tensor) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """A block on (T, C): what its linears read, the attention every position receives (T,), its output."""
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
        one, other = x.chunk(2, dim=-1)  # (H, T, D/2) each
        return x * self._cos + torch.cat((-other, one), dim=-1) * self._sin

    def _noise_pass(self) -> tuple[torch.Tensor, dict]:
        """Row weights ω (N, S, T) of the noisy copies, and Σ over copies of the norms of what they weight."""
        if self._noise is None:
            found, norms = torch.zeros(self._noisy.shape, dtype=torch.float64), {}
            for copy, weight in zip(self._noisy.flatten(0, 1), found.flatten(0, 1)):  # (T,) each
                x, mass, seen = self._embedding[copy], 0.0, {}
                for index, part in enumerate(self._blocks):
                    inputs, more, x = self._run(part, x)
                    mass = mass + more  # (T,)
                    seen |= {(index, name): value for name, value in inputs.items()}
                threshold = mass.mean() + KAPPA * mass.std(correction=0)
                weight.copy_(1 - torch.sigmoid(ALPHA * (mass - threshold)))  # (T,)
                for key, value in seen.items():
                    norms[key] = norms.get(key, 0.0) + (value * weight[:, None]).norm(dim=0)  # (C,)
            self._noise = found, norms
        return self._noise

    def _judge_walk(self, method: str, weights: torch.Tensor | None, pruned: dict[str, torch.Tensor]) -> dict:
        """Some blocks, each on what the side's own blocks before it hand on; `weights`: ω (N, T)."""
        tally, states, last = Tally(), self._embedding[self._ids], len(self._blocks) - 1  # (N, T, C)
        for index, part in enumerate(self._blocks):
            judged = index in (0, 1, last // 2, last)  # not all, to save minutes
            grams = {}
            for row, x in enumerate(states if judged else ()):  # (T, C)
                for name, value in self._run(part, x)[0].items():
                    value = value if weights is None else value * weights[row, :, None]  # (T, C)
                    grams[name] = grams.get(name, 0.0) + value.T @ value  # (C, C)
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
        return tally.found()

    def _judge_rows(self, dense: dict, side: dict, name: str, norm: torch.Tensor, tally: "Tally") -> None:
        """Wanda: of every row the lowest |W| · norm go, and what stays is as it was; norm (C,) of an input."""
        for linear in READERS[name]:
            score = dense[linear].abs() * norm  # (O, C)
            threshold = score.sort(1).values[:, int(score.shape[1] * self.ratio) - 1, None]  # (O, 1)
            removed = side[linear] == 0
            tally.count(score, threshold, removed)
            tally.compare(side[linear], torch.where(removed, 0.0, dense[linear]), dense[linear])


def replay(dense: torch.Tensor, upper: torch.Tensor, removed: torch.Tensor, ratio: float, tally: "Tally"):
    """The weights (O, C) that SparseGPT leaves where it removes `removed`; its scores are counted block by block."""
    left, diagonal = dense.T.clone(), upper.diagonal()  # (C, O), (C,)
    for start in range(0, len(left), COLUMNS):
        stop = min(start + COLUMNS, len(left))
        score = (left[start:stop] / diagonal[start:stop, None]).square()  # (b, O)
        tally.count(score, score.flatten().sort().values[int(score.numel() * ratio)], removed.T[start:stop])
        errors = torch.zeros_like(score)  # (b, O)
        for column in range(start, stop):
            errors[column - start] = left[column] * removed[:, column] / diagonal[column]  # (O,)
            left[column:stop].addr_(upper[column, column:stop], errors[column - start], alpha=-1)  # (., O)
        left[stop:] -= upper[start:stop, stop:].T @ errors  # (C - stop, O)
    return torch.where(removed, 0.0, left.T)


class Tally:
    """Sums of `Referee.judge` over linears."""

    def __init__(self):
        self._weights = self._misplaced = 0
        self._gap = self._apart = self._moved = 0.0

    def count(self, score: torch.Tensor, threshold: torch.Tensor, removed: torch.Tensor) -> None:
        """Scores up to the threshold must be removed, and no others."""
        wrong = (score <= threshold) != removed
        self._weights, self._misplaced = self._weights + wrong.numel(), self._misplaced + int(wrong.sum())
        gaps = (score / threshold - 1).abs()[wrong]
        self._gap = max([self._gap, *gaps.tolist()])

    def compare(self, side: torch.Tensor, right: torch.Tensor, dense: torch.Tensor) -> None:
        self._apart += float((side - right).square().sum())
        self._moved += float((dense - right).square().sum())

    def found(self) -> dict:
        differ = math.sqrt(self._apart / self._moved)
        return {"misplaced": self._misplaced / self._weights, "widest_gap": self._gap, "weights_differ": differ}
