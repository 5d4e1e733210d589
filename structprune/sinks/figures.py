"""A trajectory as plain data (lists, numbers, text) for JSON, tables and plots. NaN becomes None."""

import json
import math

import torch

from structprune.config import SinkSettings
from structprune.sinks import diagnostics
from structprune.sinks.tokens import Vocabulary, by_kind, by_token, first_position
from structprune.sinks.trajectory import Trajectory
from structprune.statistics.policies import SINK, instability, survival
from structprune.statistics.sinks import sink_mask

TOP = 12  # tokens listed by text


def soft_mask(trajectory: Trajectory, sink: SinkSettings) -> torch.Tensor:
    """φ of every step over the positions present at it: (N, S, T), NaN elsewhere."""
    phi = torch.full_like(trajectory.mass, torch.nan)
    for step, present in enumerate(trajectory.present):  # (T,)
        mass = trajectory.mass[:, step, present]  # (N, t)
        phi[:, step, present] = sink_mask(mass, sink.alpha, sink.kappa, sink.scale_free)
    return phi


def trajectory_figures(trajectory: Trajectory, sink: SinkSettings, vocabulary: Vocabulary) -> dict:
    """All figures of a trajectory but those of single positions, with the keys of sinks.json."""
    mass, phi, common = trajectory.mass, soft_mask(trajectory, sink), trajectory.common
    common_phi = phi[:, :, common]  # (N, S, t)
    figures = {
        "kind": trajectory.kind,
        "causal": trajectory.causal,
        "sequences": mass.shape[0],
        "steps": mass.shape[1],
        "positions": mass.shape[2],
        "compared_positions": int(common.sum()),
        "prompt": trajectory.prompt,
        "heads": trajectory.heads,
        "summary": summary(mass[:, :, common], common_phi, trajectory.votes[:, :, common]),
        "by_kind": by_kind(trajectory.ids, mass, phi, vocabulary),
        "by_token": by_token(trajectory.ids, mass, phi, vocabulary, TOP),
        "first_position": first_position(mass, phi),
        "per_step": _per_step(trajectory, phi, common_phi),
        "strength": [rounded(layer) for layer in trajectory.strength],
        "head_sinks": [rounded(layer) for layer in trajectory.sinks],
    }
    if trajectory.prompt and not trajectory.causal:
        fixed = slice(0, trajectory.prompt)
        figures["prompt_only"] = summary(mass[:, :, fixed], phi[:, :, fixed], trajectory.votes[:, :, fixed])
    return figures


def position_figures(trajectory: Trajectory, sink: SinkSettings, vocabulary: Vocabulary) -> dict:
    """Mass, φ and votes of every position at every step; survival, instability and last token of every position."""
    phi = soft_mask(trajectory, sink)
    return {
        "mass": rounded(trajectory.mass),
        "phi": rounded(phi),
        "votes": rounded(trajectory.votes),
        "survival": rounded(survival(phi, trajectory.present)),
        "instability": rounded(instability(phi, trajectory.present)),
        "last_tokens": [
            [vocabulary.text(token) for token in row if token >= 0] for row in trajectory.ids[:, -1].tolist()
        ],
    }


def summary(mass: torch.Tensor, phi: torch.Tensor, votes: torch.Tensor) -> dict[str, dict]:
    """The diagnostics of docs/methods.md section 3, each as mean and standard error over sequences.

    Two of them compare models of different size and texts of different length: `spatial_variation` is the standard
    deviation of the mean mass over its mean, `drift` that of the centroid over the number of positions.

    Args:
        mass, phi, votes: (N, S, T), at positions that all steps have in common.
    """
    sink = phi > SINK  # (N, S, T)
    ever, lifetime = sink.any(1), survival(phi)  # 2 x (N, T)
    spatial, temporal = diagnostics.spatial_variance(mass), diagnostics.temporal_variance(phi)  # 2 x (N,)
    unstable = instability(phi)  # (N, T)
    figures = {
        "spatial_variance": spatial,
        "spatial_variation": spatial.sqrt() / mass.mean((1, 2)),
        "sinks_per_step": sink.float().sum(2).mean(1),
        "mass_of_sinks": (mass * sink).sum((1, 2)) / mass.sum((1, 2)),
        "temporal_variance": temporal,
        "drift": temporal.sqrt() / mass.shape[2],
        "instability": unstable.mean(1),
        "instability_of_sinks": _mean_over(unstable, ever),
        "ever_sinks": ever.float().sum(1),
        "survival": _mean_over(lifetime, ever),
        "lasting": _mean_over((lifetime == 1).float(), ever),
        "kept": diagnostics.retention(phi).nanmean(1),
        "votes_of_sinks": (votes * sink).sum((1, 2)) / sink.sum((1, 2)),
    }
    return {name: _over_sequences(values) for name, values in figures.items()}


def _per_step(trajectory: Trajectory, phi: torch.Tensor, common: torch.Tensor) -> dict[str, list]:
    """Series over steps: means over sequences, (S,); centroid and spread for each sequence, (N, S).

    Args:
        phi: (N, S, T); `common`: (N, S, t), at the positions that all steps have in common.
    """
    sink = phi > SINK  # (N, S, T)
    return {
        "progress": rounded(trajectory.progress.mean(0)),
        "sinks": rounded(sink.float().sum(2).mean(0)),
        "mass_of_sinks": rounded(((trajectory.mass * sink).nansum(2) / trajectory.mass.nansum(2)).mean(0)),
        "kept": rounded(diagnostics.retention(common).nanmean(0)),
        "from_first": rounded(_since_first(common)),
        "centroid": rounded(diagnostics.centroids(common)),
        "spread": rounded(diagnostics.spreads(common)),
    }


def _since_first(phi: torch.Tensor) -> torch.Tensor:
    """Share of the first step's sinks that stay sinks up to step s, mean over sequences: (N, S, T) -> (S,)."""
    sink = phi > SINK  # (N, S, T)
    alive = sink.int().cumprod(1).sum(2)  # (N, S)
    return (alive / alive[:, :1]).nanmean(0)


def _mean_over(values: torch.Tensor, selection: torch.Tensor) -> torch.Tensor:
    """Mean over the selected positions, NaN where none is: 2 x (N, T) -> (N,)."""
    return (values * selection).sum(1) / selection.sum(1)


def _over_sequences(values: torch.Tensor) -> dict:
    """Mean and standard error of (N,) values, of which NaN are left out."""
    values = values[~values.isnan()].double()  # (n,)
    count = len(values)
    error = values.std().item() / math.sqrt(count) if count > 1 else None
    return {"mean": values.mean().item() if count else None, "standard_error": error, "sequences": count}


def rounded(values: torch.Tensor) -> list:
    """Nested lists of numbers with 4 significant digits; None for NaN."""
    if values.dim() > 1:
        return [rounded(row) for row in values]
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values.tolist()]


def pretty_json(values: dict) -> str:
    """Indented JSON that has each list of numbers or words on one line."""
    return _pretty(values, "") + "\n"


def _pretty(value, indent: str) -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        parts = [f"{inner}{json.dumps(key)}: {_pretty(part, inner)}" for key, part in value.items()]
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        return "[\n" + ",\n".join(inner + _pretty(part, inner) for part in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
