import os
from pathlib import Path

import pytest

from sa_engine.listing import list_images, size_and_mtime_ns
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
    with pytest.raises(RunError, match=r"no image in .*: 1 \.txt; images end .*\.jpg"):
        list_images(tmp_path)


def test_numbered_files_do_not_make_a_reason_each(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    for number in range(300):
        (tmp_path / f"frame.{number:06d}").touch()
    ignored = list_images(tmp_path)[1]
    assert len(ignored) <= 101
    assert ignored[".000007"] == 1 and sum(ignored.values()) == 300


def test_reasons_can_be_printed(tmp_path: Path) -> None:
    for name in ("photo.jpg", "red.\x1b[31m", "line.\n", "word.фото"):
        (tmp_path / name).touch()
    assert list_images(tmp_path)[1] == {r"'.\x1b[31m'": 1, r"'.\n'": 1, ".фото": 1}


def test_a_link_to_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "album").symlink_to(tmp_path / "not mounted")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "README").touch()
    assert list_images(tmp_path)[1] == {"broken link or no permission": 2, "no suffix": 1}


def test_times_beyond_64_bits_are_the_last_there_is(tmp_path: Path) -> None:
    for name, mtime_ns in (("past.jpg", -1), ("future.jpg", 10**19)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(mtime_ns, mtime_ns))
    rows = {row["key"]: row for row in list_images(tmp_path)[0].to_pylist()}
    assert rows["past.jpg"]["mtime_ns"] == -1
    assert rows["future.jpg"]["mtime_ns"] == 2**63 - 1
    assert size_and_mtime_ns((tmp_path / "future.jpg").stat()) == (0, 2**63 - 1)
