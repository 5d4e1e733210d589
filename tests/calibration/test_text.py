"""Sources of text: local files of every kind, Hub datasets through a stand-in for the Hub, and their errors."""

import json
import re
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from structprune.calibration.text import is_streamed, join_texts, read_texts, render
from structprune.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path, rows) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


class Templated:
    chat_template = "some"

    def apply_chat_template(self, messages, tokenize, **options):
        assert tokenize is False
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)


def test_txt_keeps_every_character(tmp_path):
    text = "One line\r\n\n  Ünïcode \u2028 same line\nlast without end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    lines = list(read_texts(str(tmp_path / "a.txt")))
    assert lines == ["One line\r\n", "\n", "  Ünïcode \u2028 same line\n", "last without end"]
    assert "".join(join_texts(lines, "a.txt", None)) == text


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_columns(tmp_path, write):
    rows = [{"text": "a", "body": "x", "n": 1}, {"text": "b", "body": "y", "n": 2}]
    source = write(tmp_path / f"a.{write.__name__}", rows)
    assert list(read_texts(source)) == ["a", "b"]
    assert list(read_texts(source, column="body")) == ["x", "y"]
    with pytest.raises(UserError, match=r"has no column 'txt' in row 1 \(did you mean 'text'\?\)$"):
        list(read_texts(source, column="txt"))
    with pytest.raises(
        UserError, match="row 1, column 'n' is neither text nor a conversation \\(int\\): set calibration.column$"
    ):
        list(read_texts(source, column="n"))
    rows = [{"text": "plain", "messages": CHAT}, {"text": "x", "messages": CHAT[:1]}]
    chats = write(tmp_path / f"b.{write.__name__}", rows)
    assert list(read_texts(chats)) == [CHAT, CHAT[:1]]  # messages go before text
    assert list(read_texts(chats, column="text")) == ["plain", "x"]
    neither = write(tmp_path / f"c.{write.__name__}", [{"question": "q"}])
    with pytest.raises(UserError, match="has no column 'text' in row 1: it has question; set calibration.column$"):
        list(read_texts(neither))


def test_jsonl_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": null}\n{"text": "b"}\n')
    assert list(read_texts(str(path))) == ["a", "b"]
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match="a.jsonl, line 2 is not valid JSON"):
        list(read_texts(str(path)))
    path.write_text('["a"]\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 1 holds \['a'\], not an object with a text column"):
        list(read_texts(str(path)))
    jsonl(path, [{"messages": [{"from": "human", "value": "Hi"}]}])
    with pytest.raises(
        UserError, match=r"row 1, column 'messages' is .*\(a list without role and content in every turn\)"
    ):
        list(read_texts(str(path)))


def test_conversations_go_through_the_template_and_documents_get_separators():
    assert render(CHAT, Templated()) == "<user>Hi<assistant>Ho"
    assert "".join(join_texts([CHAT, CHAT], "a.jsonl", Templated())) == "<user>Hi<assistant>Ho" * 2
    assert "".join(join_texts(["a", "b", "c"], "a.jsonl", None)) == "a\nb\nc"
    assert "".join(join_texts([" = A = \n", "", "b"], "wikitext2", None)) == " = A = \n  b"
    with pytest.raises(UserError, match="tokenizer has no chat template: set calibration.column$"):
        render(CHAT, object())
    with pytest.raises(UserError, match="chat template refuses a conversation .*'content'"):
        render([{"role": "user"}], Templated())
    with pytest.raises(UserError, match="^calibration text 'a.txt' is empty$"):
        list(join_texts([], "a.txt", None))


def test_bad_local_sources(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "bytes.txt").write_bytes(b"good\n\xff\xfe")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet at all")
    good = tmp_path / "good.txt"
    good.write_text("a\n")
    expected = {
        str(tmp_path / "none.txt"): "^no calibration text at '.*none.txt'$",
        str(tmp_path / "a.csv"): "is not one of .txt, .jsonl, .parquet: convert it, or name a Hub dataset$",
        str(tmp_path): "is not one of .txt, .jsonl, .parquet",
        str(tmp_path / "bytes.txt"): "bytes.txt is not UTF-8 text .* at byte 5",
        str(tmp_path / "bad.parquet"): "bad.parquet cannot be read as parquet",
    }
    for source, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            list(read_texts(source))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="calibration.column = 'text' means nothing"):
        list(read_texts(str(good), column="text"))
    with pytest.raises(UserError, match="calibration.subset = 'en' means nothing"):
        list(read_texts(str(good), subset="en"))
    with pytest.raises(UserError, match="calibration.split = 'validation' means nothing"):
        list(read_texts(str(good), split="validation"))


