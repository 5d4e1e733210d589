"""Peak memory of one call, above the memory in use before it."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from structprune.models.placement import give_back_memory, synchronise

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_above(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `call` needs at its peak, above the memory in use before it.

    On CUDA the tensors that the allocator counts; elsewhere the process, by Linux's high-water mark, which is reset
    first. Run the call once before, so that libraries are loaded and threads started.

    Returns:
        None where the high-water mark cannot be reset (other systems, some containers).
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
        RESET.write_text("5")  # the mark starts again at the current resident size
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    """A size in /proc/self/status, such as VmRSS."""
    (kilobytes,) = re.findall(rf"{key}:\s+(\d+) kB", STATUS.read_text(encoding="ascii", errors="replace"))
    return 1024 * int(kilobytes)
