"""Which image came back from annotators: its bytes say it, as every hand-out has an `sa_1.jpg` and a mask 10000."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from test_proposals import image

from sa_engine.cli import main
from sa_engine.finished import FinishedRun
from sa_engine.holdout import split
from sa_engine.pairing import ImageIndex, PairingError
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord
from sa_engine.returns import PrefilledRun
from sa_engine.training.data import TrainingData


def sa_engine(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def draw(folder: Path, names: Iterable[str], seed: int = 0, offset: int = 0) -> Path:
    """Photos of one size and a file of two masks on each, which lie elsewhere for another offset."""
    images, entries = [], []
    random = np.random.default_rng(seed)
    for number, name in enumerate(names, 1):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((96, 64), Image.Resampling.BICUBIC).save(path)
        images.append({"id": number, "file_name": name, "width": 96, "height": 64})
        for left in (2 + offset, 50 + offset):
            ring = [left, 4, left + 20, 4, left + 20, 40, left, 40]
            entries.append({"id": len(entries) + 1, "image_id": number, "segmentation": [ring]})
    (folder / "drawn.json").write_text(json.dumps({"images": images, "annotations": entries}))
    return folder


def ingest(photos: Path, annotations: Path, out: Path, *more: object) -> Result:
    return sa_engine(
        "ingest", "--images", photos, "--annotations", annotations, "--out", out, "--local", *more
    )


def shown(folder: Path, *more: object) -> Path:
    """What was drawn, as a run whose masks are shown to annotators."""
    result = ingest(folder / "photos", folder / "drawn.json", folder / "run", *more)
    assert result.exit_code == 0, result.output
    return folder / "run"


def hand_out(folder: Path) -> Path:
    command = ("export", folder / "run", "--format=coco-rle", "--names=released", "--with-images")
    result = sa_engine(*command, "--out", folder / "handout")
    assert result.exit_code == 0, result.output
    return folder / "handout"


def take_back(pictures: Path, annotations: Path, run: Path, out: Path, *more: object) -> Result:
    return ingest(
        pictures / "images", annotations / "annotations.json", out, "--prefill", run, *more
    )


def reasons(out: Path) -> str:
    return sa_engine("errors", "--list", out).output


def fates(out: Path) -> dict[str, list[str | None]]:
    return {
        str(record.source_path): [mask.edit_status for mask in record.masks]
        for record in iter_records(out)
    }


def test_a_return_of_another_run_is_refused(tmp_path: Path) -> None:
    handouts = []
    for seed, name in enumerate("ab"):
        batch = draw(tmp_path / name, [f"{name}{n}.png" for n in range(3)], seed, offset=15 * seed)
        shown(batch)
        handouts.append(hand_out(batch))
    first, second = handouts
    run, other = (tmp_path / name / "run" for name in "ab")
    result = take_back(first, first, other, tmp_path / "wrong run")
    assert result.exit_code == 3, result.output
    told = reasons(tmp_path / "wrong run")
    assert f"image 1 of {other} is called so, and is another" in told
    assert "the bytes of its released picture (`export --with-images`) or its photo;" in told
    result = take_back(second, first, other, tmp_path / "wrong file")
    assert result.exit_code == 3, result.output
    told = reasons(tmp_path / "wrong file")
    assert f"2 of its masks have the ids of masks of image 1 of {other}" in told
    assert "of another hand-out" in told
    assert take_back(first, first, run, tmp_path / "right").exit_code == 0
    assert fates(tmp_path / "right") == {f"sa_{n}.jpg": ["kept", "kept"] for n in (1, 2, 3)}
    # Not the pictures, but the photos themselves, by their bytes.
    content = json.loads((tmp_path / "a" / "drawn.json").read_text())
    result = ingest(tmp_path / "a" / "photos", tmp_path / "a" / "drawn.json", tmp_path / "photos run",
                    "--prefill", run)  # fmt: skip
    assert result.exit_code == 0 and len(content["images"]) == 3, result.output
    assert set(map(tuple, fates(tmp_path / "photos run").values())) == {("kept", "kept")}


def test_of_a_run_without_pictures_the_photos_are_expected(tmp_path: Path) -> None:
    batch = draw(tmp_path, ["a.png", "b.png"])
    run = shown(batch, "--set=write_images=false")
    prefilled = PrefilledRun(run)
    first, second = iter_records(run)
    assert prefilled.sort(first)[0].masks[0].edit_status == "kept"
    with pytest.raises(PairingError, match="expected the bytes of its photo; --prefill"):
        prefilled.sort(replace(first, sha256="0" * 64))
    renamed, deleted = prefilled.sort(replace(second, source_path="else.png", masks=()))
    assert renamed.sha256 == second.sha256 and len(deleted) == 2
    # Without Parquet nothing is known of bytes, so names decide.
    (tmp_path / "tars").mkdir()
    batch = draw(tmp_path / "tars", ["a.png", "sa_1.png"])
    run = shown(batch, "--set=write_images=false", "--set=formats=tar")
    prefilled = PrefilledRun(run)
    assert prefilled.sort(replace(first, sha256="0" * 64))[0].sha256 == "0" * 64
    with pytest.raises(PairingError, match="it could be any of the images 1, 2"):
        prefilled.sort(replace(first, source_path="sa_1.jpg"))


def test_part_of_a_hand_out_comes_back_and_nothing_else_with_it(tmp_path: Path) -> None:
    run = shown(draw(tmp_path, ["a.png", "b.png", "c.png"]))
    handout = hand_out(tmp_path)
    content = json.loads((handout / "annotations.json").read_text())
    part = {**content, "images": [one for one in content["images"] if one["id"] != 2],
            "annotations": [one for one in content["annotations"] if one["image_id"] != 2]}  # fmt: skip
    (handout / "annotations.json").write_text(json.dumps(part))
    assert take_back(handout, handout, run, tmp_path / "refused").exit_code == 2
    result = take_back(handout, handout, run, tmp_path / "part", "--allow-unmatched")
    assert result.exit_code == 0, result.output
    assert fates(tmp_path / "part") == {f"sa_{n}.jpg": ["kept", "kept"] for n in (1, 3)}
    # Images that nobody was shown do not come in as drawn from nothing.
    (handout / "images" / "sa_3.jpg").rename(handout / "images" / "other.jpg")
    part["images"][1]["file_name"] = "other.jpg"
    (handout / "annotations.json").write_text(json.dumps(part))
    result = take_back(handout, handout, run, tmp_path / "other", "--allow-unmatched")
    assert result.exit_code == 3, result.output
    assert "take in images that were not prefilled by themselves" in reasons(tmp_path / "other")


@pytest.mark.parametrize("name", ["cvat", "label-studio", "labelme", "coco-rle"])
def test_photos_of_one_name_come_back_by_their_own_names(tmp_path: Path, name: str) -> None:
    run = shown(draw(tmp_path, ["a/x 1.png", "b/x 1.png", "x 1.png"]))
    dest = tmp_path / "handout"
    result = sa_engine("export", run, "--format", name, "--with-images", "--out", dest)
    assert result.exit_code == 0, result.output
    pictures = dest if name == "labelme" else dest / "images"
    result = ingest(pictures, dest, tmp_path / "back", "--prefill", run)
    assert result.exit_code == 0, result.output
    found = fates(tmp_path / "back")
    assert found == {f"{folder}x 1.jpg": ["kept", "kept"] for folder in ("a/", "b/", "")}


def test_photos_may_be_called_as_pictures_are(tmp_path: Path) -> None:
    """SA-1B's are; by their order image 2 is made of sa_10, and its picture is called sa_2."""
    run = shown(draw(tmp_path, [f"sa_{n}.png" for n in range(1, 13)]))
    pictures = {record.image_id: record.source_path for record in iter_records(run)}
    assert (pictures[2], pictures[10]) == ("sa_10.png", "sa_7.png")
    handout = hand_out(tmp_path)
    for only in (range(1, 13), (10,)):  # alone it would be the photo sa_10 by its name
        content = json.loads((handout / "annotations.json").read_text())
        content["images"] = [one for one in content["images"] if one["id"] in only]
        content["annotations"] = [one for one in content["annotations"] if one["image_id"] in only]
        (handout / "annotations.json").write_text(json.dumps(content))
        name = f"{len(only)} back"
        result = take_back(handout, handout, run, tmp_path / name, "--allow-unmatched")
        assert result.exit_code == 0, result.output
        assert set(map(tuple, fates(tmp_path / name).values())) == {("kept", "kept")}
        result = ingest(handout / "images", handout / "annotations.json", tmp_path / f"{name} alone",
                        "--allow-unmatched")  # fmt: skip
        assert result.exit_code == 0, result.output
        for out in (tmp_path / name, tmp_path / f"{name} alone"):
            audited = sa_engine("audit", run, out).output
            assert f"masks: {2 * len(only)} kept, 0 edited, 0 deleted, 0 added" in audited


