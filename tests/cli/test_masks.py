"""Masks through the command line: what is written and said, and one line for everything that is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file

from structprune import load_model
from structprune.cli.main import main
from structprune.masking import Masks
from structprune.runs.work import clear, has_parts

SMALL = ("calibration.windows=4", "calibration.held_out=2", "calibration.length=32", "calibration.interval=25")
MADE = {"README.md", "calibration.safetensors", "config.json", "masks.safetensors", "model.safetensors", "report.json",
        "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


def sets(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


def command(checkpoint, out, text, *more) -> list[str]:
    return ["prune", str(checkpoint), "--out", str(out), "--calibration", str(text), *sets(*SMALL), *map(str, more)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "mmada", "dream", "a2d-qwen3"])
@pytest.mark.parametrize("method", [["unstructured", "--ratio", "0.6"], ["nm", "--nm", "3:4"]], ids=lambda m: m[0])
def test_what_is_written_and_said(family, method, tiny_checkpoint, text_path, tmp_path, capsys):
    checkpoint, out = tiny_checkpoint(family), tmp_path / "out"
    assert main(command(checkpoint, out, text_path, "--method", *method)) == 0
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == MADE
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    assert (out / "model.safetensors").stat().st_size == (checkpoint / "model.safetensors").stat().st_size
    written, masks = load_file(out / "model.safetensors"), Masks.load(out / "masks.safetensors")
    assert len(masks.packed) == 21
    for name, value in load_file(checkpoint / "model.safetensors").items():
        if name in masks.packed:
            assert torch.equal(masks.kept(name), written[name] != 0)
        else:
            assert torch.equal(written[name], value)
    expected = {"nm": 0.75, "unstructured": 0.6}[method[0]]
    assert masks.sparsity() == pytest.approx(expected, abs=0.002)
    state = load_model(out).state_dict()
    assert all(torch.equal(state[name], value) for name, value in written.items())
    assert f"Wrote {out} (the checkpoint in its own layout, masks.safetensors" in said
    last = said.strip().splitlines()[-1]
    assert "The file is not smaller and not faster by itself" in last
    assert "2:4 kernels" in last and "--method structured" in last
    assert f"{100 * masks.sparsity():.2f} % of its" in said and "2 held-out windows" in said
    choice = f"sparsegpt on masked, {'3:4' if method[0] == 'nm' else 'unstructured 0.6'}"
    assert choice in said and choice in (out / "README.md").read_text()
    table = [line for line in said.splitlines() if line[:1] in "┏┃┡│└"]
    assert len(table) == 11 and max(map(len, table)) <= 80
    report = json.loads((out / "report.json").read_text())
    assert (report["config"]["method"], report["family"]) == (method[0], {"mmada": "llada"}.get(family, family))


def test_an_output_can_be_replaced_and_masked_again(tiny_checkpoint, text_path, tmp_path):
    checkpoint, out, again = tiny_checkpoint(), tmp_path / "out", tmp_path / "again"
    plain = ["--method", "nm", *sets("reconstruct.enabled=false", "masking.score=wanda")]
    assert main(command(checkpoint, out, text_path, *plain, "--nm", "4:8")) == 0
    assert main(command(checkpoint, out, text_path, *plain, "--nm", "1:4", "--overwrite")) == 0
    assert Masks.load(out / "masks.safetensors").sparsity() == 0.25
    assert main(command(out, again, text_path, *plain, "--nm", "2:4")) == 0
    first, second = (Masks.load(path / "masks.safetensors") for path in (out, again))
    assert second.sparsity() == 0.5
    assert not any((second.kept(name) & ~first.kept(name)).any() for name in first.packed)  # zeros are worth nothing
    assert {path.name for path in again.iterdir()} == MADE


def test_nm_needs_no_quotes(tiny_checkpoint, text_path, tmp_path, capsys):
    """YAML takes 4:8 for 248 seconds."""
    (tmp_path / "run.yaml").write_text(
        "method: nm\nmasking:\n  nm: 4:8\n  score: wanda\nreconstruct: {enabled: false}\n"
    )
    checkpoint = tiny_checkpoint()
    assert main(command(checkpoint, tmp_path / "a", text_path, "--config", tmp_path / "run.yaml")) == 0
    plain = sets("masking.score=wanda", "reconstruct.enabled=false", "masking.nm=4:8")
    assert main(command(checkpoint, tmp_path / "b", text_path, "--method", "nm", *plain)) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert "wanda on masked, 4:8" in capsys.readouterr().out


MASKS = ["--method", "unstructured"]
NM = ["--method", "nm"]
NO_TEXT = sets("masking.score=magnitude", "reconstruct.enabled=false", "calibration.held_out=0")
WRONG = {
    "M does not divide": (
        [*NM, "--nm", "2:5"],
        "masking.nm = 2:5 needs inputs in groups of 5, but model.transformer.blocks.0.q_proj has 32 inputs: "
        "choose an M that divides it",
    ),
    "M divides only some": (
        [*NM, "--nm", "16:32"],
        "masking.nm = 16:32 needs inputs in groups of 32, but model.transformer.blocks.0.ff_out has 48 inputs",
    ),
    "4:4": ([*NM, "--nm", "4:4"], "masking.nm = 4:4 removes 4 of every 4: give N:M with 0 < N < M, such as 2:4"),
    "0:4": ([*NM, "--nm", "0:4"], "masking.nm = 0:4 removes 0 of every 4: give N:M with 0 < N < M"),
    "2of4": ([*NM, "--nm", "2of4"], "config key masking.nm = '2of4': input should be N:M, such as 2:4"),
    "nm and ratio": (
        [*NM, "--nm", "2:4", "--ratio", "0.3"],
        "masking.ratio = 0.3 contradicts masking.nm = 2:4, which removes 0.5: leave it out (null)",
    ),
    "nm of a structured run": (["--nm", "2:4"], "--nm 2:4 has no effect with method structured: add --method nm"),
    "nm of an unstructured run": (
        [*MASKS, "--nm", "2:4"],
        "--nm 2:4 has no effect with method unstructured: add --method nm",
    ),
    "nm and a set ratio": (
        [*NM, "--nm", "2:4", *sets("masking.ratio=0.3")],
        "masking.ratio = 0.3 contradicts masking.nm = 2:4, which removes 0.5: leave it out (null)",
    ),
    "two ratios": (
        [*MASKS, "--ratio", "0.3", *sets("masking.ratio=0.6")],
        "--ratio 0.3 and --set masking.ratio both set the ratio: leave one out",
    ),
    "the default nm of an unstructured run": (
        [*MASKS, *sets("masking.nm='2:4'")],
        "--set masking.nm has no effect with method unstructured: add --method nm, or leave it out",
    ),
    "a default of masks in a structured run": (
        sets("masking.score=sparsegpt"),
        "--set masking.score has no effect with method structured: add --method unstructured or nm",
    ),
    "a default of another method": (
        [*MASKS, *sets("structured.score=obs")],
        "--set structured.score has no effect with method unstructured: add --method structured",
    ),
    "ratio 1": ([*MASKS, "--ratio", "1"], "config key masking.ratio = 1.0: input should be less than 1"),
    "ratio -0.1": (
        [*MASKS, "--ratio", "-0.1"],
        "config key masking.ratio = -0.1: input should be greater than or equal to 0",
    ),
    "ratio nan": ([*MASKS, "--ratio", "nan"], "input should be a finite number"),
    "method": (
        ["--method", "wanda"],
        "config key method = 'wanda': input should be 'structured', 'unstructured' or 'nm'",
    ),
    "score": (
        [*MASKS, *sets("masking.score=wnada")],
        "masking.score = 'wnada': input should be 'magnitude', 'wanda', 'sink-wanda', 'ria', 'sparsegpt' or "
        "'sink-sparsegpt'",
    ),
    "sinks without sinks": (
        [*MASKS, *sets("masking.score=sink-wanda", "masking.arm=clean")],
        "score 'sink-wanda' cannot use arm 'clean', which ignores sinks: ask for 'wanda', or for clean+sink",
    ),
    "magnitude on an arm": (
        [*MASKS, *sets("masking.score=magnitude", "masking.arm=masked")],
        "score 'magnitude' cannot use arm 'masked': it looks at weights only; leave masking.arm unset",
    ),
    "structured key": (
        [*NM, *sets("structured.ratio=0.3")],
        "--set structured.ratio has no effect with method nm: add --method structured",
    ),
    "masking key": (
        sets("masking.score=wanda"),
        "--set masking.score has no effect with method structured: add --method unstructured or nm",
    ),
    "dtype": (
        [*MASKS, *sets("export.dtype=float16")],
        "--set export.dtype has no effect with method unstructured: add --method structured",
    ),
    "constant": (
        [*MASKS, *sets("reconstruct.constant=true")],
        "reconstruct.constant = True has no effect without method = structured",
    ),
    "norms of a Gram": (
        [*MASKS, *sets("masking.norms=summed")],
        "masking.norms = summed has no effect without masking.score = wanda or ria",
    ),
    "damping of a norm": (
        [*MASKS, *sets("masking.score=ria", "masking.damping=0.1")],
        "masking.damping = 0.1 has no effect without masking.score = sparsegpt",
    ),
    "column block of nm": (
        [*NM, *sets("masking.column_block=64")],
        "masking.column_block = 64 has no effect without method = unstructured",
    ),
    "spread without owl": (
        [*MASKS, *sets("masking.owl_spread=0.1")],
        "masking.owl_spread = 0.1 has no effect without masking.allocation = owl",
    ),
    "owl with nm": (
        [*NM, *sets("masking.allocation=owl")],
        "masking.allocation = owl varies the ratio over blocks, which N:M fixes at 0.5: use uniform",
    ),
    "depth beyond 1": (
        [*MASKS, "--ratio", "0.95", *sets("masking.allocation=depth")],
        "masking.depth_slope = 0.2 gives block 0 the ratio 1.050 at 0.95",
    ),
    "owl beyond 1": (
        [*MASKS, "--ratio", "0.95", *sets("masking.allocation=owl", "masking.owl_spread=0.3")],
        "masking.owl_spread = 0.3 gives block",
    ),
    "order of magnitude": (
        [*MASKS, *sets("masking.score=magnitude", "masking.order=one-shot")],
        "masking.order = one-shot has no effect without a score that looks at activations",
    ),
    "sink key": ([*MASKS, *sets("sink.kappa=3")], "sink.kappa = 3.0 has no effect without an arm with +sink"),
    "plan": ([*MASKS, "--plan", "plan.json"], "--plan removes heads and channels: leave it out"),
    "refit without held-out": (
        [*MASKS, *sets("calibration.held_out=0")],
        "calibration.held_out = 0 leaves nothing to choose the refit's damping on: set it, or reconstruct.enabled "
        "= false",
    ),
    "text that nobody reads": (
        [*MASKS, *NO_TEXT],
        "has no effect without a score, refit or held-out check that looks at text",
    ),
    "long windows": (
        [*MASKS, *sets("calibration.length=65")],
        "calibration.length = 65 exceeds the model's 64 positions: lower it",
    ),
    "no level": ([*MASKS, *sets("calibration.interval=60")], "calibration.interval = 60 leaves no noise level"),
    "short text": ([*MASKS, *sets("calibration.windows=9000")], "lower calibration.windows"),
    "no text": ([*MASKS, "--calibration", "nowhere.txt"], "no calibration text at 'nowhere.txt'"),
}


def refused(arguments, capsys, folder) -> str:
    """The one line of a refusal; asserts exit code 2, nothing on stdout and nothing written."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(arguments) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("structprune")]
    assert len(lines) == 1 and lines[0].startswith("structprune: error: ") and "Traceback" not in said.err
    assert not said.out and {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return lines[0]


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused(case, tiny_checkpoint, text_path, tmp_path, capsys):
    more, message = WRONG[case]
    arguments = command(tiny_checkpoint(), tmp_path / "out", text_path, *more)
    if case != "owl beyond 1":
        assert message in refused(arguments, capsys, tmp_path)
        return
    assert main(arguments) == 2  # when norms were measured, which are kept for another spread
    [line] = capsys.readouterr().err.splitlines()
    assert message in line and has_parts(tmp_path / "out.work")
    clear(tmp_path / "out.work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llada-tiny", "text.txt"]


LATE = ("owl beyond 1", "short text", "no text")  # what only activations or the text itself can tell


@pytest.mark.parametrize("case", [case for case in WRONG if case not in LATE])
def test_it_is_refused_before_weights_are_read(case, tiny_checkpoint, text_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("structprune.models.loading._read_shard", lambda path: pytest.fail("weights were read"))
    assert WRONG[case][1] in refused(
        command(tiny_checkpoint(), tmp_path / "out", text_path, *WRONG[case][0]), capsys, tmp_path
    )


def test_text_without_a_tokenizer(tiny_checkpoint, text_path, tmp_path, capsys):
    given = command(tiny_checkpoint(tokenizer=False), tmp_path / "out", text_path, *MASKS)
    assert "no tokenizer that can be read" in refused(given, capsys, tmp_path)


def test_outputs_that_must_not_be_touched(tiny_checkpoint, text_path, tmp_path, capsys):
    checkpoint = tiny_checkpoint()
    inside = command(checkpoint, checkpoint / "masked", text_path, *MASKS)
    assert "lies inside the input checkpoint" in refused(inside, capsys, tmp_path)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    taken = command(checkpoint, tmp_path / "letters", text_path, *MASKS)
    assert "exists: choose another, or add --overwrite" in refused(taken, capsys, tmp_path)
    assert "holds something other than" in refused([*taken, "--overwrite"], capsys, tmp_path)
    itself = command(checkpoint, checkpoint, text_path, *MASKS, "--overwrite")
    assert "lies inside the input checkpoint" in refused(itself, capsys, tmp_path)


EARLY = [
    case for case in WRONG if case not in LATE and "--plan" not in WRONG[case][0] and case != "text that nobody reads"
]


@pytest.mark.parametrize("case", EARLY)
def test_inspect_refuses_what_a_run_would(case, tiny_checkpoint, tmp_path, capsys):
    more, message = WRONG[case]
    assert message in refused(["inspect", str(tiny_checkpoint()), *sets(*SMALL), *more], capsys, tmp_path)
