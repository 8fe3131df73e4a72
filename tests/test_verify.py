"""Damage of every kind to the shards of a real run, one at a time."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_stage import run, small_config

from sa_engine import rle
from sa_engine.checks import Tally
from sa_engine.lock import RunLock
from sa_engine.plan import read_plan
from sa_engine.reader import iter_records
from sa_engine.records import ARROW_SCHEMA, from_table, to_sa1b
from sa_engine.remote import RemotePath
from sa_engine.shard_checks import ShardTask, check_shard
from sa_engine.shards import ShardStats
from sa_engine.storage import RunError, RunPaths, sha256_file
from sa_engine.verify import Verification, verify

FORMATS = {"both": ("tar", "parquet"), "tar": ("tar",), "parquet": ("parquet",)}
# Ids by key: 1 astronaut, 2 broken, 3 chelsea, 4 coffee, 5 more/rocket; two images to a shard.
FIRST, SECOND, LAST = "sa_000000", "sa_000001", "sa_000002"
FAILURES = "_run/errors/sa_000000.jsonl"
SKIPS = "_run/errors/sa_000001.jsonl"

Rows = list[dict[str, Any]]
Members = list[tuple[str, bytes]]


@pytest.fixture
def photo_dir(photo_folder: Path) -> Path:
    """Four photos and a broken one."""
    whole = (photo_folder / "coffee.jpg").read_bytes()
    (photo_folder / "broken.jpg").write_bytes(whole[:500])
    return photo_folder


def finished(photo_dir: Path, out: Path, formats: str = "both", **options: Any) -> Path:
    """A run with three photos that are ok, one that failed and one that was skipped."""
    given = {"formats": FORMATS[formats], "skip": "coffee.jpg", "max_failed": 1.0, **options}
    run(small_config(photo_dir, out, **given))
    return out


@pytest.fixture
def out(photo_dir: Path, tmp_path: Path) -> Path:
    return finished(photo_dir, tmp_path / "out")


def check(out: Path) -> Verification:
    return verify(out, workers=1)


def only_file(found: Verification) -> str:
    """The one file that all problems are about."""
    files = {problem.file for problem in found.problems}
    assert len(files) == 1, found
    return files.pop()


def data_files(out: Path) -> list[Path]:
    return sorted([*out.glob("*.tar"), *out.glob("*.parquet")])


def flip(path: Path, position: int, bit: int) -> bytes:
    """Flip a bit of a file; return what it held before."""
    before = path.read_bytes()
    after = bytearray(before)
    after[position] ^= 1 << bit
    path.write_bytes(after)
    return before


# Hand-made shards: what they hold is changed, and their markers with it


def edit_marker(out: Path, shard: str, **changes: Any) -> None:
    marker = RunPaths(out).marker(shard)
    marker.write_text(replace(ShardStats.from_json(marker.read_bytes()), **changes).to_json())


def seal(out: Path, shard: str) -> None:
    """Make a shard's marker that of its files as they are now."""
    stats = ShardStats.from_json(RunPaths(out).marker(shard).read_bytes())
    files = {
        name: {"sha256": sha256_file(out / name), "bytes": (out / name).stat().st_size}
        for name in stats.files
    }
    errors = RunPaths(out).errors(shard)
    sha256 = sha256_file(errors) if errors.exists() else None
    edit_marker(out, shard, files=files, errors_sha256=sha256)


def edit_rows(out: Path, shard: str, change: Callable[[Rows], Any], schema: Any = None) -> None:
    """Change a shard's Parquet rows as dicts."""
    path = out / f"{shard}.parquet"
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema or ARROW_SCHEMA), path)
    seal(out, shard)


def edit_members(out: Path, shard: str, change: Callable[[Members], Any]) -> None:
    """Change a shard's tar as a list of names and contents."""
    path = out / f"{shard}.tar"
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    seal(out, shard)


def edit_json(change: Callable[[dict[str, Any]], Any]) -> Callable[[Members], None]:
    """Change the JSON of a shard's first image."""

    def edit(members: Members) -> None:
        content = json.loads(members[1][1])
        change(content)
        members[1] = (members[1][0], json.dumps(content).encode())

    return edit


