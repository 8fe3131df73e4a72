"""The automatic stage end to end: real weights, real photos, through the command line."""

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as coco

from sa_engine.cli import main
from sa_engine.config import AutoConfig
from sa_engine.model_stage import ModelMismatch
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.reader import iter_records
from sa_engine.records import SOURCES
from stages.auto import AutoStage

QUICK = ("--set=points_per_side=4", "--set=crop_n_layers=0", "--threads-per-worker=1")


def auto(images: Path, out: Path, *more: str, where: str = "--local") -> Result:
    arguments = ["auto", f"--images={images}", f"--out={out}", where, *QUICK, *more]
    return CliRunner().invoke(main, arguments)


def hashes(out: Path) -> dict[str, str]:
    files = [*out.glob("*.tar"), *out.glob("*.parquet")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, photo_files: list[Path]) -> Path:
    """Two photos, large enough that short_side reduces one of them."""
    folder = tmp_path_factory.mktemp("images")
    coffee = Image.open(photo_files[1])
    coffee.save(folder / "coffee.jpg", quality=95)
    coffee.resize((2400, 1600)).save(folder / "large.png", compress_level=1)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("out") / "shards"
    result = auto(images, folder)
    assert result.exit_code == 0, result.output
    assert "2 images: 2 ok, 0 skipped, 0 failed" in result.output
    return folder


def test_shards_hold_released_images_and_their_masks(out: Path) -> None:
    """SA-1B's layout; masks of the released size that decode to their area and lie on their prompt's crop."""
    sizes = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            picture, description = tar.getmembers()
            assert Path(picture.name).stem == Path(description.name).stem
            image = Image.open(io.BytesIO(tar.extractfile(picture).read()))
            content = json.loads(tar.extractfile(description).read())
        sizes.append(image.size)
        assert (content["image"]["width"], content["image"]["height"]) == image.size
        assert content["annotations"]
        for annotation in content["annotations"]:
            pixels = coco.decode(annotation["segmentation"])
            assert pixels.shape[::-1] == image.size
            assert pixels.sum() == annotation["area"]
            left, top, width, height = annotation["crop_box"]
            x, y = annotation["point_coords"][0]
            assert left < x < left + width and top < y < top + height
    assert sizes == [(600, 400), (2250, 1500)]


def test_records_say_where_they_come_from(out: Path, images: Path) -> None:
    records = list(iter_records(out))
    assert [record.source_path for record in records] == ["coffee.jpg", "large.png"]
    info = json.loads((out / "_run" / "run.json").read_text())
    fingerprints = {mask.model_fingerprint for record in records for mask in record.masks}
    assert len(fingerprints) == 1
    assert fingerprints.pop() in json.dumps(info)
    assert {mask.source for record in records for mask in record.masks} == {SOURCES[3]}
    for record in records:
        data = (images / str(record.source_path)).read_bytes()
        assert record.sha256 == hashlib.sha256(data).hexdigest()


def test_ray_gives_the_same_bytes(
    out: Path, images: Path, tmp_path: Path, ray_address: str
) -> None:
    """Two workers on Ray, then one: the tars and tables of this process."""
    for workers in (2, 1):
        folder = tmp_path / f"ray{workers}"
        result = auto(images, folder, where=f"--num-workers={workers}")
        assert result.exit_code == 0, result.output
        assert hashes(folder) == hashes(out)


def test_another_model_is_refused(images: Path, tmp_path: Path, photo_files: list[Path]) -> None:
    """A resume with other weights names the fingerprint, and starts with the weights of the run; a finished run too."""
    folder = tmp_path / "shards"
    assert auto(images, folder, "--limit=1").exit_code == 0
    before = hashes(folder)
    sam = load_sam(resolve("vit_t"))
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight.mul_(1.01)
    torch.save(load_sam(resolve("vit_t")).state_dict(), tmp_path / "same.pth")
    torch.save(sam.state_dict(), tmp_path / "other.pth")
    result = auto(images, folder, f"--checkpoint={tmp_path / 'other.pth'}")
    assert result.exit_code == 2
    assert "model_fingerprint" in result.stderr
    assert hashes(folder) == before
    assert auto(images, folder).exit_code == 0
    assert len(hashes(folder)) == 4
    result = auto(images, folder, f"--checkpoint={tmp_path / 'other.pth'}")
    assert result.exit_code == 2
    assert "model_fingerprint" in result.stderr
    result = auto(images, folder, f"--checkpoint={tmp_path / 'same.pth'}")
    assert "nothing was left to do" in result.output


def test_every_worker_checks_its_weights(tmp_path: Path) -> None:
    """A worker that finds another file under the driver's name, as on a machine set up differently."""
    checkpoint = tmp_path / "sam.pth"
    sam = load_sam(resolve("vit_t"))
    torch.save(sam.state_dict(), checkpoint)
    stage = AutoStage(checkpoint=str(checkpoint))
    config = AutoConfig(images="images", out="out", points_per_side=4, crop_n_layers=0)
    fingerprint = stage.identity(config)["model_fingerprint"]
    sent = pickle.dumps(stage)
    assert len(sent) < 10_000, "the weights stay behind"
    assert pickle.loads(sent).make_worker(config).fingerprint == fingerprint
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight.mul_(1.01)
    torch.save(sam.state_dict(), checkpoint)
    with pytest.raises(ModelMismatch, match=f"on the driver .{fingerprint[:12]}"):
        pickle.loads(sent).make_worker(config)


def test_a_worker_needs_more_memory_for_a_larger_model() -> None:
    config = AutoConfig(images="images", out="out")
    names = ("vit_t", "vit_b", "vit_l", "vit_h")
    needed = [AutoStage(checkpoint=name).worker_memory(config) / 1e9 for name in names]
    # Measured on a CPU: 1.13, 1.54, 3.06 and 5.63 GB, and up to 0.5 more with the paper's setting.
    for estimate, measured in zip(needed, (1.13, 1.54, 3.06, 5.63), strict=True):
        assert measured < estimate < 1.3 * measured + 0.5


def test_a_finished_run_loads_no_heavy_library(out: Path, images: Path) -> None:
    """Asked again, it looks at the markers and answers."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    code = (
        "import sys\nfrom sa_engine.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'ray', 'pandas'} & set(sys.modules)))"
    )
    arguments = ["auto", f"--images={images}", f"--out={out}", "--local", *QUICK]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert "nothing was left to do" in done.stdout
    assert done.stdout.endswith("[]\n")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
