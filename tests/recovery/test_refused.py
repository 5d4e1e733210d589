"""The cache of a teacher's predictions, and what a recovery refuses before anything is written."""

import pytest

from structprune.errors import UserError
from structprune.recovery import cache as module
from structprune.recovery.sharded import check_apart, check_sharded, is_sharded
from structprune.runs.recover import recover


def test_models_that_do_not_belong_together_are_refused(pair, tiny_checkpoint, recover_config, tmp_path):
    _, small = pair()
    other, wide = tiny_checkpoint("dream"), tiny_checkpoint("llada", name="wide", embedding_size=2100)
    for teacher, reason in ((other, "family llada and the teacher 'dream-tiny' dream"), (wide, "vocabulary 2048 and")):
        with pytest.raises(UserError, match=reason):
            recover(str(small), str(teacher), tmp_path / "out", recover_config())
    assert not list(tmp_path.glob("out*"))


def test_a_batch_that_cannot_be_dealt_is_refused(pair, recover_config, tmp_path):
    dense, small = pair()
    with pytest.raises(UserError, match=r"train.batch = 10 windows .* train.pass_windows = 4: make it a multiple of 4"):
        recover(str(small), str(dense), tmp_path / "out", recover_config(train__batch=10))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_cache_of_the_teacher_is_written_once_and_replayed(pair, recover_config, tmp_path, monkeypatch):
    """With all tokens kept, the training is that beside a live teacher, up to rounding."""
    dense, small = pair()
    config, cache = (
        recover_config(teacher__top=2048, train__tokens=16 * 8 * 4, teacher__cache=str(tmp_path / "cache")),
        tmp_path / "cache",
    )
    live = recover(str(small), str(dense), tmp_path / "live", recover_config(train__tokens=16 * 8 * 4))
    cached = recover(str(small), str(dense), tmp_path / "cached", config)
    assert cached.report["after"]["kl"] == pytest.approx(live.report["after"]["kl"], rel=1e-3)
    files = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert set(files) == {"identity.json", "windows-00000000.npz"}
    monkeypatch.setattr("structprune.recovery.cache.reference_predictions", lambda *_: pytest.fail("predicted again"))
    again = recover(str(small), str(dense), tmp_path / "again", config)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == files
    assert again.report["after"] == cached.report["after"]


@pytest.mark.slow
def test_a_longer_training_completes_a_cache(pair, recover_config, tmp_path):
    dense, small = pair()
    cache = tmp_path / "cache"
    for steps in (2, 4):  # the text is short, so that both learn from the same windows
        config = recover_config(
            train__tokens=16 * 8 * steps,
            data__held_out=4,
            data__source=str(tmp_path / "short.txt"),
            teacher__cache=str(cache),
        )
        (tmp_path / "short.txt").write_text("One sentence of some length, for windows of tokens. " * 20)
        report = recover(str(small), str(dense), tmp_path / f"out-{steps}", config).report
        assert report["learnt"]["steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: b"", lambda data: b"no such file" * 9])
def test_a_damaged_file_of_a_cache_is_written_anew(pair, recover_config, tmp_path, monkeypatch, damage):
    dense, small = pair()
    config = recover_config(train__tokens=16 * 8 * 2, teacher__cache=str(tmp_path / "cache"))
    first = recover(str(small), str(dense), tmp_path / "first", config).report
    file = tmp_path / "cache" / "windows-00000000.npz"
    whole = file.read_bytes()
    module._chunk.cache_clear()
    file.write_bytes(damage(whole))
    assert recover(str(small), str(dense), tmp_path / "again", config).report["after"] == first["after"]
    assert file.read_bytes() == whole

    def damaged(*given):  # once it was complete
        module.write_cache(*given)
        module._chunk.cache_clear()
        file.write_bytes(damage(whole))

    with monkeypatch.context() as patch:
        patch.setattr("structprune.runs.training.write_cache", damaged)
        with pytest.raises(UserError, match=r"windows-00000000.npz', .* give the same command again"):
            recover(str(small), str(dense), tmp_path / "out", config)
    assert recover(str(small), str(dense), tmp_path / "out", config).report["after"] == first["after"]


@pytest.mark.parametrize("name", ["out", "out.training", "out/inside", "llada-small/cache", "file"])
def test_a_cache_in_a_place_of_something_else_is_refused(pair, recover_config, tmp_path, name):
    dense, small = pair()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="lie in each other|lies inside the input|is a file|holds the input"):
        recover(str(small), str(dense), tmp_path / "out", recover_config(teacher__cache=str(tmp_path / name)))
    assert not list(tmp_path.glob("out*")) and not (small / "cache").exists()


