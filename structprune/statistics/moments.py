"""Moments of the inputs of every consumer, on any arm: one forward per batch where the inputs fit, else two."""

from functools import reduce

import torch

from structprune.models.adapter import Adapter
from structprune.models.encode import encode_rows
from structprune.models.experts_structprune import role_and_part, role_of
from structprune.models.transfer import send
from structprune.statistics.activations import Moments, merge_moments, moments
from structprune.statistics.capture import ConsumerKey, MassMeter, consumers, watch_inputs, watch_tokens
from structprune.statistics.pass_parts import PassParts
from structprune.statistics.rows import arm_ids, arm_weights, needs_sinks, use_weights
from structprune.statistics.scan import Scan
from structprune.workers import Workers


class ExpertTokens:
    """Which tokens of a pass each expert sees, by the key of its down projection."""

    def __init__(self) -> None:
        self._tokens: dict[ConsumerKey, torch.Tensor] = {}  # (m,) each

    def see(self, key: tuple[int, str], tokens: torch.Tensor) -> None:
        """As `watch_tokens` calls it."""
        name, part = role_and_part(key[1])
        if name == "activated":
            self._tokens[key[0], role_of("down", part)] = tokens

    def of(self, key: ConsumerKey, weight: torch.Tensor | None) -> torch.Tensor | None:
        """The weights of a consumer's rows, of ω (b, T): (m,) of an expert's."""
        return weight if weight is None or key not in self._tokens else weight.flatten()[self._tokens[key]]


def held_input_bytes(adapter: Adapter, tokens: int, itemsize: int) -> int:
    """Bytes of every consumer's input for `tokens` tokens, held until their sink weights are known."""
    return tokens * itemsize * sum(module.in_features for module in consumers(adapter.blocks).values())


@torch.inference_mode()
def consumer_moments(scan: Scan, arm: str) -> dict[ConsumerKey, Moments]:
    """Moments of the inputs of every consumer, (block, role), over the rows of `arm`.

    The sink weights of the noisy arms are known only after the forward pass. Within the budget every consumer's input
    is held until then; beyond it the batch runs twice. Both give the same numbers. A batch holds whole windows, so that
    a policy sees all levels of a window.
    """
    adapter, calibration, windows = scan.adapter, scan.calibration, scan.limits.windows
    totals: dict[ConsumerKey, Moments] = {}

    def add(key: ConsumerKey, x: torch.Tensor, weight: torch.Tensor | None) -> None:
        new = moments(x, places.of(key, weight))
        totals[key] = merge_moments(totals[key], new) if key in totals else new

    places = ExpertTokens()

    def weigh(noisy: torch.Tensor) -> torch.Tensor | None:
        with (meter := MassMeter()).on(adapter.cores), watch_tokens(adapter.blocks, places.see):
            encode_rows(adapter.model, send(noisy.flatten(0, 1), adapter.device))
        mass = meter.take().view(noisy.shape)  # (b, S, T)
        parts.observe(mass)
        weight = arm_weights(mass, arm, scan.sink).flatten(0, 1)  # (b*R, T)
        return use_weights(weight, weight.shape, scan)

    ids, linears = arm_ids(calibration, arm, scan.layout), consumers(adapter.blocks)  # (N, R, S)
    measured = arm_ids(calibration, "masked", scan.layout)  # (N, L, S)
    tokens = windows * measured[0].numel()
    fits = held_input_bytes(adapter, tokens, adapter.dtype.itemsize) <= scan.limits.budget
    starts = range(0, len(ids), windows)
    parts = PassParts(scan, f"moments-{arm}", ids.flatten(0, 1), windows * ids.shape[1])
    done, sums = parts.restore()
    totals |= from_tensors(sums, adapter.device)
    for number, start in enumerate(scan.track(starts[done:], f"moments ({arm})"), done + 1):
        noisy = measured[start : start + windows]  # (b, L, S)
        part = ids[start : start + windows]  # (b, R, T)
        if needs_sinks(arm, scan.sink) and arm.startswith("masked") and fits:
            inputs: dict[ConsumerKey, torch.Tensor] = {}
            with watch_inputs(linears, inputs.__setitem__):
                weight = weigh(noisy)  # (b*R, T)
            for key in list(inputs):
                add(key, inputs.pop(key), weight)
        else:
            # (b*R, T)
            weights = weigh(noisy) if needs_sinks(arm, scan.sink) else use_weights(None, part.flatten(0, 1).shape, scan)
            watch = watch_inputs(linears, lambda key, x, weights=weights: add(key, x, weights))
            with watch, watch_tokens(adapter.blocks, places.see):
                encode_rows(adapter.model, send(part.flatten(0, 1), adapter.device))
        parts.keep(number, lambda: as_tensors(totals))
    return merged(totals, scan.workers)


def as_tensors(totals: dict[ConsumerKey, Moments]) -> dict[str, torch.Tensor]:
    """Moments under names of their own: "block role part"."""
    return {
        f"{index} {role} {part}": value for (index, role), each in totals.items() for part, value in vars(each).items()
    }


def from_tensors(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[ConsumerKey, Moments]:
    """The moments of `as_tensors`, on a device."""
    parts: dict[ConsumerKey, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, role, part = name.split()
        parts.setdefault((int(index), role), {})[part] = value
    return {key: Moments(**each).to(device) for key, each in parts.items()}


def merged(own: dict[ConsumerKey, Moments], workers: Workers) -> dict[ConsumerKey, Moments]:
    """The moments over the rows of all processes, from each one's own."""
    if not workers.several:
        return own
    parts = workers.gather({key: each.to(torch.device("cpu")) for key, each in own.items()})
    totals = {key: reduce(merge_moments, [part[key] for part in parts]) for key in own}
    return {key: each.to(own[key].mean.device) for key, each in totals.items()}
