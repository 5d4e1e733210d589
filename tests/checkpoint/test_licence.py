"""The licence in a model card's front matter, and cards that have none or are broken."""

import json

import pytest

from structprune.checkpoint.licence import licence_of, source_licence
from structprune.cli.main import main
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.runs.prune import prune

LLADA = "---\nlicense: mit\nlibrary_name: transformers\n---\n# LLaDA\n---\nlicense: apache-2.0\n---\n"
OTHER = """---
language: [en, de]
license: other
license_name: my licence
license_link: https://a.example/LICENSE
pipeline_tag: text-generation
---
"""


def test_what_is_named():
    assert licence_of(LLADA) == {"license": "mit"}
    assert licence_of(LLADA.replace("\n", "\r\n")) == {"license": "mit"}
    assert licence_of("---  \nlicense:\n- mit\n- apache-2.0\n---") == {"license": ["mit", "apache-2.0"]}
    assert licence_of(OTHER) == {
        "license": "other", "license_name": "my licence", "license_link": "https://a.example/LICENSE",
    }  # fmt: skip
    assert licence_of(OTHER.replace("my licence", "[1, 2]")) == {
        "license": "other", "license_link": "https://a.example/LICENSE",
    }  # fmt: skip


BROKEN = {
    "no front matter": "# A model\nlicense: mit\n",
    "later in the text": "# A model\n---\nlicense: mit\n---\n",
    "never closed": "---\nlicense: mit\n",
    "empty": "---\n---\n",
    "nothing": "",
    "no mapping": "---\n- license\n---\n",
    "no licence": "---\nlicense_name: mine\n---\n",
    "false": "---\nlicense: no\n---\n",
    "blank": "---\nlicense: ' '\n---\n",
    "empty list": "---\nlicense: []\n---\n",
    "list of lists": "---\nlicense: [[mit]]\n---\n",
    "no YAML": "---\nlicense: mit\nbase: [\n---\n",
    "a tab": "---\n\tlicense: mit\n---\n",
    "no date": "---\ndate: 2024-99-99\nlicense: mit\n---\n",
    "no integer": "---\nlicense: !!int ''\n---\n",
    "no truth": "---\nlicense: !!bool perhaps\n---\n",
    "Python": "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    "deep": f"---\nlicense: {'[' * 5000}\n---\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_what_names_none_or_is_malformed(case):
    assert licence_of(BROKEN[case]) == {}


def test_files(tmp_path):
    assert source_licence(tmp_path) == source_licence(tmp_path / "gone") == {}
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf" + LLADA.encode() + b"\xff\xfe")
    assert source_licence(tmp_path) == {"license": "mit"}
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert source_licence(tmp_path) == {}


@pytest.mark.slow
def test_it_goes_from_card_to_card(tiny_checkpoint, text_path, tmp_path):
    """From the source's card to the output's, by either kind of run, and on from there."""
    checkpoint = tiny_checkpoint()
    (checkpoint / "README.md").write_text(OTHER + "# A model\n")
    given = {"calibration.source": str(text_path), "calibration.windows": 2, "calibration.held_out": 1,
             "calibration.length": 16, "calibration.interval": 25, "structured.split": "equal"}  # fmt: skip
    prune(load_model(checkpoint), Config.load(overrides=given)).save(tmp_path / "small")
    assert source_licence(tmp_path / "small") == licence_of(OTHER)
    plain = ["masking.score=magnitude", "reconstruct.enabled=false", "calibration.held_out=0"]
    sets = [part for pair in plain for part in ("--set", pair)]
    for source, out in ((checkpoint, "masked"), (tmp_path / "masked", "again")):
        assert main(["prune", str(source), "--out", str(tmp_path / out), "--method", "nm", *sets]) == 0
        assert source_licence(tmp_path / out) == licence_of(OTHER)
        assert json.loads((tmp_path / out / "report.json").read_text())["license"] == licence_of(OTHER)
