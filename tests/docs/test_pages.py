"""Every page: links, anchors, paths, commands, keys, modules and Python blocks exist; and the checks can fail."""

import pytest

from scripts.readme import page_checks
from scripts.readme.page_checks import ROOT, pages

PAGES = {str(path.relative_to(ROOT)): path for path in pages()}


def test_the_pages_are_there():
    names = (
        "README",
        "CONTRIBUTING",
        "CHANGELOG",
        "SECURITY",
        "docs/README",
        "docs/pruning",
        "docs/recovery",
        "docs/generation",
        "docs/masks",
        "docs/sinks",
    )
    names += ("docs/sinks", "docs/evaluation", "docs/benchmarks", "docs/results", "docs/methods", "docs/verification")
    assert {f"{name}.md" for name in (*names, "docs/extending")} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_says_exists(name):
    assert page_checks.problems(PAGES[name]) == []


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/") and name != "docs/README.md"])
def test_the_index_leads_to_every_page(name):
    assert f"]({name.removeprefix('docs/')})" in PAGES["docs/README.md"].read_text(encoding="utf-8")


def page(tmp_path, text):
    """The problems of a page outside the repository with that text."""
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return page_checks.problems(path)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("[there](nowhere.md)", "link to 'nowhere.md': no such file"),
        ("[there](../../..)", "link to '../../..' leaves the repository"),
        ("![there](nowhere.png)", "link to 'nowhere.png': no such file"),
        ("# Here\n[there](#else)", "link to '#else': no heading with that anchor"),
        ("see `structprune/nowhere.py`", "path 'structprune/nowhere.py': no such file"),
        ("set `calibration.window`", "key 'calibration.window': not a configuration key"),
        ("set `masking.nn=2:4`", "key 'masking.nn': not a configuration key"),
        ("set `sink.policy=some`", "key 'sink.policy=some': config key sink.policy = 'some': "),
        ("see `structprune trim`", "'structprune trim': no verb 'trim'"),
        ("see `structprune eval --texts FILE`", "'structprune eval --texts FILE': no option '--texts'"),
        ("see `python -m scripts.studies.none`", "'python -m scripts.studies.none': no module 'scripts.studies.none'"),
        ("see `python -m scripts.none.none`", "'python -m scripts.none.none': no module 'scripts.none.none'"),
        ("see `one\nline`", "inline code runs over the end of the line 'see `one'"),
        ("```bash\nstructprune trim model\n```", "'structprune trim model': no verb 'trim'"),
        ("```bash\nstructprune prune model\n```", "'structprune prune model': Missing option '--out'"),
        ("```bash\nstructprune inspect m --ratio \\\n    half\n```", "'structprune inspect m --ratio half': "),
        ("```bash\nstructprune eval m --set model.dtyp=float16\n```", "unknown config key 'model.dtyp'"),
        ("```bash\nstructprune prune m --out o --config configs/none.yaml\n```", "no config file at '"),
        ("```bash\naccelerate launch -m structprune evil m\n```", "'structprune evil m': no verb 'evil'"),
        ("```bash\ncd x && .venv/bin/structprune dema\n```", "'structprune dema': no verb 'dema'"),
        ("```bash\npython -m scripts.bench.bench_widths --no\n```", "--no': no option '--no'"),
        ("```bash\npython -m structprune.nowhere\n```", "no module 'structprune.nowhere'"),
        ("```python\nmodel = (\n```", "Python block, line 1: "),
        ("```python\nfrom structprune.masking import Mask\n```", "no 'structprune.masking.Mask'"),
        ("```python\nfrom structprune.nowhere import Masks\n```", "no 'structprune.nowhere"),
        ("```python\nimport structprune\nstructprune.Config.read('x')\n```", "no 'structprune.Config.read'"),
    ],
)
def test_a_page_that_is_wrong_is_told_so(tmp_path, text, problem):
    result = page(tmp_path, text)
    assert len(result) == (2 if "\nline" in text else 1) and problem in result[0]


def test_a_page_that_is_right_is_not(tmp_path):
    (tmp_path / "other.md").write_text("## Two words: `code`\n## Again\n## Again\n```bash\n# no heading\n```\n")
    text = (
        "# Here, there\n[a](#here-there) [b](other.md#two-words-code) [c](other.md#again-1) [d](https://nowhere.zz)\n"
        "`calibration.safetensors` `structured.split=0` `masking.nm=2:4` `configs/eval/*.yaml` `model.a.weight`\n"
        "`structprune --version` `structprune bench --cache` `python -m scripts.bench.bench_widths --hidden 8`\n"
        "```bash\nstructprune --help\nls && structprune prune m --out o --nm 2:4 --method nm  # a comment\n```\n"
        "```python\nimport structprune\nfrom structprune.masking import Masks\nstructprune.Config.load('x')\n```\n"
    )
    assert page(tmp_path, text) == []
    assert page_checks.anchors((tmp_path / "other.md").read_text()) == {"two-words-code", "again", "again-1"}
