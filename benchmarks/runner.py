"""What a run costs beside its stage, and what a second worker gains.

    python benchmarks/runner.py            # both; about ten minutes on two cores
    python benchmarks/runner.py overhead   # the runner's own time per image
    python benchmarks/runner.py workers    # one worker against two, and against two bare processes

The first takes canned masks and pictures through the runner: its CPU time is all the runner's own,
and what a run takes longer than the 20 ms that the stage waits for each image, as for a GPU, is what
the runner adds. The second segments copies of one photo with real weights, one thread a worker, and compares
throughput between the first and the last committed shard, so that starting Ray and loading the model
do not count. Its ceiling is what two processes without any runner gain on this machine.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["PYTHONPATH"] = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 0))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import skimage
from PIL import Image

from sa_engine import rle, runner
from sa_engine.config import AutoConfig
from sa_engine.images import encode_jpeg
from sa_engine.option_groups import MaskConfig, ShardConfig
from sa_engine.partial import Finished, finished_record
from sa_engine.plan import PlannedImage
from sa_engine.records import ImageRecord, MaskRecord, image_name, mask_id

MASKS = 100  # of an SA-1B image, on average
SIZE = (1500, 2250)  # height and width of a released image
IMAGES = 512
STAGE_S = 0.02
COPIES = 24
QUICK: dict[str, Any] = {"points_per_side": 8, "crop_n_layers": 0}


@dataclass
class CannedStage:
    """A stage that has every image's masks and picture ready."""

    worker: "CannedWorker"
    name: str = "canned"

    def worker_memory(self, config: ShardConfig) -> int:
        return 0

    def make_worker(self, config: ShardConfig) -> "CannedWorker":
        return self.worker


class CannedWorker:
    """Ellipses and noise in the amounts of a real released image."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        height, width = SIZE
        photo = np.asarray(Image.open(photo_file()).convert("RGB").resize((width, height)))
        self.jpeg = encode_jpeg(photo, 95)
        rows, columns = np.ogrid[:height, :width]
        self.masks: list[dict[str, Any]] = []
        for _ in range(MASKS):
            y, x = generator.random(2) * SIZE
            a, b = 10 + generator.random(2) ** 3 * 300
            mask = ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1
            self.masks.append({"segmentation": rle.encode(mask), "area": int(mask.sum())})

    def prepare(self, item: PlannedImage, data: bytes) -> None:
        """Nothing to decode."""

    def process(self, item: PlannedImage, prepared: None) -> None:
        """Wait as if a GPU did the work."""
        time.sleep(STAGE_S)

    def finish(self, item: PlannedImage, result: None) -> Finished:
        """The canned record under the image's own ids."""
        masks = tuple(
            MaskRecord(
                id=mask_id(item.image_id, index),
                bbox=[1.0, 2.0, 3.0, 4.0],
                predicted_iou=0.9234567,
                stability_score=0.9654321,
                point_coords=[[1.5, 2.5]],
                crop_box=[0.0, 0.0, float(SIZE[1]), float(SIZE[0])],
                source="automatic",
                **mask,
            )
            for index, mask in enumerate(self.masks)
        )
        record = ImageRecord(
            image_id=item.image_id,
            width=SIZE[1],
            height=SIZE[0],
            file_name=image_name(item.image_id),
            source_path=item.key,
            sha256="0" * 64,
            masks=masks,
        )
        return finished_record(record, self.jpeg)


def photo_file() -> Path:
    """A colour photo that the scikit-image wheel carries."""
    return Path(skimage.__file__).parent / "data" / "coffee.png"


def copies(folder: Path, count: int) -> Path:
    """A folder of so many copies of the photo."""
    folder.mkdir()
    for number in range(count):
        shutil.copy(photo_file(), folder / f"{number:04}.png")
    return folder


def overhead(work: Path) -> None:
    """Print the runner's time per image, in this process."""
    images = copies(work / "canned", IMAGES)
    worker = CannedWorker()  # its pictures and masks are not the runner's time
    for formats, size in ((("tar", "parquet"), 128), (("tar", "parquet"), 8), (("parquet",), 128)):
        out = work / f"out-{'-'.join(formats)}-{size}"
        config = ShardConfig(
            images=str(images), out=str(out), local=True, formats=formats, shard_size=size
        )
        cpu = time.process_time()
        report = runner.run(CannedStage(worker), config, dict)
        cpu = time.process_time() - cpu
        print(
            f"{'+'.join(formats):12} shards of {size:3}: {report.ok} images of {MASKS} masks and "
            f"{len(worker.jpeg) / 1e3:.0f} kB: {cpu / report.ok * 1000:.2f} ms of CPU an image, "
            f"{(report.seconds / report.ok - STAGE_S) * 1000:.2f} ms added"
        )


def throughput(work: Path, images: Path, workers: int) -> float:
    """Images per second of `workers` workers on Ray between the first commit and the last."""
    from stages import auto

    out = work / f"workers-{workers}"
    config = AutoConfig(
        images=str(images),
        out=str(out),
        shard_size=1,
        num_workers=workers,
        threads_per_worker=1,
        **QUICK,
    )
    auto.run(config)
    times = sorted(path.stat().st_mtime for path in out.glob("sa_*.json"))
    return (len(times) - workers) / (times[-1] - times[workers - 1])


def bare(images: Path) -> float:
    """Images per second of the mask generator alone, one thread, in this process."""
    import torch

    from sa_engine.generator import MaskGenerator
    from sa_engine.images import decode_image
    from sa_engine.modeling.sam import load_sam
    from sa_engine.modeling.weights import resolve
    from sa_engine.predictor import Predictor

    torch.set_num_threads(1)
    sam = load_sam(resolve("vit_t"))
    generator = MaskGenerator(Predictor(sam), MaskConfig(**QUICK))
    files = sorted(images.iterdir())
    generator.generate(decode_image(files[0].read_bytes()))
    start = time.monotonic()
    for file in files:
        generator.generate(decode_image(file.read_bytes()))
    return len(files) / (time.monotonic() - start)


def workers(work: Path) -> None:
    """Print what a second worker gains, and what two bare processes would."""
    images = copies(work / "photos", COPIES)
    one, two = throughput(work, images, 1), throughput(work, images, 2)
    print(f"Ray, 1 worker: {one:.3f} images/s; 2 workers: {two:.3f}; {two / one:.2f}x")
    processes = multiprocessing.get_context("spawn")
    with processes.Pool(1) as pool:
        alone = pool.apply(bare, (images,))
    with processes.Pool(2) as pool:
        both = sum(pool.map(bare, [images, images], chunksize=1))
    print(f"bare, 1 process: {alone:.3f} images/s; 2 processes: {both:.3f}; {both / alone:.2f}x")


def main() -> None:
    chosen = sys.argv[1:] or ["overhead", "workers"]
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            {"overhead": overhead, "workers": workers}[name](Path(folder))


if __name__ == "__main__":
    main()
