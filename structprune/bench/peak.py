"""Peak memory of one call, above what was there before it."""

import re
from pathlib import Path
from typing import Callable

import torch

from structprune.models.placement import give_back_memory, synchronise

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_above(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needs at its peak beyond what is in memory before it.

    On CUDA of tensors, as the allocator counts them; elsewhere of the process, by Linux's high-water mark, which is
    reset first. Call it once untimed before, so that libraries are loaded and threads started.

    Returns:
        None where the system's mark cannot be reset (other systems, some containers).
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    give_back_memory()
    try:
        RESET.write_text("5")  # the mark starts again at what is resident now
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text(encoding="ascii", errors="replace"))[1])
