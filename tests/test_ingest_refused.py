"""What `sa-engine ingest` leaves out and lists, or refuses with the reason."""

import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_format_cvat
from click.testing import CliRunner
from ingesting import NAMES, annotations, assert_refused, ingest, records
from lost_masks import HEIGHT, WIDTH
from test_format_coco import uncompressed

from sa_engine.cli import main
from sa_engine.config import IngestConfig
from sa_engine.errors import SaEngineError
from sa_engine.formats import files
from stages import ingest as stage

EMPTY = uncompressed(np.zeros((HEIGHT, WIDTH), bool))


def with_something_of_all() -> dict[str, Any]:
    """Seven masks on the first photo: two are empty, one is a double, one is a crowd."""
    content = annotations()
    content["annotations"][1]["segmentation"] = content["annotations"][3]["segmentation"] = EMPTY
    double = {**content["annotations"][0], "id": 200}
    content["annotations"] += [double, {**content["annotations"][2], "id": 300, "iscrowd": 1}]
    return content


def command(images: Path, name: str, *more: str) -> str:
    result = CliRunner().invoke(main, [name, str(images.parent / "out"), *more])
    assert result.exit_code == 0, result.output
    return result.output


def test_empty_masks_are_left_out_and_listed(images: Path) -> None:
    result = ingest(images, with_something_of_all(), "--crowd=drop")
    assert result.exit_code == 0, result.output
    assert "2 images: 2 ok, 0 skipped, 0 failed" in result.output
    for line in ("3 masks", "2 empty masks left out", "1 doubles left out", "1 crowds left out"):
        assert f"\n{line}, " in result.output
    assert f"what was left out: sa-engine errors {images.parent / 'out'}" in result.output
    found = records(images)[NAMES[0]].masks
    assert [mask.original_id for mask in found] == ["100", "102", "104"]
    file = images.parent / "export.json"
    assert command(images, "errors", "--list").splitlines() == [
        f"left out\t{NAMES[0]}\tmask {said} ({file})"
        for said in (
            "101 has no pixel",
            "103 has no pixel",
            "200 is the same as mask 100",
            "300 is a crowd",
        )
    ]
    rows = [json.loads(line) for line in command(images, "errors", "--json").splitlines()]
    assert [(row["key"], row["error"]) for row in rows][1:3] == [
        (NAMES[0], "empty masks"),
        (NAMES[0], "doubles"),
    ]
    table = command(images, "errors").splitlines()
    assert table[1].startswith("1       left out  process  2 empty masks: mask 101 has no pixel (")
    assert "--retry-failed" not in table[-1]
    assert "empty masks left out 2" in command(images, "status")
    assert "no problem found" in command(images, "verify")
    assert (
        "nothing was left to do" in ingest(images, with_something_of_all(), "--crowd=drop").output
    )


def test_a_retry_keeps_what_was_left_out(images: Path) -> None:
    """A shard that is reopened for one failed photo is, in the end, that of a run without failures."""
    photo = images / NAMES[1]
    good = photo.read_bytes()
    photo.write_bytes(good[:60])
    result = ingest(images, with_something_of_all(), "--crowd=drop")
    assert result.exit_code == 3 and "1 of 2 images failed" in result.stderr
    assert "no problem found" in command(images, "verify")
    photo.write_bytes(good)
    again = ingest(images, with_something_of_all(), "--crowd=drop", "--retry-failed")
    assert again.exit_code == 0, again.output
    assert "2 images: 2 ok" in again.output and "\n2 empty masks left out" in again.output
    assert "no problem found" in command(images, "verify")
    out, before = images.parent / "out", images.parent / "before"
    out.rename(before)
    assert ingest(images, with_something_of_all(), "--crowd=drop").exit_code == 0
    for one in (*out.glob("sa_*"), *out.glob("_run/errors/*")):
        other = before / one.relative_to(out)
        if one.suffix == ".json":  # but for the seconds
            marker, expected = (json.loads(file.read_bytes()) for file in (one, other))
            assert {**marker, "seconds": 0} == {**expected, "seconds": 0}
            assert list(marker["counts"]) == list(expected["counts"])
        else:
            assert one.read_bytes() == other.read_bytes(), one