def test_a_cache_of_something_else_is_refused(pair, recover_config, tmp_path):
    dense, small = pair()
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no cache of predictions: set teacher.cache to an empty place"):
        recover(str(small), str(dense), tmp_path / "out", recover_config(teacher__cache=str(cache)))
    (cache / "notes.txt").rename(tmp_path / "notes.txt")
    (cache / "identity.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds predictions of another teacher, text or setting"):
        recover(str(small), str(dense), tmp_path / "out", recover_config(teacher__cache=str(cache)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "keys, cache, reason",
    [
        ({"loss__kl": 0}, False, "nothing would be learnt"),
        ({"loss__kl": 0, "loss__cross_entropy": 1}, True, "has no effect without loss.kl above 0"),
        ({"loss__temperature": 2}, True, "keeps predictions at temperature 1"),
        ({"teacher__top": 8}, False, "teacher.top = 8 has no effect without teacher.cache"),
        ({"teacher__offload": True}, False, "teacher.offload = true has no effect on a CPU"),
        ({"train__rank": 8}, False, "train.rank = 8 has no effect without train.method = lora"),
        ({"loss__least_rate": 0.1}, False, "loss.least_rate = 0.1 has no effect without loss.weighting = nelbo"),
        ({"loss__kl": 0, "loss__cross_entropy": 1, "loss__temperature": 2}, False, "without loss.kl above 0"),
        ({"train__tokens": 100}, False, "train.tokens = 100 is less than a step of .* = 128 tokens"),
        ({"train__report_to": "tensorbord"}, False, "unknown logger 'tensorbord' .did you mean 'tensorboard'"),
        ({"train__targets": "quary"}, False, "train.targets"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(pair, recover_config, tmp_path, keys, cache, reason):
    dense, small = pair()
    keys = keys | ({"teacher__cache": str(tmp_path / "cache")} if cache else {})
    with pytest.raises(UserError, match=reason):
        recover(str(small), str(dense), tmp_path / "out", recover_config(**keys))
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_an_int8_teacher_teaches_and_its_cache_is_its_own(pair, recover_config, tmp_path):
    dense, small = pair()
    plain, cache = tmp_path / "plain", tmp_path / "cache"
    first = recover(str(small), str(dense), plain, recover_config(train__tokens=16 * 8 * 4)).report
    config = recover_config(teacher__int8=True, teacher__cache=str(cache), train__tokens=16 * 8 * 4)
    report = recover(str(small), str(dense), tmp_path / "out", config).report
    assert report["config"]["teacher"]["int8"] and report["kept"] == "trained"
    assert report["before"]["kl"] != first["before"]["kl"]
    assert report["before"]["kl"] == pytest.approx(first["before"]["kl"], rel=0.05)
    assert report["after"]["kl"] < 0.99 * report["before"]["kl"]
    whole = recover_config(teacher__cache=str(cache), train__tokens=16 * 8 * 4)
    with pytest.raises(UserError, match="holds predictions of another teacher, text or setting"):
        recover(str(small), str(dense), tmp_path / "other", whole)


@pytest.mark.parametrize(
    "method, masked, environment, reason",
    [
        ("lora", False, {}, "which is little with train.method = lora: leave out --use_fsdp"),
        ("full", True, {}, "zeros of a masked checkpoint cannot be kept under FSDP: leave out --use_fsdp"),
        ("full", False, {"FSDP_VERSION": "1"}, "FSDP version 1 is not supported: launch with --fsdp_version 2"),
        ("full", False, {"FSDP_OFFLOAD_PARAMS": "true"}, "not supported: leave out --fsdp_offload_params"),
    ],
)
def test_what_cannot_be_sharded_is_refused(method, masked, environment, reason):
    with pytest.raises(UserError, match=reason):
        check_sharded(method, masked, 2, 8, environment)
    assert is_sharded({"ACCELERATE_USE_FSDP": "true"} | environment) and not is_sharded(environment)


def test_a_head_that_follows_the_embedding_is_not_sharded(tiny_model):
    with pytest.raises(UserError, match="this model's head follows its embedding: leave out --use_fsdp"):
        check_apart(tiny_model("a2d-qwen3"))
    check_apart(tiny_model("a2d-llama"))


def test_one_process_that_was_told_to_shard_is_refused(pair, recover_config, tmp_path, monkeypatch):
    dense, small = pair()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        UserError, match="nothing to share in one process: raise --num_processes, or leave out --use_fsdp"
    ):
        recover(str(small), str(dense), tmp_path / "out", recover_config())
    assert not list(tmp_path.glob("out*"))


def test_every_process_that_shares_needs_a_window():
    with pytest.raises(UserError, match="data.held_out = 3 leaves some of 4 processes .* raise it to 4"):
        check_sharded("full", False, 4, 3, {})
    check_sharded("full", False, 4, 4, {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"})  # enough
