"""What a stage must offer, and the worker that takes one shard through it."""

import multiprocessing
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sa_engine.config import RunConfig
from sa_engine.errors import SaEngineError
from sa_engine.listing import size_and_mtime_ns
from sa_engine.lock import read_lock
from sa_engine.partial import Breadcrumbs, Failure, PartialShard, pack
from sa_engine.plan import PlannedImage, Shard
from sa_engine.reader import reopen_shard
from sa_engine.records import ImageRecord
from sa_engine.shards import ShardStats, commit_shard
from sa_engine.storage import AnyPath, RunError, RunPaths, told_if_output_fails

_FATAL_DEATHS = 2
_FATAL_DEATHS_OUTSIDE = 5
# Held in place of an image's key while the model is loaded or the shard is written.
_NO_IMAGE = ""
_MESSAGE_LENGTH = 500
# More than the pixels of the largest picture that is decoded, with 16 bits a sample.
_LARGEST_FILE = 4_000_000_000


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

    def worker_memory(self, config: Any) -> int:
        """Bytes of memory that a worker takes at its peak, roughly; loads nothing."""


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs, wherever it runs.

    Attributes:
        stage: what to do.
        config: the stage's options.
        images: where the images are.
        paths: of the run.
        session: of the driver, see `RunLock` and `Breadcrumbs`.
        threads: CPU threads of the model.
        retry_failed: take up the failed images of shards that are committed.
        is_driver: the worker is in the driver's own process, so a crash takes both.
    """

    stage: Stage
    config: RunConfig
    images: AnyPath
    paths: RunPaths
    session: str
    threads: int
    retry_failed: bool = False
    is_driver: bool = False


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
            RunError: the run's folder is not held by this worker's driver (any more), the output
                cannot be written, or workers keep dying on the shard while they have none of its
                images in hand.
        """
        start = time.monotonic()
        paths = self._spec.paths
        with told_if_output_fails(paths):
            check_driver(self._spec)
            attempts: Mapping[int, int] = {}
            if paths.marker(shard.name).exists():
                stats = ShardStats.from_json(paths.marker(shard.name).read_bytes())
                if not (stats.failed and self._spec.retry_failed):
                    return stats  # committed by a worker that died before it could say so
                attempts = reopen_shard(paths, shard)
            store = PartialShard(paths, shard.name)
            breadcrumbs = Breadcrumbs(store, self._spec.session)
            _check_deaths(shard, breadcrumbs)
            if self._spec.is_driver:
                self._try_alone(shard, store, breadcrumbs)
            breadcrumbs.hold([_NO_IMAGE])
            todo = self._give_up_or_go_on(shard, store, breadcrumbs)
            if todo:
                pipeline = _Pipeline(self._spec, self._load(), store, breadcrumbs, attempts)
                for images in [[image] for image in todo] if breadcrumbs.deaths else [todo]:
                    pipeline.run(images)
            breadcrumbs.hold([_NO_IMAGE])
            check_driver(self._spec)
            seconds = time.monotonic() - start
            return commit_shard(paths, shard, self._spec.config.formats, seconds)

    def run_image(self, shard: Shard, image_id: int) -> None:
        """Take one image through the stage, so that it is saved or has failed; commits nothing."""
        store = PartialShard(self._spec.paths, shard.name)
        image = next(image for image in shard.images if image.image_id == image_id)
        _Pipeline(self._spec, self._load(), store, None, {}).run([image])

    def _give_up_or_go_on(
        self, shard: Shard, store: PartialShard, breadcrumbs: Breadcrumbs
    ) -> list[PlannedImage]:
        """The images to do; those that workers have died on too often become failures."""
        todo = []
        ended = store.ended()
        for image in shard.images:
            if image.image_id in ended and store.load(image.image_id) is not None:
                continue
            if breadcrumbs.deaths[image.key] >= _FATAL_DEATHS:
                store.fail(_worker_died(image, breadcrumbs.deaths[image.key]))
            else:
                todo.append(image)
        return todo

    def _try_alone(self, shard: Shard, store: PartialShard, breadcrumbs: Breadcrumbs) -> None:
        """Take images that may have crashed this worker's predecessor in processes of their own."""
        suspects = [image for image in shard.images if image.key in breadcrumbs.suspects]
        for index, image in enumerate(suspects):
            breadcrumbs.hold(suspect.key for suspect in suspects[index:])
            if store.load(image.image_id) is None:
                crashed = _crashes(self._spec, shard, image.image_id)
                if crashed and store.load(image.image_id) is None:
                    store.fail(_worker_died(image, _FATAL_DEATHS))

    def _load(self) -> StageWorker:
        if self._stage_worker is None:
            self._stage_worker = self._spec.stage.make_worker(self._spec.config)
            _limit_threads(self._spec.threads)
        return self._stage_worker


