"""The machine that a measurement ran on."""

import os
import platform
from pathlib import Path

import torch


def describe_machine() -> dict:
    """Processor, usable cores, torch's threads, versions and accelerator: plain data for the JSON beside a figure."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor(listing: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name if the system gives one, else its architecture."""
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
