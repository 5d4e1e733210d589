"""What every pruning run shares: calibration, streaming, timing, the held-out check and the sink log."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from structprune.calibration.batches import Calibration
from structprune.calibration.build import CHECK_SEED, calibrate, check_length, held_out_noise
from structprune.calibration.trajectories import Generating, check_calibration, reverse_calibration
from structprune.config import CalibrationSettings, Config
from structprune.errors import UserError
from structprune.evaluation.compare import paired_difference
from structprune.evaluation.nelbo import Nelbo, masked_nelbo
from structprune.masking.request import MaskRequest
from structprune.models.adapter import Adapter
from structprune.models.journal import NOWHERE, Journal
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_dtype, stays_on_disk, streamed, synchronise
from structprune.progress import Track, watched
from structprune.statistics.overflow import largest_weight
from structprune.statistics.scan import Scan
from structprune.statistics.sink_log import SinkLog
from structprune.structured.request import StructuredRequest
from structprune.workers import ALONE, Workers, check_shares

T = TypeVar("T")
CALIBRATION = "calibration"  # the part that knows the windows of a run


class Run:
    """One dense model, one resolved request and one calibration set.

    Args:
        model: the dense model, from `structprune.load_model`.
        request: what the run does.
        calibration: the windows to read; None makes them as the request says.
        track: wraps long iterations, `track(items, title)`.
        workers: the processes that share the windows.
    Raises:
        UserError: a calibration that the request cannot use, or fewer windows than processes.
    """

    def __init__(
        self,
        model: DiffusionLM,
        request: StructuredRequest | MaskRequest,
        calibration: Calibration | None,
        track: Track,
        workers: Workers = ALONE,
    ):
        if stays_on_disk(model) != request.resources.on_disk:
            raise UserError(
                "memory.offload = disk is for a model of structprune.map_model, which needs it: use both, or neither"
            )
        self.model, self.track, self.adapter, self.workers = model, track, Adapter(model), workers
        self.resources, self.limits = request.resources, request.limits
        self.sink, self.seed = request.sink, request.calibration.seed
        self.causal = 1.0 if request.calibration.causal is None else request.calibration.causal
        self.seconds: dict[str, float] = {}
        self.journal: Journal = NOWHERE  # of finished parts: see `keep_in`
        if calibration is not None and not request.reads_text:
            raise UserError("nothing of this run looks at a calibration: leave it out, or set calibration.held_out")
        self._generating: CalibrationSettings | None = None  # while a reverse trajectory is still to be generated
        self._calibration = self._calibrate(request, calibration) if request.reads_text else None

    def _calibrate(self, request: StructuredRequest | MaskRequest, calibration: Calibration | None) -> Calibration:
        """The calibration given, replayed, or made of text, with forward noise."""
        config = request.config
        if calibration is not None or request.calibration.replays:
            calibration = calibration or self._read(config)
            check_calibration(calibration, config)
            check_length(self.model, config, calibration)
            return self._shareable(calibration, request)
        if self.sink.trajectory == "reverse":
            self._generating = request.calibration
        return self._shareable(self._read(config), request)

    @property
    def generates(self) -> bool:
        """Whether a reverse trajectory is still to be generated."""
        return self._generating is not None

    def generate(self) -> None:
        """Follow the model's own denoising where the request asks for it, once: the work that needs passes and parts.

        `calibration` does it where it was not done; with weights that are streamed by then, it cannot.
        """
        settings = self._generating
        if settings is None or self._calibration is None:
            return
        copies = 1 if self.limits.batch is not None else self._calibration.levels
        how = Generating(settings.batch * copies, self.track, self.workers, self.journal.within("reverse"))
        with self.streamed(self.model):
            work = partial(reverse_calibration, self.model, self._calibration, settings, how)
            self._calibration, self._generating = self.timed("trajectories", work), None

    def _read(self, config: Config) -> Calibration:
        return self.workers.from_first(lambda: calibrate(self.model, config))

    def _shareable(self, calibration: Calibration, request: StructuredRequest | MaskRequest) -> Calibration:
        """A calibration of which every process gets a window, whatever it is for."""
        sizes = [(calibration.fit.windows, "windows (calibration.windows)")]
        if calibration.held_out:
            sizes.append((calibration.held_out, "held-out windows (calibration.held_out)"))
        if isinstance(request, StructuredRequest) and request.reconstruct.enabled:
            sizes.append((request.settings.split_windows, "windows of a candidate (structured.split_windows)"))
        if request.config.search.enabled:
            sizes.append((request.config.search.sequences, "windows of a search (search.sequences)"))
        check_shares(self.workers, sizes)
        return calibration

    def keep_in(self, journal: Journal) -> None:
        """Keep finished parts in a journal from now on, and take those that it has.

        Raises:
            UserError: they were made of other windows or noise, such as of a text on the Hub that has changed.
        """
        self.journal = journal
        if not self.workers.several:  # which would end at different steps
            self.track = watched(self.track, journal.watch)
        if self._calibration is None:
            return
        digest, kept = self._calibration.digest, journal.read(CALIBRATION)
        if kept is None:
            journal.keep(CALIBRATION, notes=digest)
        elif kept.notes != digest:
            raise UserError(
                f"'{journal.directory}' has parts of a run on other calibration windows, which the same settings made:"
                " its text has changed. Give --resume never to begin anew, or another --work"
            )

    @property
    def calibration(self) -> Calibration:
        """The calibration set.

        Raises:
            UserError: the run reads no text.
        """
        self.generate()
        return self.text_windows

    @property
    def text_windows(self) -> Calibration:
        """The calibration set; before `generate`, a reverse trajectory's windows with forward noise.

        Raises:
            UserError: the run reads no text.
        """
        if self._calibration is None:
            raise UserError("this run reads no calibration text")
        return self._calibration

    @property
    def device(self) -> torch.device:
        """Where forward passes compute."""
        return self.resources.stream_target or self.model.device

    def scan(self, log: SinkLog) -> Scan:
        """The context of a measurement on the dense model with all windows, whose sink mass `log` keeps."""
        own = self.calibration.share(self.workers)
        return Scan(
            self.adapter, own, self.sink, self.limits, self.track, log.observe, self.journal, self.workers, self.causal
        )  # fmt: skip

    def fit_scan(self, log: SinkLog) -> Scan:
        """As `scan`, without the held-out windows."""
        return replace(scan := self.scan(log), calibration=scan.calibration.fit)

    def sink_report(self, log: SinkLog, calibration: Calibration) -> dict | None:
        """What the sink policy did to a calibration's fit windows; None where no mass was measured."""
        return log.report(calibration.fit, self.sink, self.adapter.mask_id, self.model.layout, self.workers)

    def begin(self) -> float:
        """Start the phases of a new result, to which of what was timed before only a rehearsal belongs.

        Returns:
            The time, in seconds of the clock.
        """
        if self.seconds.keys() != {"rehearsal"}:
            self.seconds = {}
        return time.perf_counter()

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """Do some work and add its time to phase `name`, in seconds, device included."""
        synchronise(self.device)
        start = time.perf_counter()
        value = work()
        synchronise(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        return value

    def streamed(self, model: DiffusionLM):
        """While open, the model computes on the run's device even where its weights stay in host memory."""
        return streamed(model, self.resources.stream_target, self.resources.overlap)

    def nelbo(self, model: DiffusionLM) -> Nelbo:
        """NELBO on the held-out windows, under noise that all models of this run share."""
        ids, noisy, p = held_out_noise(self.calibration, self.model, self.seed)
        batch, own = (
            self.limits.sequences(self.calibration.levels, self.calibration.length),
            self.workers.span(len(ids)),
        )
        windows = (ids[own], noisy[own], p[own])  # (n, T), (n, S, T), (n, S)
        with self.streamed(model):
            nelbo = self.timed("check", lambda: masked_nelbo(model, *windows, batch=batch, track=self._show_check))
        return Nelbo(**{name: self.workers.rows(values) for name, values in nelbo.tensors.items()})

    def kept_nelbo(self, name: str, make: Callable[[], DiffusionLM]) -> Nelbo:
        """`nelbo` of the model that `make` gives, which is only called where the journal has no part of this name."""
        # the sequences of a pass decide the last bits
        name = f"{name}-{self.limits.sequences(self.calibration.levels, self.calibration.length)}"
        if kept := self.journal.read(name):
            return Nelbo(**kept.tensors)
        nelbo = self.nelbo(make())
        self.journal.keep(name, nelbo.tensors)
        return nelbo

    def _show_check(self, items):
        return self.track(items, "held-out check")

    def _check_finite(self, name: str, loss: Nelbo) -> None:
        """Raise UserError where a model's loss is not a finite number."""
        if math.isfinite(loss.mean):
            return
        dtype = compute_dtype(self.model)
        remedy = "use model.dtype = float32"
        if dtype != torch.float16:  # bfloat16 has the range of float32
            remedy = f"{largest_weight(self.model)}; use a sound checkpoint"
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"the {name} model's loss on held-out windows is {loss.mean} in {kind}: {remedy}")

    def held_out(self, dense: Nelbo, pruned: Nelbo, kept: str, **means: float | None) -> dict:
        """What pruning costs on the held-out windows, as plain data; `kept` names a candidate, `means` all.

        Raises:
            UserError: a loss that is not finite.
        """
        self._check_finite("dense", dense)
        self._check_finite("pruned", pruned)
        causal = {}
        if dense.causal is not None and pruned.causal is not None:
            losses = {"dense": dense.causal.mean().item(), "pruned": pruned.causal.mean().item()}
            causal = {"causal": losses | {"loss": paired_difference(pruned.causal, dense.causal)}}
        return {
            "kept": kept,
            "dense": dense.mean,
            **means,
            "loss": paired_difference(pruned.nelbo, dense.nelbo),
            **causal,
            "windows": self.calibration.held_out,
            "seed": CHECK_SEED + self.seed,
        }
