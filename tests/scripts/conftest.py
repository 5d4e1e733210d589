"""Modules of scripts/, and the quick checkpoint and data of the masking benchmark."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(name: str):
    """The module of that name in one of the rooms of scripts/."""
    (path,) = SCRIPTS.glob(f"*/{name}.py")
    return importlib.import_module(f"scripts.{path.parent.name}.{name}")


@pytest.fixture(scope="session")
def scripts():
    """`scripts(name)` -> a module of scripts/."""
    return load_script


@pytest.fixture
def mask_dir(scripts, tmp_path) -> Path:
    """A folder with the checkpoint and the data of `bench_masking.py --quick`."""
    bench = scripts("bench_masking")
    options = bench.parse_arguments(["--quick", "--threads", "1"])
    bench.write_checkpoint(tmp_path / "checkpoint", options)
    bench.write_data(tmp_path / "data.safetensors", options)
    return tmp_path


@pytest.fixture
def masking_request(scripts, mask_dir):
    """`masking_request(**changes)` -> what a worker is to do with them: sink-wanda at 0.25 unless told otherwise."""
    base = {
        "checkpoint": str(mask_dir / "checkpoint"), "data": str(mask_dir / "data.safetensors"),
        "method": "sink-wanda", "ratio": 0.25, "steps": 10, "interval": 5, "threads": 1,
    }  # fmt: skip
    return lambda **changes: scripts("published_worker").Request(**base | changes)
