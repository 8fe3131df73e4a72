import os
from pathlib import Path

import pytest

from sa_engine.plan import (
    FoundImage,
    default_shard_size,
    list_images,
    make_shards,
    read_plan,
    write_plan,
)
from sa_engine.storage import RunError


def keys(root: Path, **options: Path) -> list[str]:
    return [image.key for image in list_images(root, **options)[0]]


def test_images_are_found_in_subfolders_and_sorted_and_the_rest_is_counted(
    photo_folder: Path,
) -> None:
    (photo_folder / "notes.TXT").touch()
    (photo_folder / "README").touch()
    (photo_folder / ".hidden.jpg").touch()
    (photo_folder / ".cache").mkdir()
    (photo_folder / ".cache" / "thumb.jpg").touch()
    (photo_folder / "more" / "Z.JPG").write_bytes(b"")
    images, ignored = list_images(photo_folder)
    assert [image.key for image in images] == [
        "astronaut.jpg",
        "chelsea.jpg",
        "coffee.jpg",
        "more/Z.JPG",
        "more/rocket.jpg",
    ]
    assert ignored == {".txt": 1, "no suffix": 1, "hidden": 2}
    status = (photo_folder / "coffee.jpg").stat()
    assert images[2] == FoundImage("coffee.jpg", status.st_size, status.st_mtime_ns)


def test_links_are_followed_but_never_in_circles(photo_folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").touch()
    (elsewhere / "back").symlink_to(photo_folder)
    (photo_folder / "link").symlink_to(elsewhere)
    (photo_folder / "more" / "up").symlink_to("..")
    assert keys(photo_folder) == [
        "astronaut.jpg",
        "chelsea.jpg",
        "coffee.jpg",
        "link/x.png",
        "more/rocket.jpg",
    ]


def test_the_output_is_no_input(photo_folder: Path) -> None:
    assert "more/rocket.jpg" in keys(photo_folder)
    assert "more/rocket.jpg" not in keys(photo_folder, exclude=photo_folder / "more")


def test_odd_names_and_broken_links_are_planned_or_counted(tmp_path: Path) -> None:
    names = ["a b.jpg", 'it\'s "x".jpg', "line\nbreak.jpg", "фото.jpg", "写真.jpg"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).touch()
    images, ignored = list_images(tmp_path)
    assert {image.key for image in images} == {*names, "gone.jpg"}
    assert ignored == {"name is not UTF-8": 1}
    plan = tmp_path / "plan.parquet"
    write_plan(plan, make_shards(images, 4), tmp_path)
    assert [image.key for shard in read_plan(plan) for image in shard.images] == sorted(
        [*names, "gone.jpg"]
    )


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="missing does not exist"):
        list_images(tmp_path / "missing")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match="notes.txt is not a folder"):
        list_images(tmp_path / "notes.txt")
    with pytest.raises(RunError, match=r"no image in .*: 1 other.*\.jpg"):
        list_images(tmp_path)


def test_the_plan_comes_back(tmp_path: Path) -> None:
    images = [FoundImage(f"{number:02}.jpg", number, number + 10**18) for number in range(7)]
    shards = make_shards(images, 3)
    assert [shard.name for shard in shards] == ["sa_000000", "sa_000001", "sa_000002"]
    assert [image.image_id for shard in shards for image in shard.images] == list(range(1, 8))
    write_plan(tmp_path / "plan.parquet", shards, tmp_path)
    assert read_plan(tmp_path / "plan.parquet") == shards


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