def check_driver(spec: WorkerSpec) -> None:
    """Raise RunError unless the run's folder is held by this worker's driver."""
    if read_lock(spec.paths).get("session") != spec.session:
        raise RunError(
            f"{spec.paths.out} is not held by this run (any more): another run has taken it, or "
            "this machine does not share that folder with the one that started"
        )


class _Pipeline:
    """Takes images through a stage's steps, each step busy with another image."""

    def __init__(
        self,
        spec: WorkerSpec,
        worker: StageWorker,
        store: PartialShard,
        breadcrumbs: Breadcrumbs | None,
        attempts: Mapping[int, int],
    ) -> None:
        self._spec = spec
        self._worker = worker
        self._store = store
        self._breadcrumbs = breadcrumbs
        self._attempts = attempts

    def run(self, images: Sequence[PlannedImage]) -> None:
        """Take images through all steps, so that each is saved or has failed."""
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(1) as behind:
            prepared = ahead.submit(self._prepare, images, 0)
            saved: Future[None] | None = None
            for index, image in enumerate(images):
                ready = prepared.result()
                if index + 1 < len(images):
                    prepared = ahead.submit(self._prepare, images, index + 1)
                result = self._step("process", image, self._worker.process, ready)
                if saved is not None:
                    saved.result()
                saved = behind.submit(self._finish, image, result)
            if saved is not None:
                saved.result()

    def _prepare(self, images: Sequence[PlannedImage], index: int) -> Any:
        """Read and decode an image, while its predecessors are in the other two steps."""
        image = images[index]
        if self._breadcrumbs is not None:
            self._breadcrumbs.hold(held.key for held in images[max(index - 2, 0) : index + 1])
        data = self._step("read", image, self._read)
        return self._step("prepare", image, self._worker.prepare, data)

    def _finish(self, image: PlannedImage, result: Any) -> None:
        finished = self._step("finish", image, self._encode, result)
        check_driver(self._spec)  # what it says now may be of other options than the run there has
        if isinstance(finished, Failure):
            self._store.fail(finished)
        else:
            self._store.save(image.image_id, finished)

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
                attempts=self._attempts.get(image.image_id, 0) + 1,
            )

    def _read(self, image: PlannedImage) -> bytes:
        """The photo's bytes. Raises RunError if it is not the file that was planned, or too large."""
        path = self._spec.images / image.key
        if not isinstance(path, Path):
            _check_unchanged(image, *path.size_and_mtime_ns())
            return path.read_bytes()
        if not stat.S_ISREG(path.stat().st_mode):  # asked first: to open a device may start it
            raise RunError("not a regular file")
        # Not blocking: a named pipe that has taken its place would wait for a writer for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            _check_unchanged(image, *size_and_mtime_ns(os.fstat(file.fileno())))
            return file.read()

    def _encode(self, image: PlannedImage, result: Any) -> bytes:
        """The finished image's file: its record and, if pictures are released, its JPEG."""
        record, jpeg = self._worker.finish(image, result)
        if record.image_id != image.image_id:
            raise ValueError(f"record of image {record.image_id} for image {image.image_id}")
        if not (self._spec.config.write_images and "tar" in self._spec.config.formats):
            return pack(record, None)
        if jpeg is None:
            raise ValueError("the stage made no picture, but write_images is on")
        return pack(record, jpeg)


def _check_unchanged(image: PlannedImage, size: int, mtime_ns: int) -> None:
    for name, planned, found in (
        ("size", image.size, size),
        ("mtime_ns", image.mtime_ns, mtime_ns),
    ):
        if found != planned:
            raise RunError(f"changed since the plan: {name} was {planned}, is {found}")
    if size > _LARGEST_FILE:
        raise RunError(f"a file of {size:,} bytes is no photo: at most {_LARGEST_FILE:,} are read")


def _crashes(spec: WorkerSpec, shard: Shard, image_id: int) -> bool:
    """Take an image through the stage in a process of its own; whether that was the end of it.

    If whoever stops the run stops that process too, it has not crashed.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=_run_image, args=(spec, shard, image_id), daemon=True
    )
    process.start()
    try:
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    ended_by = -(process.exitcode or 0)
    return ended_by > 0 and ended_by not in (signal.SIGINT, signal.SIGTERM)


def _run_image(spec: WorkerSpec, shard: Shard, image_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal it reaches both; the parent acts
    try:
        ShardWorker(spec).run_image(shard, image_id)
    except SaEngineError:  # such as missing weights: the parent will meet it too, and say so
        sys.exit(1)


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
