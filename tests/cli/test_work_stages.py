"""The parts of every stage: they go with the work directory whatever a run does, and serve other requests."""

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


OTHERS = {  # another request -> what it takes of a run with the default score on a sink arm
    "score": (["--score", "wanda"], "losses"),
    "export class": (
        ["--set=structured.allocation=uniform", "--set=export.compat=uniform"],
        "attention mass, losses, scores",
    ),
    "damping of the score": (["--set=structured.damping=0.03"], "attention mass, losses"),
    "refit": (["--no-refit"], "attention mass, losses, scores"),
}


@pytest.mark.slow
@pytest.mark.parametrize("more, taken", OTHERS.values(), ids=OTHERS)
def test_named_work_serves_another(more, taken, tiny_checkpoint, text_path, prune_command, tmp_path, capsys):
    """With the bytes of a run that begins anew."""
    checkpoint, work = tiny_checkpoint(), ["--work", str(tmp_path / "parts")]

    def run(out, *options):
        command = prune_command(checkpoint, tmp_path / out, text_path, "--ratio", "0.5", "--arm", "masked+sink")
        place = command.index("structured.rounds=8")  # which other scores do not read
        assert main([*command[: place - 1], *command[place + 1 :], *options]) == 0
        return (tmp_path / out / "model.safetensors").read_bytes(), capsys.readouterr().out

    run("first", *work)
    weights, said = run("second", *work, *more)
    assert f"Taken from finished parts: {taken}\n" in said
    assert weights == run("anew", *more)[0]
