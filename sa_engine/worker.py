"""What a stage must offer, and the worker that takes one shard through it."""

import os
import stat
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sa_engine.config import RunConfig
from sa_engine.errors import SaEngineError
from sa_engine.partial import Breadcrumbs, Failure, PartialShard
from sa_engine.plan import PlannedImage, Shard
from sa_engine.records import ImageRecord, to_json
from sa_engine.shards import ShardStats, commit_shard
from sa_engine.storage import RunError, RunPaths, read_lock

_FATAL_DEATHS = 2
_FATAL_DEATHS_OUTSIDE = 5
# Held in place of an image's key while the model is loaded or the shard is written.
_NO_IMAGE = ""
_MESSAGE_LENGTH = 500


class SkipImage(SaEngineError):
    """Raised by a stage that leaves an image out on purpose; the message says why."""


class StageWorker(Protocol):
    """Takes images through a stage, in three steps so that CPU and GPU work overlap.

    An exception in a step fails that image alone.
    """

    def prepare(self, item: PlannedImage, data: bytes) -> Any:
        """Decode and resize; runs in a thread, one image ahead of `process`."""

    def process(self, item: PlannedImage, prepared: Any) -> Any:
        """Run the model; always in the main thread."""

    def finish(self, item: PlannedImage, result: Any) -> tuple[ImageRecord, bytes | None]:
        """Make the record and the JPEG (None: no picture); runs in a thread, one image behind."""


class Stage(Protocol):
    """A stage of the data engine. It is sent to the workers, so it must pickle."""

    name: str

    def make_worker(self, config: Any) -> StageWorker:
        """Load the model; called once in every worker process that has work."""


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs, wherever it runs.

    Attributes:
        stage: what to do.
        config: the stage's options.
        images: absolute path of the images folder.
        paths: of the run, absolute.
        session: of the driver, see `RunLock` and `Breadcrumbs`.
        threads: CPU threads of the model.
    """

    stage: Stage
    config: RunConfig
    images: Path
    paths: RunPaths
    session: str
    threads: int


class ShardWorker:
    """Takes shards through a stage and commits them."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._stage_worker: StageWorker | None = None

    def run(self, shard: Shard) -> ShardStats:
        """Finish what a shard lacks and commit it.

        If a worker has died on this shard, its images are taken one by one; an image that a worker
        dies on twice is given up.

        Raises:
            RunError: the run's folder is not held by this worker's driver (any more), or workers
                keep dying on the shard while they have none of its images in hand.
        """
        start = time.monotonic()
        self._check_driver()
        marker = self._spec.paths.marker(shard.name)
        if marker.exists():  # committed by a worker that died before it could say so
            return ShardStats.from_json(marker.read_bytes())
        store = PartialShard(self._spec.paths, shard.name)
        breadcrumbs = Breadcrumbs(store, self._spec.session)
        _check_deaths(shard, breadcrumbs)
        breadcrumbs.hold([_NO_IMAGE])
        todo = []
        for image in shard.images:
            if store.load(image.image_id) is not None:
                continue
            if breadcrumbs.deaths[image.key] >= _FATAL_DEATHS:
                store.fail(_worker_died(image, breadcrumbs.deaths[image.key]))
            else:
                todo.append(image)
        if todo:
            pipeline = _Pipeline(self._spec, self._load(), store, breadcrumbs)
            for images in [[image] for image in todo] if breadcrumbs.deaths else [todo]:
                pipeline.run(images)
        breadcrumbs.hold([_NO_IMAGE])
        self._check_driver()
        seconds = time.monotonic() - start
        return commit_shard(self._spec.paths, shard, self._spec.config.formats, seconds)

    def _load(self) -> StageWorker:
        if self._stage_worker is None:
            self._stage_worker = self._spec.stage.make_worker(self._spec.config)
            _limit_threads(self._spec.threads)
        return self._stage_worker

    def _check_driver(self) -> None:
        if read_lock(self._spec.paths).get("session") != self._spec.session:
            raise RunError(
                f"{self._spec.paths.out} is not held by this run (any more): another run has "
                "taken it, or this machine does not share that folder with the one that started"
            )


