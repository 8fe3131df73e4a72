"""What a run writes, read by code that is not ours."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco
from small_stage import run, small_config

from sa_engine.reader import RunError, iter_records, read_image
from sa_engine.records import to_sa1b


@pytest.fixture(scope="module")
def photo_dir(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate(photos):
        Image.fromarray(photo).reduce(2).save(folder / f"photo {number}.png")
    (folder / "photo 2.png").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, photo_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    run(small_config(photo_dir, out, max_failed=1.0))
    return out


def members(out: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def test_tarfile_json_and_pycocotools(out: Path, photo_dir: Path) -> None:
    files = dict(members(out))
    assert sorted(files) == [
        "sa_1.jpg",
        "sa_1.json",
        "sa_2.jpg",
        "sa_2.json",
        "sa_4.jpg",
        "sa_4.json",
    ]
    for number in (1, 2, 4):
        content = json.loads(files[f"sa_{number}.json"])
        with Image.open(photo_dir / f"photo {number - 1}.png") as photo:
            size = photo.size
        assert list(content) == ["image", "annotations"]
        assert content["image"] == {
            "image_id": number,
            "width": size[0],
            "height": size[1],
            "file_name": f"sa_{number}.jpg",
        }
        covered = np.zeros(size[::-1], int)
        for annotation in content["annotations"]:
            pixels = coco.decode(annotation["segmentation"])
            covered += pixels
            x, y, width, height = coco.toBbox(annotation["segmentation"])
            assert annotation["area"] == pixels.sum() > 0
            assert annotation["bbox"] == [x, y, width - 1, height - 1]
        assert (covered == 1).all(), "the bands of a photo cover every pixel once"


def test_webdataset(out: Path) -> None:
    import webdataset

    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == ["sa_1", "sa_2", "sa_4"]
    for sample in samples:
        image = sample["json"]["image"]
        assert sample["jpg"].shape == (image["height"], image["width"], 3)


@pytest.mark.filterwarnings("ignore:The image decoding")
def test_torchvision(out: Path) -> None:
    import torch
    from torchvision import tv_tensors
    from torchvision.io import decode_jpeg

    files = dict(members(out))
    for name in ("sa_1", "sa_2", "sa_4"):
        content = json.loads(files[f"{name}.json"])
        image = decode_jpeg(torch.frombuffer(bytearray(files[f"{name}.jpg"]), dtype=torch.uint8))
        size = (content["image"]["height"], content["image"]["width"])
        assert tuple(image.shape) == (3, *size)
        rles = [annotation["segmentation"] for annotation in content["annotations"]]
        masks = tv_tensors.Mask(torch.from_numpy(coco.decode(rles)).permute(2, 0, 1))
        assert tuple(masks.shape) == (len(rles), *size)


def test_hugging_face_datasets(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    files = [str(path) for path in sorted(out.glob("*.parquet"))]
    table = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path))
    assert table["image_id"][:] == [1, 2, 4]
    mask = table[0]["masks"][0]
    assert coco.area(mask["segmentation"]) == mask["area"]
    assert mask["source"] == "automatic"
    assert mask["annotator"] is None


def test_pyarrow_agrees_with_the_tar(out: Path) -> None:
    rows = [
        row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    contents = [json.loads(data) for name, data in members(out) if name.endswith(".json")]
    assert len(rows) == len(contents) == 3
    for row, content in zip(rows, contents, strict=True):
        assert row["image_id"] == content["image"]["image_id"]
        assert row["source_path"] == f"photo {row['image_id'] - 1}.png"
        for mask, annotation in zip(row["masks"], content["annotations"], strict=True):
            assert {key: mask[key] for key in annotation} == annotation


def test_our_own_readers_agree_with_the_tar(out: Path, photo_dir: Path) -> None:
    files = dict(members(out))
    records = list(iter_records(out))
    assert [record.image_id for record in records] == [1, 2, 4]
    for record in records:
        assert to_sa1b(record) == json.loads(files[f"sa_{record.image_id}.json"])
        assert read_image(out, record.image_id) == files[record.file_name]
    with pytest.raises(RunError, match="no picture of image 3"):
        read_image(out, 3)
    with pytest.raises(RunError, match="no run there"):
        next(iter_records(photo_dir))


def test_records_without_parquet_come_from_the_tars(
    out: Path, photo_dir: Path, tmp_path: Path
) -> None:
    options = {"max_failed": 1.0, "formats": ("tar",), "write_images": False}
    run(small_config(photo_dir, tmp_path / "masks", **options))
    assert {path.suffix for path in (tmp_path / "masks").glob("sa_*")} == {".tar", ".json"}
    assert [name for name, _ in members(tmp_path / "masks")] == [
        "sa_1.json",
        "sa_2.json",
        "sa_4.json",
    ]
    for record, full in zip(iter_records(tmp_path / "masks"), iter_records(out), strict=True):
        assert to_sa1b(record) == to_sa1b(full)
        assert record.source_path == full.source_path
        assert record.sha256 is None
    with pytest.raises(RunError, match="leaves pictures out"):
        read_image(tmp_path / "masks", 1)