def test_what_was_left_out_is_verified(images: Path) -> None:
    assert ingest(images, with_something_of_all(), "--crowd=drop").exit_code == 0
    (errors,) = (images.parent / "out").glob("_run/errors/*")
    (marker,) = (images.parent / "out").glob("sa_*.json")
    lines = errors.read_bytes().splitlines(keepends=True)

    def problems(*changed: bytes) -> str:
        """Of lines whose hash is what the marker says."""
        said = json.loads(marker.read_bytes())
        errors.write_bytes(b"".join(changed))
        said["errors_sha256"] = hashlib.sha256(errors.read_bytes()).hexdigest()
        marker.write_text(json.dumps(said, indent=1) + "\n")
        result = CliRunner().invoke(main, ["verify", str(images.parent / "out")])
        assert result.exit_code == 1
        return result.output

    assert "has {'empty masks left out': 2, 'doubles left out': 1}, its" in problems(*lines[:3])
    failed = lines[0].replace(b"left out", b"failed")
    assert "says of images [1] that they ended" in problems(failed, *lines)
    moved = lines[3].replace(b'"image_id": 1', b'"image_id": 2')
    assert "lists images [2, 1, 1, 1]" in problems(moved, *lines[:3])
    errors.unlink()
    result = ingest(images, with_something_of_all(), "--crowd=drop", "--retry-failed")
    assert "nothing was left to do" in result.output, "no image has failed"


def zipped(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), data)  # its date is no part of a test's name
    return out.getvalue()


BOMB = f"<!DOCTYPE annotations [{test_format_cvat.BOMB}]>".encode()
NAN = annotations()
NAN["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, float("nan")]]
TWICE = annotations()
TWICE["annotations"][1]["id"] = 100


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("bomb.xml", BOMB + test_format_cvat.changed("a.jpg", "&c;"), "bomb.xml: XML with decl"),
        ("nan.json", json.dumps(NAN).encode(), "annotation 100: a polygon's coordinate is 'nan'"),
        ("twice.json", json.dumps(TWICE).encode(), "annotation 100: another annotation has the"),
        ("latin.json", '{"images": "ä"}'.encode("latin-1"), "latin.json: not UTF-8 text"),
        ("slip.zip", zipped("../x.json", b"{"), "slip.zip/../x.json: not JSON"),
        ("cut.zip", zipped("a.json", b"{}")[:-30], "cut.zip: "),
    ],
)
def test_what_cannot_be_read_is_one_error_and_no_output(
    images: Path, name: str, data: bytes, words: str
) -> None:
    file = images.parent / name
    file.write_bytes(data)
    before = sorted(images.parent.rglob("*"))
    out = images.parent / "out"
    arguments = ["ingest", f"--images={images}", f"--annotations={file}", f"--out={out}", "--local"]
    result = CliRunner().invoke(main, arguments)
    assert_refused(result, images, words)
    assert len(result.stderr.splitlines()) == 1
    assert sorted(images.parent.rglob("*")) == before


def test_what_has_no_counterpart_is_refused_both_ways(images: Path) -> None:
    content = annotations()
    content["images"][1]["file_name"] = "other.png"
    words = (
        "1 annotated images have no photo (other.png",
        "1 photos have no annotations (sub/leer.png)",
    )
    assert_refused(ingest(images, content), images, *words)
    result = ingest(images, content, "--allow-unmatched")
    assert "2 images: 1 ok, 1 skipped, 0 failed" in result.output


def test_a_resume_with_other_annotations_is_refused(images: Path) -> None:
    assert ingest(images, annotations()).exit_code == 0
    again = ingest(images, annotations())
    assert "nothing was left to do" in again.output
    other = ingest(images, annotations(info={"version": 2}))
    assert other.exit_code == 2
    assert "annotations was 'sha256" in other.stderr


def test_annotations_are_hashed_once_in_a_start(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    real = files.hash_annotations

    def counting(path: Path, name: str | None = None) -> str:
        hashed.append(path)
        return real(path, name)

    monkeypatch.setattr(files, "hash_annotations", counting)
    file = images.parent / "export.json"
    file.write_text(json.dumps(annotations()))
    config = IngestConfig(
        images=str(images), out=str(images.parent / "out"), annotations=str(file), local=True
    )
    assert stage.run(replace(config, shard_size=1, limit=1)).ok == 1
    hashed.clear()
    assert stage.run(config).ok == 2  # a resume, which looks at what was begun more than once
    assert hashed == [file]
    stage.describe(config)
    assert hashed == [file] * 2
    file.write_text(json.dumps(annotations(info={"version": 2})))
    with pytest.raises(SaEngineError, match="annotations was 'sha256"):
        stage.run(config)  # nothing of the start before is believed
    with pytest.raises(SaEngineError, match="annotations was 'sha256"):
        stage.describe(config)
