import os
from pathlib import Path

import pytest

from sa_engine.listing import list_images
from sa_engine.plan import make_plan, read_plan, write_plan
from sa_engine.storage import RunError


def keys(root: Path, **options: Path) -> list[str]:
    return list_images(root, **options)[0].column("key").to_pylist()


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
    assert images.column("key").to_pylist() == [
        "astronaut.jpg",
        "chelsea.jpg",
        "coffee.jpg",
        "more/Z.JPG",
        "more/rocket.jpg",
    ]
    assert ignored == {".txt": 1, "no suffix": 1, "hidden": 2}
    status = (photo_folder / "coffee.jpg").stat()
    assert images.to_pylist()[2] == {
        "key": "coffee.jpg",
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


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
    assert set(images.column("key").to_pylist()) == {*names, "gone.jpg"}
    assert ignored == {"name is not UTF-8": 1}
    plan = tmp_path / "plan.parquet"
    write_plan(plan, make_plan(images, 4), tmp_path)
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
