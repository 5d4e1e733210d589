"""From settings to a calibration set, through every kind of source, with a tokenizer made here."""

import json
from importlib.resources import files

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from structprune.calibration.batches import Calibration
from structprune.calibration.build import SURPLUS, check_source, held_out_noise, load_calibration
from structprune.config import CalibrationSettings
from structprune.errors import UserError
from structprune.models.loading import load_model

MASK = 60
WORDS = [f"w{number}" for number in range(50)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w0 is 0, w1 is 1, ..., and the marks of two roles."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<user>", "<bot>", "<unk>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    made.chat_template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    return made


def words(count: int, seed: int = 0) -> list[str]:
    numbers = torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed))
    return [WORDS[number] for number in numbers.tolist()]


def settings(source, **changes) -> CalibrationSettings:
    return CalibrationSettings(**({"source": str(source), "windows": 6, "held_out": 2, "length": 16} | changes))


def build(chosen, tokenizer, schedule="levels", edges_visible=False, **options):
    return load_calibration(chosen, tokenizer, mask_id=MASK, schedule=schedule, edges_visible=edges_visible, **options)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    rows = words(2000)
    path.write_text("".join(" ".join(rows[start : start + 10]) + "\n" for start in range(0, 2000, 10)))
    return path


def runs_of(corpus: list[int], windows: torch.Tensor) -> bool:
    joined = ",".join(map(str, corpus)) + ","
    return all("," + ",".join(map(str, window)) + "," in "," + joined for window in windows.tolist())


def test_from_a_text_file(text_file, tokenizer):
    made = build(settings(text_file), tokenizer)
    assert made.input_ids.shape == (8, 16) and made.noisy_ids.shape == (8, 10, 16) and made.held_out == 2
    assert (made.fit.windows, made.check.windows) == (6, 2)
    assert runs_of([int(word[1:]) for word in words(2000)], made.input_ids)
    changed = made.noisy_ids != made.input_ids[:, None]
    assert (made.noisy_ids[changed] == MASK).all() and made.noisy_ids[:, -1].eq(MASK).all()
    torch.testing.assert_close(made.mask_probability[0, 4].item(), 0.5005, rtol=0, atol=1e-6)
    expected = {
        "schedule": "levels", "noise_levels": "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", "mask_id": "60", "seed": "0",
        "source": str(text_file), "subset": "", "split": "train", "steps": "50", "interval": "5", "copies": "10",
        "edges_visible": "false", "corpus_tokens": "2000",
    }  # fmt: skip
    assert made.metadata == expected


def test_seeds_and_streams(text_file, tokenizer):
    one, two, other = (build(settings(text_file, seed=seed), tokenizer) for seed in (3, 3, 4))
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.noisy_ids, two.noisy_ids)
    assert not torch.equal(one.input_ids, other.input_ids)
    masked, others = (made.noisy_ids == MASK for made in (one, other))
    assert not torch.equal(masked, others)
    finer = build(settings(text_file, seed=3, interval=1), tokenizer)
    assert torch.equal(finer.input_ids, one.input_ids) and finer.levels == 50  # noise does not move the windows


def test_dream_noise_is_stratified_over_fit_and_held_out_windows(text_file, tokenizer):
    made = build(settings(text_file, windows=8, held_out=4), tokenizer, schedule="uniform", edges_visible=True)
    for part, count in ((made.fit, 8), (made.check, 4)):
        t = (part.mask_probability.double() - 1e-3) / 0.999
        for copy in t.T:
            assert sorted((copy * count + 1e-6).long().tolist()) == list(range(count))
    assert torch.equal(made.noisy_ids[..., 0], made.input_ids[:, None, 0].expand(-1, 10))
    assert torch.equal(made.noisy_ids[..., -1], made.input_ids[:, None, -1].expand(-1, 10))
    assert made.metadata["noise_levels"] == "uniform x 10" and made.metadata["edges_visible"] == "true"


