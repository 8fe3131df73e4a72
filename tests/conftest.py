"""Shared fixtures: real photos, at the sizes that keep the suite fast."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Before anything imports ray, as the runner does.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
# Where processes of tests share the cores, one thread each is enough, and one that waits must not spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")
# For the S3 server on loopback; without the second line the client looks for Amazon's own network.
os.environ.update(AWS_ACCESS_KEY_ID="tests", AWS_SECRET_ACCESS_KEY="tests")
os.environ.update(AWS_EC2_METADATA_DISABLED="true")
# Child processes and Ray's workers import the checkout and the tests' own stage.
os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 0))

import numpy as np
import pytest
import skimage
from ingesting import HEIGHT, NAMES, WIDTH
from PIL import Image
from runs import data_files
from s3_server import s3_server
from small_stage import run, small_config
from training import save
from xdist.scheduler import LoadScopeScheduling

PHOTO_NAMES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """All tests of a file in one process; and all files with tests of Ray in one, so that there is one Ray."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if of_ray(file) else file


@cache
def of_ray(file: str) -> bool:
    """Whether a file of tests, by its path in the checkout, has one that starts or joins a Ray."""
    text = (Path(__file__).parents[1] / file).read_text()
    return "ray_address: str" in text or "ray.cluster_utils" in text


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """Who runs which test where `make test` starts several processes."""
    return ByFile(config, log)


@pytest.fixture(scope="session")
def photo_files() -> list[Path]:
    """Colour photos that the scikit-image wheel carries, 300 to 640 pixels wide."""
    return [Path(skimage.__file__).parent / "data" / name for name in PHOTO_NAMES]


@pytest.fixture(scope="session")
def photos(photo_files: list[Path]) -> list[np.ndarray]:
    """The same photos as (H, W, 3) uint8 RGB."""
    return [np.array(Image.open(path).convert("RGB")) for path in photo_files]


@pytest.fixture(scope="session")
def small_photo(photos: list[np.ndarray]) -> np.ndarray:
    """The cat's face: (96, 128, 3) uint8 RGB, no side equal to another, nothing symmetric."""
    return np.ascontiguousarray(photos[2][60:156, 120:248])


@pytest.fixture
def photo_folder(tmp_path: Path, photos: list[np.ndarray]) -> Path:
    """A folder of four quarter-size photos, one of them in a subfolder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, photo in zip(PHOTO_NAMES, photos, strict=True):
        where = folder / "more" if name == "rocket.jpg" else folder
        small = Image.fromarray(photo).reduce(4)
        small.save(where / f"{Path(name).stem}.jpg", quality=95)
    return folder


@pytest.fixture
def many(photos: list[np.ndarray], tmp_path: Path) -> Path:
    """A folder of 24 different small pictures."""
    (tmp_path / "many").mkdir()
    for number in range(24):
        save(tmp_path / "many", number, photos)
    return tmp_path / "many"


@pytest.fixture
def expected(photo_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The files of an uninterrupted run of the small stage over `photo_folder`, in two shards."""
    out = tmp_path / "expected"
    run(small_config(photo_folder, out))
    return data_files(out)


@pytest.fixture
def portrait(photos: list[np.ndarray]) -> Image.Image:
    """The astronaut, 128 x 128, her face 30 pixels high."""
    return Image.fromarray(photos[0]).reduce(4)


@pytest.fixture
def pair(tmp_path: Path, photos: list[np.ndarray], portrait: Image.Image) -> Path:
    """A folder of two photos: a cup of coffee, and the astronaut in a sub-folder."""
    folder = tmp_path / "photos"
    (folder / "people").mkdir(parents=True)
    Image.fromarray(photos[1]).reduce(4).save(folder / "coffee.jpg", quality=95)
    portrait.save(folder / "people" / "astronaut.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two photos of 17 x 12 pixels, one of them in a folder."""
    folder = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout, `../shared/data`; its tests are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not here")
    return folder


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """One Ray with two CPUs for all tests; the runner uses it in this process, others join it."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """An S3 server on loopback: gives the URI of a folder in its one bucket."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as query:
        yield lambda folder: f"s3://bucket/{folder}?{query}"
