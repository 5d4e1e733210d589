"""What the README says is what was measured, and CI runs the command it gives."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_every_file_it_points_to_is_there():
    import re

    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    assert len(targets) > 5 and all((ROOT / target).exists() for target in targets)
