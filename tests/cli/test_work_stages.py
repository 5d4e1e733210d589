"""The parts of every stage go with the work directory, whatever a run does."""

import pytest

from structprune.cli.main import main
from structprune.models.journal import Journal

STAGES = {
    "reverse": ["--set=sink.trajectory=reverse", "--arm", "masked+sink"],
    "drops": ["--set=search.enabled=true", "--set=search.sequences=1", "--set=export.compat=uniform",
              "--set=structured.allocation=uniform"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_folders_of_all_stages_go_at_the_end(
    stage, tiny_checkpoint, text_path, prune_command, tmp_path, monkeypatch
):
    keep, out, folders = Journal.keep, tmp_path / "out", set()

    def noted(self, *given, **named):
        keep(self, *given, **named)
        folders.update(path.name for path in (tmp_path / "out.work").iterdir() if path.is_dir())

    monkeypatch.setattr(Journal, "keep", noted)
    assert main(prune_command(tiny_checkpoint(), out, text_path, "--ratio", "0.5", *STAGES[stage])) == 0
    assert {"scores", "refits", stage} <= folders and not (tmp_path / "out.work").exists()
