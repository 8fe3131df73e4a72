import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from small_stage import run, small_config

from sa_engine.cli import main
from sa_engine.holdout import read_holdout, split
from sa_engine.reader import iter_records
from sa_engine.storage import RunError


@pytest.fixture
def many(photos: list[np.ndarray], tmp_path: Path) -> Path:
    """A folder of forty different small pictures."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        save(folder, number, photos)
    return folder


def save(folder: Path, number: int, photos: list[np.ndarray]) -> None:
    picture = Image.fromarray(photos[number % 4]).reduce(16).rotate(number)
    picture.save(folder / f"{number:03}.png")


def contents(out: Path) -> set[str]:
    found = read_holdout(out)
    assert found is not None
    return {image["sha256"] for image in found.images}


def test_the_split_stays_when_images_are_added(
    many: Path, tmp_path: Path, photos: list[np.ndarray]
) -> None:
    out = tmp_path / "out"
    config = small_config(many, out, shard_size=10, write_images=False)
    run(config)
    assert len(split(out, 10).images) == 10
    first = contents(out)
    records = {record.image_id: record for record in iter_records(out)}
    for image in read_holdout(out).images:
        assert records[image["image_id"]].source_path == image["source_path"]
        assert records[image["image_id"]].sha256 == image["sha256"]
    split(out, 10)
    assert contents(out) == first, "the same call, the same split"
    for number in range(40, 80):
        save(many, number, photos)
    # A copy of a test image is a test image, whatever its name.
    copied = read_holdout(out).images[0]["source_path"]
    (many / "copy.png").write_bytes((many / copied).read_bytes())
    run(config, extend=True)
    after = split(out, 10)
    assert first < contents(out)
    assert "copy.png" in {image["source_path"] for image in after.images}
    assert len(first) < len(contents(out)) < 40, "of the new images, their share"
    assert len(after.image_ids) == len(after.images) == len(contents(out)) + 1


def test_the_split_does_not_depend_on_names_or_order(many: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in many.iterdir():
        (other / f"{999 - int(path.stem)}.png").write_bytes(path.read_bytes())
    for folder in (many, other):
        run(small_config(folder, tmp_path / f"{folder.name}-out", write_images=False))
        split(tmp_path / f"{folder.name}-out", 7)
    assert contents(tmp_path / "many-out") == contents(tmp_path / "other-out")


def test_seeds_differ_and_cannot_be_mixed(many: Path, tmp_path: Path) -> None:
    config = small_config(many, tmp_path / "a", write_images=False)
    for name, seed in (("a", 0), ("b", 1)):
        run(replace(config, out=str(tmp_path / name)))
        split(tmp_path / name, 10, seed)
    assert contents(tmp_path / "a") != contents(tmp_path / "b")
    with pytest.raises(RunError, match="split with seed 0 already"):
        split(tmp_path / "a", 10, seed=1)


def test_a_run_without_parquet_is_split_by_paths(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out, formats=("tar",)))
    assert [image["sha256"] for image in split(out, 2).images] == [None, None]


def test_on_the_command_line(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out))

    def sa_engine(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["split", str(out), *map(str, arguments)])
        return result.exit_code, result.output

    code, text = sa_engine("--holdout", 5)
    assert (code, "has 4 different finished images" in text) == (2, True)
    assert sa_engine("--holdout", 2) == (0, f"2 images held out: {out}/holdout.json\n")
    assert len(json.loads((out / "holdout.json").read_text())["images"]) == 2
    assert run(small_config(photo_folder, out)).processed == 0, "the file is no stranger there"
    (out / "holdout.json").write_text('{"schema_version": 1}')
    code, text = sa_engine("--holdout", 2)
    assert (code, "cannot read" in text) == (2, True)