def test_where_content_is_not_known_two_names_are_refused() -> None:
    def named(number: int, **fields: str | None) -> ImageRecord:
        return image(number, [], **fields)

    after = [named(1, source_path="sa_10.png"), named(2, source_path="sa_2.png")]
    before = named(2, source_path="sa_10.png", sha256="photo")
    advice = ("before", Path("before"), "do this")
    with pytest.raises(PairingError, match="image 2 of before may be sa_10 of after, by its photo"):
        ImageIndex(Path("after"), after).take(before, *advice[1:], {}.get)
    index = ImageIndex(Path("after"), after)
    assert index.take(before, *advice[1:], {2: after[1].sha256}.get) is after[1]
    assert index.take(before, *advice[1:], {2: "of none"}.get) is None
    # A name that no picture has is a photo's, though it was stored anew.
    stored = named(2, source_path="port.jpg")
    assert (
        ImageIndex(Path("after"), [stored]).take(
            replace(before, source_path="port.png"), *advice[1:], {2: "of none"}.get
        )
        is stored
    )


def test_what_is_held_out_stays_so_when_it_comes_back(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(6)]
    run = shown(draw(tmp_path, names))
    held_out = {one["sha256"] for one in split(run, 3).images}
    handout = hand_out(tmp_path)
    back = tmp_path / "back"
    assert take_back(handout, handout, run, back, "--set=write_images=false").exit_code == 0
    photos = {record.image_id: record.sha256 for record in iter_records(run)}
    assert {record.image_id: record.sha256 for record in iter_records(back)} == photos
    assert held_out < set(photos.values())
    data = TrainingData.open([run, back])
    assert [(one.images, one.held_out) for one in data.runs] == [(3, 3), (3, 3)]
    # Pixels of the picture are not those of the photo.
    keys = [FinishedRun(out).content_key(record) for out in (back,) for record in iter_records(out)]
    again = tmp_path / "again"
    assert ingest(tmp_path / "photos", tmp_path / "drawn.json", again,
                  "--set=write_images=false").exit_code == 0  # fmt: skip
    assert not {FinishedRun(again).content_key(one) for one in iter_records(again)} & set(keys)
    assert sa_engine("verify", back).exit_code == 0
