"""What a run refuses before weights are read: a disk too full for all that goes to it together."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from structprune.bench.work_size import structured_work_bytes
from structprune.checkpoint import output
from structprune.checkpoint.output import Room, check_rooms
from structprune.config import Config, ModelSettings
from structprune.errors import UserError
from structprune.levels.cost import search_cost
from structprune.runs import rooms as module
from structprune.runs.budget import predicted_memory
from structprune.runs.checks import checked_prune
from structprune.runs.ghost import read_ghost
from structprune.runs.resolve import at_ratio, with_ratio
from structprune.runs.rooms import check_room
from structprune.runs.work import Work
from structprune.structured.plan import identity_plan
from structprune.workers import Workers

SMALL = {
    "calibration.windows": 6, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
    "structured.ratio": 0.4,
}  # fmt: skip
SEARCH = {"search.enabled": True, "search.rounds": 2}


@pytest.fixture
def rooms(monkeypatch):
    """What disks are asked for, by its place."""
    asked: dict = {}
    monkeypatch.setattr(module, "check_rooms", lambda rooms: asked.update({room.path: room.needed for room in rooms}))
    return asked


def config_of(text_path, **keys):
    return Config.load(overrides=SMALL | {"calibration.source": str(text_path)} | keys)


def test_what_lies_on_one_disk_is_added_up(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 10**9))
    rooms = [
        Room(tmp_path / "out", 6 * 10**9),
        Room(tmp_path / "work", 3 * 10**9, "finished parts in", "lower windows = 9"),
    ]
    check_rooms(rooms)
    check_rooms([*rooms, Room(tmp_path / "levels", -5, "levels in")])  # more than that is there already
    with pytest.raises(UserError) as refused:
        check_rooms([*rooms, Room(tmp_path, 2 * 10**9, "temporary files in")])
    assert str(refused.value) == (
        f"output '{tmp_path / 'out'}' (6.00 GB), finished parts in '{tmp_path / 'work'}' (3.00 GB) and temporary files"
        f" in '{tmp_path}' (2.00 GB) need 11.00 GB of one disk together, but 10.00 GB are free there: free some space,"
        " lower windows = 9, or choose another place"
    )


def test_disks_are_apart(tmp_path, monkeypatch):
    """Each has room for its own."""
    free = {"one": 5 * 10**9, "two": 7 * 10**9}
    for name in free:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(output, "_disk", lambda path: list(free).index(path.parent.name))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path.name]))
    check_rooms([Room(tmp_path / "one" / "out", 4 * 10**9), Room(tmp_path / "two" / "work", 6 * 10**9)])
    with pytest.raises(UserError, match=r"two/work' needs 8.00 GB, but 7.00 GB are free there"):
        check_rooms([Room(tmp_path / "one" / "out", 4 * 10**9), Room(tmp_path / "two" / "work", 8 * 10**9)])


def test_a_run_asks_for_outputs_parts_and_temporary_files(tiny_checkpoint, text_path, tmp_path, rooms):
    source, out, work = str(tiny_checkpoint()), tmp_path / "out", Work(tmp_path / "parts")
    config = config_of(text_path, **{"memory.budget_gb": 1e-6})
    request = checked_prune(source, {None: out}, config, work=work)
    ghost = read_ghost(source, ModelSettings())
    gone = int(0.4 * sum(size.total for size in request.sizes))
    assert rooms[out] == ghost.stored_bytes - 4 * gone
    assert rooms[work.directory] == structured_work_bytes(ghost.adapter, [request], 4)
    files = predicted_memory(request, ghost.model, ghost.stored)["temporary files"]
    hidden = 2 * 4 * 32 * 16 * (6 * request.calibration.noisy_copies + 2 * request.calibration.noisy_copies)
    assert rooms[Path(tempfile.gettempdir())] == files == hidden  # of two streams, width 32


def test_levels_of_a_search_are_asked_for_where_they_lie(tiny_checkpoint, text_path, tmp_path, rooms):
    """A library that both ratios share, and one of its own for each."""
    source, outputs = str(tiny_checkpoint()), {0.3: tmp_path / "a" / "x", 0.5: tmp_path / "a" / "y"}
    config = config_of(text_path, **SEARCH)
    request = checked_prune(source, outputs, config, work=Work(tmp_path / "parts", tmp_path / "levels"))
    ghost = read_ghost(source, ModelSettings())
    one, other = (search_cost(ghost.adapter, at_ratio(request, ratio), 4).disk // 2 for ratio in outputs)
    apart = dict(rooms)
    assert apart[tmp_path / "levels"] == one + (one + other) > 0
    checked_prune(source, outputs, config, work=Work(tmp_path / "parts"))
    assert rooms[tmp_path / "parts"] == apart[tmp_path / "parts"] + apart[tmp_path / "levels"]


def test_changed_weights_from_disk_are_parts_or_temporary_files(
    tiny_checkpoint, text_path, tmp_path, rooms, monkeypatch
):
    source = str(tiny_checkpoint(torch_dtype="bfloat16"))
    keys = {"method": "unstructured", "masking.score": "wanda", "reconstruct.enabled": False, "memory.offload": "disk"}
    sizes = {key: value for key, value in SMALL.items() if not key.startswith("structured.")}
    config = Config.load(overrides=sizes | {"calibration.source": str(text_path)} | keys)
    ghost, temporary = read_ghost(source, ModelSettings()), Path(tempfile.gettempdir())
    weights = sum(block[role].weight.numel() for block in ghost.adapter.blocks for role in block.names)
    request = checked_prune(source, {None: tmp_path / "out"}, config)
    assert request.resources.on_disk and rooms[temporary] == 2 * weights
    assert rooms[tmp_path / "out"] == ghost.stored_bytes + weights // 8
    rooms.clear()
    checked_prune(source, {None: tmp_path / "out"}, config, work=Work(tmp_path / "parts"))
    assert temporary not in rooms and rooms[tmp_path / "parts"] == 2 * weights + weights // 8
    monkeypatch.setattr(module, "processes_here", lambda: 3)  # each has its own
    work = Work(tmp_path / "parts", workers=Workers(0, 3))
    check_room(ghost, request, {None: tmp_path / "out"}, work)
    assert rooms[temporary] == 3 * 2 * weights


def test_a_mount_point_is_its_own_disk(tmp_path, monkeypatch):
    """A directory that exists counts itself, not its parent."""
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=10))
    check_rooms([Room(tmp_path, 5), Room(tmp_path / "new" / "out", 5)])
    assert asked == [tmp_path]
    with pytest.raises(UserError, match="needs 0.00 GB, but 0.00 GB are free there: free some space, set X, or choose"):
        check_rooms([Room(tmp_path, 11, remedy="set X")])


def test_no_place_for_temporary_files_is_said_where_some_are_written(tiny_checkpoint, text_path, tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(module, "gettempdir", nowhere)
    source, outputs = str(tiny_checkpoint()), {None: tmp_path / "out"}
    checked_prune(source, outputs, config_of(text_path))  # writes none
    with pytest.raises(UserError, match="temporary files cannot be written anywhere: set TMPDIR to a directory"):
        checked_prune(source, outputs, config_of(text_path, **{"memory.budget_gb": 1e-6}))


def test_a_plan_asks_for_room_as_if_nothing_were_cut(tiny_checkpoint, text_path, tmp_path, rooms):
    source, config = str(tiny_checkpoint()), config_of(text_path, **{"memory.budget_gb": 1e-6})
    ghost = read_ghost(source, ModelSettings())
    plan = identity_plan(ghost.adapter)
    request = checked_prune(source, {None: tmp_path / "out"}, config, plan=plan, work=Work(tmp_path / "parts"))
    assert rooms[tmp_path / "out"] == ghost.stored_bytes
    whole = structured_work_bytes(ghost.adapter, [with_ratio(request, 0.0)], 4)
    assert rooms[tmp_path / "parts"] == whole > structured_work_bytes(ghost.adapter, [request], 4)
    assert rooms[Path(tempfile.gettempdir())] > 0