def test_libraries_that_are_not_installed(tmp_path, monkeypatch):
    source = parquet(tmp_path / "a.parquet", [{"text": "a"}])
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="a.parquet needs pyarrow: pip install pyarrow, or give a .txt or .jsonl file$"):
        list(read_texts(source))
    with pytest.raises(
        UserError, match="^calibration text 'wikitext2' is a Hub dataset, which needs datasets: pip install datasets"
    ):
        list(read_texts("wikitext2"))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for `datasets.load_dataset`: records what was asked and answers with the rows put into it."""

    class Hub:
        asked: dict = {}
        rows: list = [{"text": "first"}, {"text": "second"}]

        def __call__(self, **request):
            self.asked = request
            return iter(self.rows)

    stand_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    return stand_in


def test_hub_requests(hub):
    assert list(read_texts("wikitext2")) == ["first", "second"]
    wikitext = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train", "streaming": False}
    assert hub.asked == wikitext
    assert list(read_texts("c4", split="validation")) == ["first", "second"]
    shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    c4 = {"path": "allenai/c4", "name": None, "split": "validation", "streaming": True}
    assert hub.asked == c4 | {"data_files": shard}
    hub.rows = [{"messages": CHAT, "prompt": "p"}]
    assert list(read_texts("org/chats", subset="en", split="test")) == [CHAT]
    assert hub.asked == {"path": "org/chats", "name": "en", "split": "test", "streaming": True}
    assert list(read_texts("org/chats", column="prompt")) == ["p"]
    assert [is_streamed(source) for source in ("c4", "org/chats")] == [True, True]
    assert [is_streamed(source) for source in ("wikitext2", "a.txt", "b.parquet")] == [False, False, False]


def test_hub_failures(hub, monkeypatch):
    with pytest.raises(UserError, match="^calibration.split = 'dev': 'c4' has train, validation$"):
        list(read_texts("c4", split="dev"))
    with pytest.raises(
        UserError, match="calibration.subset = 'de': 'c4' is one part of allenai/c4; name that dataset instead$"
    ):
        list(read_texts("c4", subset="de"))
    hub.rows = []
    with pytest.raises(UserError, match="^the Hub dataset 'org/empty' has no rows in split 'train'$"):
        list(read_texts("org/empty"))

    def lost():
        yield {"text": "first"}
        raise ConnectionError("connection lost\nand a long trace")

    hub.rows = lost()
    texts = read_texts("org/big")
    assert next(texts) == "first"
    with pytest.raises(UserError, match=r"Hub dataset that can be read \(connection lost\): check calibration.source"):
        next(texts)

    def unreachable(**request):
        raise FileNotFoundError("Couldn't reach 'org/none' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"'org/none' is neither a local file nor a Hub dataset .*Couldn't reach"):
        list(read_texts("org/none"))


UNREADABLE = {
    "nesting": ('{"text": ' + "[" * 50_000 + "]" * 50_000 + "}", "line 2 is not valid JSON (nested too deeply)"),
    "digits": ('{"text": ' + "9" * 5000 + "}", "line 2 is not valid JSON (Exceeds the limit"),
    "half a pair": ('{"text": "a\\ud83d"}', "row 2, column 'text' holds \\ud83d, which is no character"),
    "half a pair in a turn": ('{"text": [{"role": "a", "content": "\\udc00"}]}', "'text' holds \\udc00, which is no"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_lines_that_no_tokenizer_could_read(tmp_path, name):
    line, said = UNREADABLE[name]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(said)):
        list(read_texts(str(tmp_path / "a.jsonl")))


def test_parquet_whose_text_is_not_utf8(tmp_path):
    raw = pyarrow.array([b"fine", b"\xff\xfe"], type=pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet cannot be read as parquet .*: write it anew"):
        list(read_texts(str(tmp_path / "a.parquet")))
