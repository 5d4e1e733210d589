"""Peak memory of a call."""

import subprocess
import sys

import pytest
import torch

from structprune.bench import peak
from structprune.bench.peak import RESET, peak_above

pytestmark = pytest.mark.slow

SIZE = 64 * 2**20
CPU = torch.device("cpu")


def hold(times: int = 1):
    return lambda: [torch.ones(SIZE, dtype=torch.uint8) for _ in range(times)]


@pytest.mark.skipif(not RESET.exists(), reason="the high-water mark is Linux's")
def test_what_a_call_holds_is_counted_from_where_it_starts():
    assert peak_above(hold(2), CPU) == pytest.approx(2 * SIZE, rel=0.1)
    kept = hold(3)()
    assert peak_above(hold(), CPU) == pytest.approx(SIZE, rel=0.1)  # neither what is kept nor the earlier peak
    assert peak_above(lambda: None, CPU) < 2**22
    assert len(kept) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_freed_before_is_not_what_a_call_is_served_from():
    """A heap that keeps 300 MB of freed pieces, in a fresh process: what is then asked for is counted all the same."""
    lines = (
        "import ctypes, torch",
        "from structprune.bench.peak import peak_above",
        "limits = ctypes.CDLL(None).mallopt",
        "limits(-3, 2**25), limits(-1, 2**30)  # keep pieces on the heap, and the heap whole",
        "pieces = [torch.ones(2**20, dtype=torch.uint8) for _ in range(300)]",
        "del pieces",
        f"print(peak_above(lambda: torch.ones({SIZE}, dtype=torch.uint8), torch.device('cpu')))",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == pytest.approx(SIZE, rel=0.1)


def test_unknown_where_the_mark_cannot_be_reset(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "RESET", tmp_path / "no" / "such")
    assert peak_above(lambda: None, CPU) is None


def test_on_cuda_the_allocator_is_asked(monkeypatch):
    state = {"now": 100, "most": 900}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(most=state["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["most"])
    assert peak_above(lambda: state.update(most=state["now"] + 50), torch.device("cuda")) == 50
