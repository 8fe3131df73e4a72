"""Damage of every kind that hashes do not show, because they were taken of it, one at a time."""

import io
import json
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import (
    FAILURES,
    FIRST,
    FORMATS,
    LAST,
    SECOND,
    SKIPS,
    Members,
    Rows,
    check,
    edit_json,
    edit_marker,
    edit_members,
    edit_record,
    edit_rows,
    finished,
    flip,
    only_file,
    seal,
)
from PIL import Image

from sa_engine import rle
from sa_engine.checks import Tally
from sa_engine.lock import RunLock
from sa_engine.plan import read_plan
from sa_engine.records import ARROW_SCHEMA
from sa_engine.shard_checks import ShardTask, check_shard
from sa_engine.storage import RunError, RunPaths
from sa_engine.verify import verify


@pytest.fixture
def out(photo_folder: Path, tmp_path: Path) -> Path:
    return finished(photo_folder, tmp_path / "out")


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
def test_records_that_are_wrong_are_found(photo_folder: Path, tmp_path: Path, formats: str) -> None:
    """Wrong in all files alike, so that no comparison between them helps."""
    sound = finished(photo_folder, tmp_path / "sound", formats)
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
    photo_folder: Path, tmp_path: Path, damage: str
) -> None:
    out = finished(photo_folder, tmp_path / "out", "tar")
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


def test_records_are_counted_once(photo_folder: Path, tmp_path: Path) -> None:
    """Also if a Parquet file can be read only in part, and the tar is then checked by itself."""
    out = finished(photo_folder, tmp_path / "out", shard_size=8)
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


def test_files_without_a_marker_wait_for_a_resume(photo_folder: Path, tmp_path: Path) -> None:
    out = finished(photo_folder, tmp_path / "out", limit=2)
    shutil.copy(out / f"{FIRST}.tar", out / f"{SECOND}.tar")
    assert [str(problem) for problem in check(out).problems] == [
        f"{SECOND}.tar: has no marker: its shard is not finished; a resume will replace it"
    ]
    with RunLock(RunPaths(out), "session"):
        assert check(out).problems == ()
    finished(photo_folder, out)
    found = check(out)
    assert (found.problems, found.committed) == ((), 3)


def test_a_file_of_a_format_that_the_run_does_not_write_is_found(
    photo_folder: Path, tmp_path: Path
) -> None:
    out = finished(photo_folder, tmp_path / "out", "tar")
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