@pytest.mark.parametrize(("schedule", "noted"), [("levels", "0.2,0.4,0.6,0.8,1"), ("uniform", "uniform x 2")])
def test_fewer_copies_are_dealt_over_fit_and_held_out_windows(text_file, tokenizer, tmp_path, schedule, noted):
    chosen = settings(text_file, windows=10, held_out=5, interval=10, copies=2)
    made = build(chosen, tokenizer, schedule)
    assert made.noisy_ids.shape == (15, 2, 16) and made.mask_probability.shape == (15, 2) and made.levels == 2
    for part, count in ((made.fit, 10), (made.check, 5)):
        t = (part.mask_probability.double() - 1e-3) / 0.999  # (n, c)
        cells = 5 if schedule == "levels" else 2 * count  # t = 0.2, ..., 1 are the levels
        cell = (t * cells + (1e-4 - 1 if schedule == "levels" else 1e-6)).long()
        assert sorted(cell.flatten().tolist()) == sorted([*range(cells)] * (2 * count // cells))
    changed = made.noisy_ids != made.input_ids[:, None]
    assert (made.noisy_ids[changed] == MASK).all()
    assert (made.metadata["copies"], made.metadata["noise_levels"], made.check_samples) == ("2", noted, 5)
    path = tmp_path / "calibration.safetensors"
    made.save(path)
    again = build(settings(path, held_out=5), None, schedule)
    for name in ("input_ids", "noisy_ids", "mask_probability"):
        assert torch.equal(getattr(again, name), getattr(made, name))
    assert again.check_samples == 5 and again.metadata["copies"] == "2"
    # the same text whatever the copies, and every level where all are asked for
    assert torch.equal(build(settings(text_file, windows=10, held_out=5), tokenizer).input_ids, made.input_ids)


def test_as_many_copies_as_levels(text_file, tokenizer):
    every = build(settings(text_file, interval=25, copies=2, held_out=0), tokenizer)
    assert torch.equal(every.mask_probability, build(settings(text_file, interval=25), tokenizer).fit.mask_probability)
    with pytest.raises(UserError, match="^calibration.copies = 3 exceeds the number of noise levels, 2: lower it"):
        build(settings(text_file, interval=25, copies=3), tokenizer)


@pytest.mark.parametrize("copies", [None, 1])
@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_the_final_check_has_a_copy_for_every_level(text_file, tokenizer, shared_checkpoint, kind, copies):
    model = load_model(shared_checkpoint(kind))
    changes = {"interval": 10} if copies is None else {"interval": 10, "copies": copies}
    calibration = build(settings(text_file, **changes), tokenizer)
    assert calibration.levels == (copies or 5)
    ids, noisy, p = held_out_noise(calibration, model, seed=0)
    assert torch.equal(ids, calibration.check.input_ids) and noisy.shape == (2, 5, 16) and p.shape == (2, 5)
    plain = Calibration(calibration.input_ids, calibration.noisy_ids, None, {}, held_out=2)
    assert held_out_noise(plain, model, seed=0)[1].shape == (2, copies or 5, 16)  # of a file that says nothing


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_go_through_the_chat_template(tmp_path, tokenizer, kind):
    turns = [
        [{"role": "user", "content": f"w{n} w1"}, {"role": "bot", "content": f"w2 w{n}"}] for n in range(3, 43)
    ]  # fmt: skip
    path = tmp_path / f"chats.{kind}"
    rows = [{"messages": turn} for turn in turns]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    made = build(settings(path), tokenizer)
    corpus = [token for n in range(3, 43) for token in (50, n, 1, 51, 2, n)]
    assert made.metadata["corpus_tokens"] == "240" and runs_of(corpus, made.input_ids)


def test_a_streamed_dataset_is_read_no_further_than_a_surplus(tokenizer, monkeypatch):
    read = []

    def long(**request):
        while len(read) < 300:
            read.append(1)
            yield {"text": " ".join(words(5000, seed=len(read)))}

    monkeypatch.setattr(datasets, "load_dataset", long)
    made = build(settings("c4", windows=500, held_out=100, length=64), tokenizer)
    needed = 600 * 64
    assert made.metadata["corpus_tokens"] == str(SURPLUS * needed)
    assert SURPLUS * needed <= 5000 * len(read) < SURPLUS * needed + 200_000


def test_wikitext_lines_are_joined_by_a_space(tokenizer, monkeypatch):
    lines = [f" {' '.join(words(7, seed))} \n" for seed in range(40)]
    monkeypatch.setattr(datasets, "load_dataset", lambda **request: [{"text": line} for line in lines])
    made = build(settings("wikitext2"), tokenizer)
    assert made.metadata["corpus_tokens"] == "280" and runs_of(tokenizer(" ".join(lines))["input_ids"], made.input_ids)


@pytest.mark.parametrize("probability", [True, False])
def test_replay(text_file, tmp_path, tokenizer, probability):
    made = build(settings(text_file), tokenizer)
    path = tmp_path / "calibration.safetensors"
    if probability:
        made.save(path)
    else:
        save_file({"input_ids": made.input_ids, "noisy_ids": made.noisy_ids}, path)
    # 16 is the default, which a file's own number goes before
    asked = 16 if probability else 1
    again = build(settings(path, held_out=asked, windows=99, seed=5), None, schedule="uniform")
    assert torch.equal(again.input_ids, made.input_ids) and torch.equal(again.noisy_ids, made.noisy_ids)
    assert again.held_out == (2 if probability else 1)
    assert again.mask_probability is None or torch.equal(again.mask_probability, made.mask_probability)
    assert (again.mask_probability is None) != probability


def test_refusals(text_file, tmp_path, tokenizer):
    with pytest.raises(
        UserError, match="has token id 49, but the model embeds 49 tokens: this tokenizer is not the model's$"
    ):
        build(settings(text_file, windows=100, held_out=10), tokenizer, vocabulary=49)
    assert build(settings(text_file, windows=100, held_out=10), tokenizer, vocabulary=50).windows == 110
    with pytest.raises(UserError, match="has 125 windows of 16 tokens, fewer than the 126 asked for"):
        build(settings(text_file, windows=124), tokenizer)
    with pytest.raises(
        UserError, match="^the calibration text has 2,000 tokens, less than one window of calibration.length = 2048"
    ):
        build(settings(text_file, length=2048), tokenizer)
    with pytest.raises(UserError, match="^the checkpoint has no tokenizer"):
        build(settings(text_file), None)
    with pytest.raises(UserError, match="^calibration.length = 2 leaves no token to mask between the visible edges"):
        build(settings(text_file, length=2), tokenizer, edges_visible=True)
    with pytest.raises(UserError, match="^calibration.interval = 51 leaves no noise level"):
        build(settings(text_file, interval=51), tokenizer)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="empty.txt' is empty$"):
        build(settings(tmp_path / "empty.txt"), tokenizer)


def test_replay_refusals(text_file, tmp_path, tokenizer):
    path = tmp_path / "calibration.safetensors"
    made = build(settings(text_file), tokenizer)
    save_file({"input_ids": made.input_ids, "noisy_ids": made.noisy_ids}, path)
    with pytest.raises(
        UserError, match="8 windows and 8 are to be held out, which leaves none to fit on: lower calibration.held_out$"
    ):
        build(settings(path, held_out=8), None)
    with pytest.raises(UserError, match=f"has token id {made.input_ids.max()}, but the model embeds 10 tokens"):
        build(settings(path), None, vocabulary=10)
    with pytest.raises(UserError, match="^no calibration file at"):
        build(settings(tmp_path / "none.safetensors"), None)


def test_another_number_held_out_than_the_file_records_is_refused(text_file, tmp_path, tokenizer):
    path = tmp_path / "calibration.safetensors"
    build(settings(text_file), tokenizer).save(path)
    assert build(settings(path, held_out=2), None).held_out == 2
    for asked in (0, 1, 3):
        with pytest.raises(UserError, match=f"^calibration.held_out = {asked} has no effect: .* set it to 2$"):
            build(settings(path, held_out=asked), None)


def test_a_seed_that_draws_nothing_is_refused(text_file, tmp_path, tokenizer):
    """Of a replay the seed draws only the noise of held-out windows."""
    with_check, without = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    build(settings(text_file), tokenizer).save(with_check)
    build(settings(text_file, held_out=0), tokenizer).save(without)
    assert build(settings(with_check, seed=1), None).held_out == 2
    assert build(settings(without, held_out=0), None).held_out == 0
    with pytest.raises(UserError, match="^calibration.seed = 1 has no effect: .* and no window is held out"):
        build(settings(without, held_out=0, seed=1), None)


def test_a_source_is_checked_by_itself(text_file, tmp_path, tokenizer):
    """A saved calibration whole, of text the tokenizer only: it may be far away."""
    path = tmp_path / "calibration.safetensors"
    build(settings(text_file), tokenizer).save(path)
    check_source(settings(path), tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        check_source(settings(path), tmp_path)
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        check_source(settings(tmp_path / "gone.txt"), tmp_path)
    tokenizer.save_pretrained(tmp_path)
    check_source(settings(tmp_path / "gone.txt"), tmp_path)


def test_the_embedded_texts_do_not_overlap():
    folder = files("structprune.assets") / "text"
    names = ("calibration.txt", "heldout.txt")
    calibration, held_out = ((folder / name).read_text(encoding="utf-8") for name in names)
    assert 380_000 < len(calibration.encode()) <= 400_000 and len(held_out.encode()) == 367_150
    assert calibration.endswith("\n") and not set(calibration.splitlines()) & set(held_out.splitlines())
