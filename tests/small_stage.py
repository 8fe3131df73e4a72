"""A small real stage for tests of the runner: brightness bands of a photo, no neural network.

Ray's workers and subprocesses import it; as a script it is a driver of its own:
`python small_stage.py IMAGES OUT key=value ... --extend ...`
"""

import hashlib
import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from sa_engine import runner
from sa_engine.errors import SaEngineError
from sa_engine.option_groups import ShardConfig
from sa_engine.options import load_config, option
from sa_engine.partial import Finished, finished_record
from sa_engine.pipeline import WorkerSpec
from sa_engine.plan import PlannedImage, read_plan
from sa_engine.records import ImageRecord, MaskRecord, image_name, mask_id
from sa_engine.remote import RemotePath
from sa_engine.storage import RunPaths
from sa_engine.worker import ShardWorker


@dataclass(frozen=True, kw_only=True)
class SmallConfig(ShardConfig):
    bands: int = option(4, bounds=(1, 16), identity=True, help="Brightness bands.")
    kill: str | None = option(None, help="KEY:STEP at which the process kills itself.")
    kill_once: str | None = option(None, help="File that says that it has.")
    skip: str | None = option(None, help="Key of an image that the stage leaves out.")
    slow: str | None = option(None, help="Key of an image that takes very long.")
    seconds: float = option(0.0, help="Time that an image takes at least.")
    model: str = option("a", help="Stands for the weights.")


@dataclass(frozen=True)
class SmallStage:
    name: str = "small"

    def worker_memory(self, config: SmallConfig) -> int:
        return 200_000_000

    def make_worker(self, config: SmallConfig) -> "SmallWorker":
        return SmallWorker(config)


class SmallWorker:
    def __init__(self, config: SmallConfig) -> None:
        self.config = config

    def prepare(self, item: PlannedImage, data: bytes) -> tuple[np.ndarray, str]:
        self._perhaps_die(item, "prepare")
        if item.key == self.config.skip:
            raise runner.SkipImage("left out on purpose")
        image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        return image, hashlib.sha256(data).hexdigest()

    def process(self, item: PlannedImage, prepared: tuple[np.ndarray, str]) -> Any:
        self._perhaps_die(item, "process")
        time.sleep(60 if item.key == self.config.slow else self.config.seconds)
        image, sha256 = prepared
        band = image.mean(axis=2) * self.config.bands // 256
        return image, sha256, [band == number for number in range(self.config.bands)]

    def finish(self, item: PlannedImage, result: Any) -> Finished:
        self._perhaps_die(item, "finish")
        image, sha256, bands = result
        height, width = image.shape[:2]
        masks = [band for band in bands if band.any()]
        record = ImageRecord(
            image_id=item.image_id,
            width=width,
            height=height,
            file_name=image_name(item.image_id),
            source_path=item.key,
            sha256=sha256,
            masks=tuple(
                mask_record(mask_id(item.image_id, index), mask) for index, mask in enumerate(masks)
            ),
        )
        if not self.config.write_images:
            return finished_record(record, None)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=self.config.jpeg_quality)
        return finished_record(record, buffer.getvalue())

    def _perhaps_die(self, item: PlannedImage, step: str) -> None:
        if self.config.kill != f"{item.key}:{step}":
            return
        if self.config.kill_once is not None:
            try:
                Path(self.config.kill_once).touch(exist_ok=False)
            except FileExistsError:
                return
        os.kill(os.getpid(), signal.SIGKILL)


def mask_record(number: int, mask: np.ndarray) -> MaskRecord:
    rle = coco.encode(np.asfortranarray(mask))
    rows, columns = np.nonzero(mask)
    return MaskRecord(
        id=number,
        segmentation={"size": list(mask.shape), "counts": rle["counts"].decode()},
        area=int(mask.sum()),
        bbox=[
            float(columns.min()),
            float(rows.min()),
            float(columns.max() - columns.min()),
            float(rows.max() - rows.min()),
        ],
        predicted_iou=float(np.float32(mask.mean())),
        stability_score=0.96,
        point_coords=[[float(columns[0]) + 0.5, float(rows[0]) + 0.5]],
        crop_box=[0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])],
        source="automatic",
        model_fingerprint="bands",
    )


def small_config(images: Path | str, out: Path | str, **options: Any) -> SmallConfig:
    given = {"local": True, "shard_size": 2, "threads_per_worker": 1, **options}
    return SmallConfig(images=str(images), out=str(out), **given)


def run(config: SmallConfig, **start: bool) -> runner.Report:
    identity = lambda: {"model_fingerprint": config.model}  # noqa: E731
    return runner.run(SmallStage(), config, identity, runner.Start(**start))


def drive(
    config: SmallConfig, fatal_replace: int = 0, start: Mapping[str, bool] | None = None
) -> None:
    """Run in a process that may die."""
    kill_at_replace(fatal_replace)
    run(config, **(start or {}))


def drive_on_small_disk(config: SmallConfig, limit: int, killed: bool) -> None:
    """Run where no file can exceed `limit` bytes: the write that does fails, or kills."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(config)


def work(config: SmallConfig, fatal_replace: int = 0) -> None:
    """Take the first shard of a planned run through a worker of the session "living"."""
    kill_at_replace(fatal_replace)
    paths = RunPaths(Path(config.out))
    spec = WorkerSpec(
        stage=SmallStage(),
        config=config,
        images=Path(config.images),
        paths=paths,
        session="living",
        threads=1,
    )
    ShardWorker(spec).run(read_plan(paths.plan)[0])


def main() -> None:
    images, out, *words = sys.argv[1:]
    sets = [word for word in words if not word.startswith("--")]
    start = {word[2:].replace("-", "_"): True for word in words if word.startswith("--")}
    given = {"images": images, "out": out, "threads_per_worker": 1}
    try:
        config = load_config(SmallConfig, None, ["shard_size=2", *sets], given)
        report = run(config, **start)
    except SaEngineError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    heavy = sorted({"torch", "ray", "pandas"} & set(sys.modules))
    print(json.dumps({"ok": report.ok, "heavy": heavy}))


def kill_at_replace(number: int) -> None:
    """Kill this process just before it puts its `number`-th file in place; 0: never."""
    if not number:
        return
    calls = iter(range(1, 1 << 20))

    def or_die(function: Any) -> Any:
        def call(*inputs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*inputs)

        return call

    os.replace = or_die(os.replace)
    RemotePath.put = or_die(RemotePath.put)


if __name__ == "__main__":
    from small_stage import main as importable_main  # so that Ray's workers find the classes

    importable_main()
