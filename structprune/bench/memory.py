"""Peak memory of this process."""

import resource
import sys

import torch


def peak_memory_bytes() -> dict[str, int]:
    """Peak resident memory of the process so far (`host`), and of tensors on the accelerator (`device`, if any)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["device"] = torch.cuda.max_memory_allocated()
    return peak
