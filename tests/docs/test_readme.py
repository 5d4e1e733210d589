"""The front page is short, its map is the tree, and CI runs the test command that it gives."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LONGEST = 150  # lines of a front page


def test_it_is_short():
    assert len(README.splitlines()) <= LONGEST


@pytest.mark.slow
def test_tables_come_from_the_results():
    command = [sys.executable, "-m", "scripts.readme.readme_tables", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_readmes_test_command():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2 and all("torch==2.13.0" in command for command in commands)
    assert [
        command for command in commands if command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    ] == commands[1:]


def test_its_map_has_every_room():
    (tree,) = re.findall(r"^```\nstructprune/\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / "structprune").glob("*/__init__.py")}
    assert set(re.findall(r"\b([a-z]+)/(?=\s)", tree)) == rooms and len(tree.splitlines()) <= 15
