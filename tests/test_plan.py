from pathlib import Path

import pyarrow as pa
import pytest

from sa_engine.listing import COLUMNS
from sa_engine.plan import (
    Plan,
    PlannedImage,
    default_shard_size,
    make_plan,
    new_images,
    read_plan,
    refresh,
    write_plan,
)
from sa_engine.storage import RunError


def found(names: range) -> pa.Table:
    rows = [{"key": f"{n:03}.jpg", "size": n, "mtime_ns": n + 10**18} for n in names]
    return pa.Table.from_pylist(rows, schema=pa.schema(COLUMNS))


def numbers(plan: Plan) -> list[list[int]]:
    return [[image.image_id for image in shard.images] for shard in plan]


@pytest.mark.parametrize("row_group", [1 << 16, 1, 2, 3, 5])
def test_the_plan_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group: int
) -> None:
    """However its rows are grouped in the file, and in whatever order shards are asked for."""
    monkeypatch.setattr("sa_engine.plan._ROW_GROUP", row_group)
    write_plan(tmp_path / "plan.parquet", make_plan(found(range(7)), 3), tmp_path)
    plan = read_plan(tmp_path / "plan.parquet")
    assert [shard.name for shard in plan] == ["sa_000000", "sa_000001", "sa_000002"]
    assert numbers(plan) == [[1, 2, 3], [4, 5, 6], [7]]
    assert plan[1].images[0] == PlannedImage(4, "003.jpg", 3, 10**18 + 3)
    assert [plan[index].index for index in (2, 0, 1)] == [2, 0, 1]
    assert (len(plan), plan.images, plan.count([0, 2])) == (3, 7, 4)
    assert plan.sizes([2, 0]).tolist() == [0, 1, 2, 6]
    assert [plan.shard_of(image_id) for image_id in (0, 1, 3, 4, 7, 8)] == [None, 0, 0, 1, 2, None]
    with pytest.raises(IndexError):
        plan[3]


@pytest.mark.parametrize(("limit", "shards"), [(1, 1), (3, 1), (4, 2), (7, 3), (99, 3), (None, 3)])
def test_a_limit_takes_whole_shards(limit: int | None, shards: int) -> None:
    assert Plan(make_plan(found(range(7)), 3)).select(limit) == range(shards)


def test_more_images_get_new_ids_in_new_shards() -> None:
    before = Plan(make_plan(found(range(7)), 3))
    new = new_images(found(range(5, 12)), before)
    assert new.column("key").to_pylist() == [f"{n:03}.jpg" for n in range(7, 12)]
    after = Plan(make_plan(new, 3, before))
    assert [after[index] for index in range(3)] == list(before)
    assert numbers(after)[3:] == [[8, 9, 10], [11, 12]]
    assert new_images(found(range(12)), after).num_rows == 0


def test_refreshed_images_keep_their_places() -> None:
    plan = Plan(refresh(Plan(make_plan(found(range(7)), 3)), {4: (50, 60), 7: (-1, -1)}))
    assert plan[1].images[0] == PlannedImage(4, "003.jpg", 50, 60)
    assert plan[2].images[0] == PlannedImage(7, "006.jpg", -1, -1)
    assert plan[0] == Plan(make_plan(found(range(7)), 3))[0]


def test_a_missing_or_damaged_plan_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.parquet"
    with pytest.raises(RunError, match=r"no run there: .*plan\.parquet"):
        read_plan(path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(RunError, match=r"cannot read the plan .*plan\.parquet"):
        read_plan(path)


@pytest.mark.parametrize(
    ("images", "size"), [(1, 1), (32, 1), (33, 2), (320, 10), (4096, 128), (10**6, 128)]
)
def test_small_jobs_still_spread_over_workers(images: int, size: int) -> None:
    assert default_shard_size(images) == size


def test_a_flipped_bit_never_makes_another_plan() -> None:
    """A bit of every byte of a plan's file: it is told, or it is none that matters."""
    content = make_plan(found(range(40)), 3)
    expected = list(Plan(content))
    told = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        try:
            assert list(Plan(bytes(damaged))) == expected, f"byte {position}"
        except RunError:
            told += 1
    assert told > len(content) / 2