class _Pipeline:
    """Takes images through a stage's steps, each step busy with another image."""

    def __init__(
        self,
        spec: WorkerSpec,
        worker: StageWorker,
        store: PartialShard,
        breadcrumbs: Breadcrumbs,
    ) -> None:
        self._spec = spec
        self._worker = worker
        self._store = store
        self._breadcrumbs = breadcrumbs

    def run(self, images: Sequence[PlannedImage]) -> None:
        """Take images through all steps, so that each is saved or has failed."""
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
            self._breadcrumbs.hold([images[0].key])
            prepared = ahead.submit(self._prepare, images[0])
            saved: Future[None] | None = None
            for index, image in enumerate(images):
                self._breadcrumbs.hold(held.key for held in images[max(index - 1, 0) : index + 2])
                ready = prepared.result()
                if index + 1 < len(images):
                    prepared = ahead.submit(self._prepare, images[index + 1])
                result = self._step("process", image, self._worker.process, ready)
                if saved is not None:
                    saved.result()
                saved = behind.submit(self._finish, image, result)
            if saved is not None:
                saved.result()

    def _prepare(self, image: PlannedImage) -> Any:
        data = self._step("read", image, self._read)
        return self._step("prepare", image, self._worker.prepare, data)

    def _finish(self, image: PlannedImage, result: Any) -> None:
        finished = self._step("finish", image, self._encode, result)
        if isinstance(finished, Failure):
            self._store.fail(finished)
        else:
            self._store.save(image.image_id, *finished)

    def _step(
        self, step: str, image: PlannedImage, function: Callable[..., Any], *inputs: Any
    ) -> Any:
        """Run one step of one image; what a failed image passes on is its Failure."""
        if inputs and isinstance(inputs[0], Failure):
            return inputs[0]
        try:
            return function(image, *inputs)
        except Exception as error:  # whatever a photo sets off must cost that photo alone
            return Failure(
                key=image.key,
                image_id=image.image_id,
                status="skipped" if isinstance(error, SkipImage) else "failed",
                step=step,
                error=type(error).__name__,
                message=" ".join(str(error).split())[:_MESSAGE_LENGTH],
            )

    def _read(self, image: PlannedImage) -> bytes:
        """The photo's bytes. Raises RunError if it is not the file that was planned."""
        path = self._spec.images / image.key
        # Not blocking: a named pipe would wait for a writer for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RunError("not a regular file")
            data = file.read()
        for name, planned, found in (
            ("size", image.size, len(data)),
            ("mtime_ns", image.mtime_ns, status.st_mtime_ns),
        ):
            if found != planned:
                raise RunError(f"changed since the plan: {name} was {planned}, is {found}")
        return data

    def _encode(self, image: PlannedImage, result: Any) -> tuple[str, bytes | None]:
        """The image's record as JSON and, if pictures are released, its JPEG."""
        record, jpeg = self._worker.finish(image, result)
        if record.image_id != image.image_id:
            raise ValueError(f"record of image {record.image_id} for image {image.image_id}")
        if not (self._spec.config.write_images and "tar" in self._spec.config.formats):
            return to_json(record), None
        if jpeg is None:
            raise ValueError("the stage made no picture, but write_images is on")
        return to_json(record), jpeg


def _check_deaths(shard: Shard, breadcrumbs: Breadcrumbs) -> None:
    deaths = breadcrumbs.deaths[_NO_IMAGE]
    if deaths >= _FATAL_DEATHS_OUTSIDE:
        raise RunError(
            f"workers have died {deaths} times on shard {shard.name} while they loaded the model "
            "or wrote the shard: is there enough memory for --num-workers of them?"
        )


def _limit_threads(threads: int) -> None:
    """Give the libraries that the stage has loaded `threads` CPU threads: it changes their sums."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(threads)


def _worker_died(image: PlannedImage, deaths: int) -> Failure:
    return Failure(
        key=image.key,
        image_id=image.image_id,
        status="failed",
        step="process",
        error="WorkerDied",
        message=f"worker died {deaths} times with this image in hand, at last with it alone",
        attempts=deaths,
    )
