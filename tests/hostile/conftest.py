"""The verbs over one broken input, and what every refusal has in common."""

import resource
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from structprune.cli.main import main

QUIET = {"deadline": None, "report_multiple_bugs": False, "suppress_health_check": list(HealthCheck)}
settings.register_profile("usual", max_examples=300, derandomize=True, **QUIET)
settings.register_profile("thorough", max_examples=5000, **QUIET)
SECONDS, KILOBYTES = 10, 2_000_000  # that a refusal may take, and by which memory may grow


def pytest_configure(config) -> None:
    """`pytest -m thorough` draws more examples."""
    settings.load_profile("thorough" if config.getoption("markexpr") == "thorough" else "usual")


@pytest.fixture(scope="session")
def sound(shared_checkpoint, tmp_path_factory):
    """A sound tiny checkpoint and text, to copy and break."""
    from structprune.assets import text_file

    folder = tmp_path_factory.mktemp("sound")
    shutil.copytree(shared_checkpoint("llada"), folder / "model")
    (folder / "text.txt").write_text(text_file("calibration.txt").read_text(encoding="utf-8")[:20_000], "utf-8")
    return folder


@pytest.fixture
def place(sound, tmp_path) -> Path:
    """A directory with a copy of both: `model` and `text.txt`."""
    shutil.copytree(sound, tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def put(place):
    """`put(name, content)` -> the path of a new file: text, bytes, or made by a function of the path."""

    def write(name: str, content) -> str:
        path = place / name
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def sets(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


SMALL = sets("calibration.windows=3", "calibration.held_out=2", "calibration.length=16", "calibration.interval=25")
VERBS = {  # what follows the model's directory; TEXT and OUT are paths
    "prune": ["prune", "MODEL", "--out", "OUT", "--calibration", "TEXT", *SMALL],
    "masks": ["prune", "MODEL", "--out", "OUT", "--calibration", "TEXT", "--method", "unstructured", *SMALL],
    "nm": ["prune", "MODEL", "--out", "OUT", "--calibration", "TEXT", "--method", "nm", *SMALL],
    "inspect": ["inspect", "MODEL", *sets("calibration.length=16")],
    "inspect masks": ["inspect", "MODEL", "--method", "unstructured", *sets("calibration.length=16")],
    "sinks": ["sinks", "MODEL", "--out", "OUT", "--text", "TEXT", "--windows", "1", "--length", "16", "--levels", "2"],
    "eval": ["eval", "MODEL", "--out", "OUT", "--text", "TEXT", *sets("evaluation.windows=2", "evaluation.length=16")],
    "bench": ["bench", "MODEL", "--out", "OUT", "--length", "8", "--gen-length", "0", "--rounds", "1", "--no-plots"],
}


@pytest.fixture
def run_refused(place, capfd):
    """`run_refused(*arguments)` -> the one line of a refusal; MODEL, TEXT and OUT stand for paths.

    Checked: exit code 2, one line on stderr and nothing else there, no traceback, nothing written or changed, and the
    time and memory it took.
    """

    def run(*arguments: str) -> str:
        names = {"MODEL": str(place / "model"), "TEXT": str(place / "text.txt"), "OUT": str(place / "out")}
        before, memory = _contents(place), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(SECONDS)  # ends what does not end
        try:
            code = main([names.get(word, word) for word in arguments])
        finally:
            signal.alarm(0)
            said = capfd.readouterr().err
        assert code == 2, said
        lines = said.splitlines()
        assert len(lines) == 1 and lines[0].startswith("structprune: error: ") and len(lines[0]) < 1000, said
        assert _contents(place) == before
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KILOBYTES
        return lines[0].removeprefix("structprune: error: ")

    return run


@pytest.fixture
def refused(run_refused):
    """`refused(verb, *more)` -> as `run_refused`, for a verb of `VERBS`; of an option given twice the last counts."""
    return lambda verb, *more: run_refused(*VERBS[verb], *more)


def _contents(place: Path) -> dict[str, tuple]:
    """Every path below a directory with its kind, size and time of change."""
    stats = {str(path.relative_to(place)): path.lstat() for path in place.rglob("*")}
    return {name: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items() if name != "."}