def edit_record(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the record of image 5 in all files of the last shard, which then agree."""
    contents: list[dict[str, Any]] = []
    if (out / f"{LAST}.parquet").exists():
        edit_rows(out, LAST, lambda rows: change(rows[0]))
        contents = [to_sa1b(r) for r in from_table(pq.read_table(out / f"{LAST}.parquet"))]
    if (out / f"{LAST}.tar").exists():

        def edit(members: Members) -> None:
            content = json.loads(members[1][1])
            if contents:
                content = contents[0]
            else:
                record = {**content["image"], "masks": content["annotations"]}
                change(record)
                content["image"] = {key: record[key] for key in content["image"]}
                content["annotations"] = record["masks"]
            members[1] = (members[1][0], json.dumps(content).encode())

        edit_members(out, LAST, edit)


# Runs that are as they should be


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("write_images", [True, False])
def test_a_sound_run_has_no_problem(
    photo_dir: Path, tmp_path: Path, formats: str, write_images: bool
) -> None:
    out = finished(photo_dir, tmp_path / "out", formats, write_images=write_images)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    found = check(out)
    assert found.problems == ()
    assert (found.out, found.shards, found.committed, found.images) == (out, 3, 3, 3)
    assert found.masks == sum(len(record.masks) for record in iter_records(out)) > 3
    assert str(found).splitlines() == [
        f"3 of 3 shards are finished; checked 3 images with {found.masks} masks",
        "no problem found",
        f"output: {out}",
    ]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_hand_made_shards_are_sound_too(out: Path) -> None:
    """Otherwise what is found below could come from the way in which it was made."""
    for shard in (FIRST, SECOND, LAST):
        edit_rows(out, shard, lambda rows: None)
        edit_members(out, shard, lambda members: None)
    edit_record(out, lambda record: None)
    assert check(out).problems == ()


def test_a_shard_without_any_record_is_sound(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"broken")
    out = finished(tmp_path / "photos", tmp_path / "out")
    found = check(out)
    assert found.problems == ()
    assert (found.committed, found.images, found.masks) == (1, 0, 0)
    with pq.ParquetWriter(out / f"{FIRST}.parquet", ARROW_SCHEMA.with_metadata({})):
        pass  # as many rows, of no schema version
    seal(out, FIRST)
    assert "RecordError: record schema version none" in str(check(out))


def test_an_unfinished_run_is_checked_as_far_as_it_is(photo_dir: Path, tmp_path: Path) -> None:
    out = finished(photo_dir, tmp_path / "out", limit=2)
    found = check(out)
    assert found.problems == ()
    assert (found.shards, found.committed, found.images) == (3, 1, 1)
    assert "shards not finished yet: 2" in str(found)
    (out / f"{FIRST}.json").unlink()
    for path in data_files(out):
        path.unlink()
    found = check(out)
    assert (found.problems, found.committed) == ((), 0)


def test_what_is_no_run_is_refused(out: Path, photo_dir: Path) -> None:
    with pytest.raises(RunError, match="not the output of a run"):
        verify(photo_dir)
    plan, info = RunPaths(out).plan, RunPaths(out).info
    plan.write_bytes(b"PAR1")
    with pytest.raises(RunError, match="cannot read the plan"):
        verify(out)
    plan.unlink()
    with pytest.raises(RunError, match="no run there"):
        verify(out)
    content = json.loads(info.read_bytes())
    del content["config"]["formats"]
    info.write_text(json.dumps(content))
    with pytest.raises(RunError, match="run.json: .* formats"):
        verify(out)


def test_all_processes_find_what_one_finds(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (out / f"{FIRST}.tar").unlink()
    flip(out / f"{LAST}.parquet", 100, 0)
    one, several = verify(out, workers=1), verify(out, workers=2, progress=True)
    assert one == several
    assert [problem.file for problem in one.problems] == [f"{FIRST}.tar", f"{LAST}.parquet"]
    lines = str(one).splitlines()
    assert lines[1] == f"{FIRST}.tar: is missing"
    assert lines[2].startswith(f"{LAST}.parquet: sha256 is ")
    assert lines[3] == "problems found: 2"
    assert "3/3" in capfd.readouterr().err


def test_a_run_in_a_bucket_is_checked_there(
    photo_dir: Path, tmp_path: Path, s3: Callable[[str], str]
) -> None:
    uri = s3(tmp_path.name)
    run(small_config(photo_dir, uri, skip="coffee.jpg", max_failed=1.0))  # type: ignore[arg-type]
    place = RemotePath(uri)
    found = verify(place, workers=2)
    assert (found.problems, found.committed, found.images) == ((), 3, 3)
    data = bytearray((place / f"{SECOND}.tar").read_bytes())
    data[len(data) // 2] ^= 4
    (place / f"{SECOND}.tar").put(bytes(data))
    (place / f"{LAST}.parquet").unlink()
    assert [str(problem).partition(" ")[0] for problem in verify(place, workers=1).problems] == [
        f"{SECOND}.tar:",
        f"{LAST}.parquet:",
    ]


# Damage that the hashes show


@pytest.mark.parametrize("formats", FORMATS)
def test_one_flipped_bit_anywhere_is_found(photo_dir: Path, tmp_path: Path, formats: str) -> None:
    out = finished(photo_dir, tmp_path / "out", formats)
    for path in data_files(out):
        size = path.stat().st_size
        chance = random.Random(path.name)
        places = [0, size // 2, size - 1, *(chance.randrange(size) for _ in range(12))]
        for place in places:
            before = flip(path, place, chance.randrange(8))
            found = check(out)
            assert only_file(found) == path.name, (place, found)
            assert "sha256 is" in str(found.problems[0])
            assert sha256_file(path) in found.problems[0].message
            path.write_bytes(before)
    assert check(out).problems == ()


def test_one_flipped_bit_in_a_marker_is_found(out: Path) -> None:
    """But for the digits of its seconds, which nothing else tells."""
    marker = out / f"{FIRST}.json"
    text = marker.read_text()
    seconds = range(text.index('"seconds"') + 11, text.index('"files"') - 3)
    chance = random.Random(1)
    for place in chance.sample([p for p in range(len(text)) if p not in seconds], 120):
        before = flip(marker, place, chance.randrange(8))
        problems = check(out).problems
        # A digit of a hash, a size or a count lays the blame on the file that it is of, too.
        assert problems, (place, text[place])
        assert all(FIRST in problem.file for problem in problems)
        marker.write_bytes(before)


def test_one_flipped_bit_in_the_failures_is_found(out: Path) -> None:
    errors = out / FAILURES
    chance = random.Random(2)
    for place in chance.sample(range(errors.stat().st_size), 60):
        before = flip(errors, place, chance.randrange(8))
        assert only_file(check(out)) == FAILURES, place
        errors.write_bytes(before)


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_truncated_missing_and_foreign_files_are_found(out: Path, suffix: str) -> None:
    path, other = out / f"{FIRST}.{suffix}", out / f"{LAST}.{suffix}"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:700], b"", whole + b"\0", other.read_bytes()):
        path.write_bytes(data)
        found = check(out)
        assert only_file(found) == path.name
        assert f"has {len(data)} bytes, its marker says {len(whole)}" in str(found)
    path.unlink()
    assert [str(problem) for problem in check(out).problems] == [f"{path.name}: is missing"]
    path.mkdir()
    assert "cannot be read: IsADirectoryError" in str(check(out))


def test_the_tars_of_two_shards_swapped_are_found(out: Path) -> None:
    """With their hashes and markers they are found by what they hold."""
    first, last = (out / f"{shard}.tar" for shard in (FIRST, LAST))
    shutil.move(first, out / "between")
    shutil.move(last, first)
    shutil.move(out / "between", last)
    assert {problem.file for problem in check(out).problems} == {first.name, last.name}
    for shard in (FIRST, LAST):
        seal(out, shard)
    found = check(out)
    assert {problem.file for problem in found.problems} == {first.name, last.name}
    assert "holds sa_5.jpg where sa_1.jpg is expected (2 in all, 2 expected)" in str(found)


# Damage that hashes do not show, because they were taken of it


def mask_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda record: change(record["masks"][1])


def set_counts(make: Callable[[str], str]) -> Callable[[dict[str, Any]], Any]:
    def change(mask: dict[str, Any]) -> None:
        mask["segmentation"]["counts"] = make(mask["segmentation"]["counts"])

    return mask_of(change)


def make_empty(mask: dict[str, Any]) -> None:
    height, width = mask["segmentation"]["size"]
    mask["segmentation"] = dict(rle.encode(np.zeros((height, width), bool)))
    mask.update(area=0, bbox=[0.0] * 4)


def one_column_more(record: dict[str, Any]) -> None:
    mask = record["masks"][1]
    larger = np.ones((record["height"], record["width"] + 1), bool)
    mask["segmentation"]["counts"] = rle.encode(larger)["counts"]


def repeat_mask(record: dict[str, Any]) -> None:
    record["masks"][1]["id"] = record["masks"][0]["id"]


def add_to(name: str, index: int, value: float) -> Callable[[dict[str, Any]], Any]:
    def change(mask: dict[str, Any]) -> None:
        mask[name][index] += value

    return mask_of(change)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "area": (mask_of(lambda mask: mask.update(area=mask["area"] + 1)), "area is .*, its RLE has"),
    "bbox x": (add_to("bbox", 0, 1.0), "its bbox is .*, its RLE's is"),
    "bbox y": (add_to("bbox", 1, -1.0), "its bbox is .*, its RLE's is"),
    "bbox width as COCO's": (add_to("bbox", 2, 1.0), "its bbox is .*, its RLE's is"),
    "bbox height": (add_to("bbox", 3, 0.5), "its bbox is .*, its RLE's is"),
    "bbox of three": (mask_of(lambda mask: mask["bbox"].pop()), "its bbox is .*, its RLE's is"),
    "size transposed": (
        mask_of(lambda mask: mask["segmentation"]["size"].reverse()),
        r"its RLE has the size \[\d+, \d+\], its image \[\d+, \d+\]",
    ),
    "longer": (set_counts(lambda counts: counts + "1"), "its runs are .* long, expected"),
    "a column more": (one_column_more, "its counts have a run of .* pixels, expected 0 to"),
    "shorter": (set_counts(lambda counts: "11"), "its runs are 2 pixels long, expected"),
    "no counts": (set_counts(lambda counts: ""), "its runs are 0 pixels long, expected"),
    "character above": (set_counts(lambda counts: counts + "p"), "character outside"),
    "character below": (set_counts(lambda counts: "/" + counts), "character outside"),
    "not ASCII": (set_counts(lambda counts: counts + "é"), "'ascii' codec"),
    "unfinished": (set_counts(lambda counts: counts + "P"), "end within a number"),
    "endless": (set_counts(lambda counts: counts + "o" * 20 + "0"), "number of 21 characters"),
    "negative": (set_counts(lambda counts: "O" + counts), "run of -1 pixels"),
    "huge": (set_counts(lambda counts: "0" + "oooooo?" * 3), "run of .* pixels"),
    "empty": (mask_of(make_empty), "it is empty"),
    "mask twice": (repeat_mask, "mask id 50000 comes after 50000"),
    "other image's mask": (mask_of(lambda mask: mask.update(id=20000)), "expected 50000 to 59999"),
    "NaN score": (
        mask_of(lambda mask: mask.update(predicted_iou=float("nan"))),
        "scores, .* are not all finite",
    ),
    "endless crop": (add_to("crop_box", 2, float("inf")), "crop box .* are not all finite"),
    "file name": (lambda record: record.update(file_name="sa_2.jpg"), "its file_name is"),
    "height": (lambda record: record.update(height=record["height"] + 1), "its RLE has the size"),
    "no width": (lambda record: record.update(width=0), "expected width x height"),
    "mask lost": (lambda record: record["masks"].pop(), "has 1 images with .* its marker says 1"),
}


@pytest.mark.parametrize("formats", FORMATS)
def test_records_that_are_wrong_are_found(photo_dir: Path, tmp_path: Path, formats: str) -> None:
    """Wrong in all files alike, so that no comparison between them helps."""
    sound = finished(photo_dir, tmp_path / "sound", formats)
    for name, (change, message) in RECORDS.items():
        out = shutil.copytree(sound, tmp_path / name)
        edit_record(out, change)
        found = check(out)
        # A JPEG that is not as large as the record says is found as well.
        others = {f"{LAST}.tar"} if name in ("height", "no width") else set()
        blamed = f"{LAST}.{'tar' if formats == 'tar' else 'parquet'}"
        assert {problem.file for problem in found.problems} - others == {blamed} - others, name
        assert re.search(message, str(found)), (name, str(found))


def set_errors(name: str, change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
        change(lines)
        (out / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        seal(out, Path(name).stem)

    return edit


def claim_image_1(lines: list[dict[str, Any]]) -> None:
    lines[0].update(image_id=1, key="astronaut.jpg")


def rename_image(rows: Rows) -> None:
    """Make image 5 an image 99 that agrees with itself."""
    rows[0].update(image_id=99, file_name="sa_99.jpg")
    for index, mask in enumerate(rows[0]["masks"]):
        mask["id"] = 99 * 10_000 + index


def resize_picture(members: Members) -> None:
    picture = Image.open(io.BytesIO(members[0][1]))
    buffer = io.BytesIO()
    picture.resize((picture.width - 1, picture.height)).save(buffer, "JPEG")
    members[0] = (members[0][0], buffer.getvalue())


def as_png(members: Members) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(members[0][1])).save(buffer, "PNG")
    members[0] = (members[0][0], buffer.getvalue())


def indent(members: Members) -> None:
    members[1] = (members[1][0], json.dumps(json.loads(members[1][1]), indent=1).encode())


def set_annotation(**values: Any) -> Callable[[Members], None]:
    return edit_json(lambda content: content["annotations"][0].update(values))


def link_picture(out: Path) -> None:
    """Put a link where a JPEG should be."""
    path = out / f"{LAST}.tar"
    with tarfile.open(path) as archive:
        header = archive.getmember("sa_5.json")
        data = archive.extractfile(header).read()  # type: ignore[union-attr]
    link = tarfile.TarInfo("sa_5.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(link)
        archive.addfile(header, io.BytesIO(data))
    seal(out, LAST)


def wider_ids(out: Path) -> None:
    fields = [
        field.with_type(pa.int64()) if field.name == "width" else field for field in ARROW_SCHEMA
    ]
    schema = pa.schema(fields, metadata=ARROW_SCHEMA.metadata)
    edit_rows(out, LAST, lambda rows: None, schema)


def other_version(out: Path) -> None:
    schema = ARROW_SCHEMA.with_metadata({"schema_version": "2"})
    edit_rows(out, LAST, lambda rows: None, schema)


def rows_of(change: Callable[[Rows], Any], shard: str = LAST) -> Callable[[Path], None]:
    return lambda out: edit_rows(out, shard, change)


def members_of(change: Callable[[Members], Any], shard: str = LAST) -> Callable[[Path], None]:
    return lambda out: edit_members(out, shard, change)


def marker_of(shard: str = FIRST, **changes: Any) -> Callable[[Path], None]:
    return lambda out: edit_marker(out, shard, **changes)


def write_marker(change: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        marker = out / f"{FIRST}.json"
        marker.write_text(change(marker.read_text()))

    return edit


def copy(source: str, name: str) -> Callable[[Path], None]:
    return lambda out: shutil.copy(out / source, out / name) and None


MARKER, PARQUET, TAR = f"{FIRST}.json", f"{LAST}.parquet", f"{LAST}.tar"
FILES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # the Parquet file
    "unplanned image": (rows_of(rename_image), PARQUET, "holds image 99 where image 5 is expected"),
    "no image": (rows_of(lambda rows: rows.clear()), PARQUET, "ends where image 5 is expected"),
    "image twice": (rows_of(lambda rows: rows.append(rows[0])), PARQUET, "its end is expected"),
    "other source": (
        rows_of(lambda rows: rows[0].update(source_path="more/rocket.png")),
        PARQUET,
        "image 5: its source_path is 'more/rocket.png', the plan's 'more/rocket.jpg'",
    ),
    "no source": (rows_of(lambda rows: rows[0].update(source_path=None)), PARQUET, "path is None"),
    "no box": (rows_of(lambda rows: rows[0]["masks"][0].update(bbox=None)), PARQUET, "image 5"),
    "no RLE": (
        rows_of(lambda rows: rows[0]["masks"][0].update(segmentation=None)),
        PARQUET,
        "image 5 cannot be read: TypeError",
    ),
    "unknown source": (
        rows_of(lambda rows: rows[0]["masks"][0].update(source="guessed")),
        PARQUET,
        "cannot be read: RecordError: .* 'guessed'",
    ),
    "column type": (wider_ids, PARQUET, r"its schema\['width'\] is 'int64', expected 'int32'"),
    "other version": (other_version, PARQUET, "RecordError: record schema version 2"),
    # the tar
    "other score": (
        members_of(set_annotation(predicted_iou=0.5)),
        TAR,
        r"sa_5.json: it\['annotations'\]\[0\]\['predicted_iou'\] is 0.5, expected 0\.",
    ),
    "other type": (
        members_of(edit_json(lambda content: content["image"].update(width=160.0))),
        TAR,
        r"it\['image'\]\['width'\] is 160.0, expected 160",
    ),
    "other keys": (members_of(set_annotation(new=1)), TAR, r"it\['annotations'\]\[0\] is {"),
    "mask lost": (
        members_of(edit_json(lambda content: content["annotations"].pop())),
        TAR,
        r"it\['annotations'\] is \[",
    ),
    "other spaces": (members_of(indent), TAR, "sa_5.json: is not written as sa-engine does"),
    "no JSON": (members_of(lambda members: members.pop(1)), TAR, "ends where sa_5.json"),
    "no picture": (
        members_of(lambda members: members.pop(0)),
        TAR,
        "holds sa_5.json where sa_5.jpg",
    ),
    "other order": (
        members_of(lambda members: members.reverse()),
        TAR,
        "where sa_5.jpg is expected",
    ),
    "one more": (
        members_of(lambda members: members.append(("sa_6.txt", b""))),
        TAR,
        r"holds sa_6.txt where its end is expected \(3 in all, 2 expected\)",
    ),
    "broken JSON": (
        members_of(lambda members: members.__setitem__(1, ("sa_5.json", b"{"))),
        TAR,
        "sa_5.json cannot be read: JSONDecodeError",
    ),
    "other size": (members_of(resize_picture), TAR, r"sa_5.jpg is \d+ x \d+, its record says \d+"),
    "no JPEG": (members_of(as_png), TAR, "sa_5.jpg cannot be read: SyntaxError: not a JPEG"),
    "no file": (link_picture, TAR, "sa_5.jpg cannot be read: ValueError: it is not a file"),
    # the failures
    "failure lost": (
        set_errors(FAILURES, list.clear),
        FAILURES,
        "has 0 failed and 0 skipped images, its marker says 1 and 0",
    ),
    "no failures": (lambda out: (out / SKIPS).unlink(), SKIPS, "is missing"),
    "other words": (
        lambda out: (out / SKIPS).write_text((out / SKIPS).read_text().replace("left", "lift")),
        SKIPS,
        "its sha256 is not [0-9a-f]{64}, which its marker says",
    ),
    "failure twice": (
        set_errors(FAILURES, lambda rows: rows.append(rows[0])),
        FAILURES,
        r"\[2, 2\]",
    ),
    "failed yet skipped": (
        set_errors(FAILURES, lambda rows: rows[0].update(status="skipped")),
        FAILURES,
        "has 0 failed and 1 skipped",
    ),
    "other key": (
        set_errors(FAILURES, lambda rows: rows[0].update(key="broken.png")),
        FAILURES,
        "has image 2, broken.png; planned is broken.jpg",
    ),
    "other image": (
        set_errors(FAILURES, lambda rows: rows[0].update(image_id=3, key="chelsea.jpg")),
        FAILURES,
        "has image 3, chelsea.jpg; planned is no such image",
    ),
    "no reason": (
        set_errors(FAILURES, lambda rows: rows[0].update(error="")),
        FAILURES,
        "properly",
    ),
    "no step": (
        set_errors(FAILURES, lambda rows: rows[0].update(step="sleep")),
        FAILURES,
        "properly",
    ),
    "no message": (
        set_errors(FAILURES, lambda rows: rows[0].pop("message")),
        FAILURES,
        "'message'",
    ),
    # the marker
    "one more ok": (marker_of(ok=2), MARKER, r"\(2, 0, 1\) images are ok, skipped, failed of 2"),
    "planned": (marker_of(planned=3, ok=2), MARKER, "3 images were planned, the plan has 2"),
    "other name": (marker_of(name=LAST), MARKER, f"is the marker of {LAST}"),
    "no files": (marker_of(files={}), MARKER, "its files are {}, expected bytes and sha256 of"),
    "true": (marker_of(skipped=False), MARKER, "are ok, skipped, failed"),
    "other schema": (
        write_marker(lambda text: text.replace('"schema_version": 1', '"schema_version": 2')),
        MARKER,
        "cannot be read: RunError: .* schema version 2: this version of sa-engine reads 1",
    ),
    "not JSON": (write_marker(lambda text: text[:-3]), MARKER, "cannot be read: JSONDecodeError"),
    "a list": (write_marker(lambda text: "[]"), MARKER, "cannot be read: TypeError"),
    "no bytes": (write_marker(lambda text: ""), MARKER, "cannot be read: JSONDecodeError"),
    # files of no shard
    "marker of no shard": (
        copy(MARKER, "sa_000003.json"),
        "sa_000003.json",
        "none of the plan's 3",
    ),
    "long number": (copy(MARKER, "sa_0000000.json"), "sa_0000000.json", "none of the plan's 3"),
    "tar of no shard": (copy(TAR, "sa_000009.tar"), "sa_000009.tar", "none of the plan's 3 shards"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_disagree_are_found(out: Path, name: str) -> None:
    damage, file, message = FILES[name]
    damage(out)
    found = check(out)
    # A marker that counts wrongly disagrees with the shard's other files, too.
    if file != MARKER:
        assert only_file(found) == file
    about = [str(problem) for problem in found.problems if problem.file == file]
    assert re.search(message, "\n".join(about)), str(found)


def test_an_image_that_failed_and_is_there_is_found(out: Path) -> None:
    set_errors(FAILURES, claim_image_1)(out)
    found = check(out)
    assert {p.file for p in found.problems} == {f"{FIRST}.parquet", f"{FIRST}.tar"}
    assert "holds image 1 where image 2 is expected" in str(found)


def test_a_damaged_parquet_file_leaves_the_tar_to_be_checked_by_itself(out: Path) -> None:
    edit_members(out, FIRST, edit_json(lambda content: content["annotations"][0].update(area=1)))
    masks = check(out).masks
    (out / f"{FIRST}.parquet").unlink()
    found = check(out)
    assert [problem.file for problem in found.problems] == [f"{FIRST}.parquet", f"{FIRST}.tar"]
    assert re.search(r"image 1: mask 10000: its area is 1, its RLE has \d+ pixels", str(found))
    assert (found.images, found.masks) == (3, masks)


@pytest.mark.parametrize("damage", ["file", "text"])
def test_a_tar_by_itself_must_be_of_the_image_that_it_is_named_for(
    photo_dir: Path, tmp_path: Path, damage: str
) -> None:
    out = finished(photo_dir, tmp_path / "out", "tar")
    if damage == "text":
        members_of(set_annotation(area="7"))(out)
        message = "sa_5.json"
    else:
        with tarfile.open(out / f"{FIRST}.tar") as archive:
            other = archive.extractfile("sa_1.json").read()  # type: ignore[union-attr]
        members_of(lambda members: members.__setitem__(1, ("sa_5.json", other)))(out)
        message = "sa_5.json is of image 1"
    found = check(out)
    assert only_file(found) == TAR
    assert message in str(found)


def test_records_are_counted_once(photo_dir: Path, tmp_path: Path) -> None:
    """Also if a Parquet file can be read only in part, and the tar is then checked by itself."""
    out = finished(photo_dir, tmp_path / "out", shard_size=8)
    masks = check(out).masks
    rows = pq.read_table(out / f"{FIRST}.parquet").to_pylist()
    rows[2]["masks"][0]["source"] = "guessed"
    table = pa.Table.from_pylist(rows, schema=ARROW_SCHEMA)
    pq.write_table(table, out / f"{FIRST}.parquet", row_group_size=1)
    seal(out, FIRST)
    found = check(out)
    assert [problem.file for problem in found.problems] == [f"{FIRST}.parquet"]
    assert (found.images, found.masks) == (3, masks)


def test_what_follows_the_end_of_a_tar_is_hashed_too(out: Path) -> None:
    with (out / TAR).open("ab") as file:
        file.write(bytes(10_000_000))
    seal(out, LAST)
    assert check(out).problems == ()
    flip(out / TAR, -1, 0)
    assert only_file(check(out)) == TAR


def test_a_shard_that_is_taken_up_again_meanwhile_is_not_committed(out: Path) -> None:
    """As by a live run with --retry-failed, after its marker was listed."""
    paths = RunPaths(out)
    task = ShardTask(paths, read_plan(paths.plan)[0], FORMATS["both"], True)
    assert check_shard(task).shards == 1
    paths.marker(FIRST).unlink()
    assert check_shard(task) == Tally()


def test_files_without_a_marker_wait_for_a_resume(photo_dir: Path, tmp_path: Path) -> None:
    out = finished(photo_dir, tmp_path / "out", limit=2)
    shutil.copy(out / f"{FIRST}.tar", out / f"{SECOND}.tar")
    assert [str(problem) for problem in check(out).problems] == [
        f"{SECOND}.tar: has no marker: its shard is not finished; a resume will replace it"
    ]
    with RunLock(RunPaths(out), "session"):
        assert check(out).problems == ()
    finished(photo_dir, out)
    found = check(out)
    assert (found.problems, found.committed) == ((), 3)


def test_a_file_of_a_format_that_the_run_does_not_write_is_found(
    photo_dir: Path, tmp_path: Path
) -> None:
    out = finished(photo_dir, tmp_path / "out", "tar")
    (out / PARQUET).touch()
    assert [str(problem) for problem in check(out).problems] == [
        f"{PARQUET}: is of no format of this run, which writes tar"
    ]


def test_a_plan_with_an_image_in_two_shards_is_found(out: Path) -> None:
    plan = RunPaths(out).plan
    table = pq.read_table(plan)
    ids = pa.array([1, 2, 3, 4, 1])
    pq.write_table(table.set_column(1, table.schema.field(1), ids), plan)
    found = check(out)
    assert found == verify(out, workers=2)
    assert str(found.problems[-1]) == (
        "_run/plan.parquet: sa_000002 has images [1], expected ascending ids above 4"
    )


def test_a_damaged_plan_is_told(out: Path) -> None:
    """Wherever it is hit, it is refused, or its shards do not fit it, or nothing depended on it."""
    plan = RunPaths(out).plan
    whole, chance = plan.read_bytes(), random.Random(3)
    keys = [image.key for shard in read_plan(plan) for image in shard.images]
    for _ in range(60):
        flip(plan, chance.randrange(len(whole)), chance.randrange(8))
        try:
            problems = check(out).problems
            changed = [i.key for shard in read_plan(plan) for i in shard.images] != keys
        except RunError as error:
            assert "plan" in str(error)
        else:
            assert problems or not changed
        plan.write_bytes(whole)


# Processes


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def block(out: Path) -> None:
    """Let whoever reads the first shard wait for ever."""
    (out / f"{FIRST}.parquet").unlink()
    os.mkfifo(out / f"{FIRST}.parquet")


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (met := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return met


def test_a_worker_that_is_killed_is_told(out: Path) -> None:
    block(out)
    this = psutil.Process()
    before = workers_of(this)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(verify, out, workers=2)
        wait_until(lambda: [w for w in workers_of(this) if w not in before])[0].kill()
        with pytest.raises(RunError, match="2 processes was killed .* enough memory"):
            found.result(60)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(out: Path, signum: int) -> None:
    block(out)
    code = f"from pathlib import Path; from sa_engine.verify import verify; verify(Path({str(out)!r}), 2)"
    parent = psutil.Popen([sys.executable, "-c", code])
    workers = wait_until(lambda: len(found := workers_of(parent)) == 2 and found)
    time.sleep(1)  # so that they are at work, most likely
    parent.send_signal(signum)
    assert parent.wait(60) == -signum
    try:
        wait_until(lambda: not any(is_alive(worker) for worker in workers))
    finally:
        for worker in filter(is_alive, workers):
            worker.kill()


def test_it_needs_neither_torch_nor_ray_nor_opencv() -> None:
    code = "import sys, sa_engine.verify; print({'torch', 'ray', 'cv2'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
