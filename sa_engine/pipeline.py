"""What a stage must offer, and the pipeline that takes images through its steps, each busy with another image."""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sa_engine.errors import SaEngineError
from sa_engine.listing import size_and_mtime_ns
from sa_engine.lock import read_lock
from sa_engine.option_groups import RunConfig
from sa_engine.partial import Breadcrumbs, Failure, Finished, PartialShard, one_line
from sa_engine.plan import PlannedImage
from sa_engine.storage import AnyPath, RunError, RunPaths, atomic_write, is_disk_error
from sa_engine.tree import tree_scratch, withdraw

# More than the pixels of the largest picture that is decoded, with 16 bits a sample.
_LARGEST_FILE = 4_000_000_000


class SkipImage(SaEngineError):
    """Raised by a stage that leaves an image out on purpose; the message says why."""


class OutputFailed(Exception):
    """The output's disk or store has failed, which costs no image but ends the run."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class StageWorker(Protocol):
    """Takes images through a stage, in three steps so that CPU and GPU work overlap.

    An exception in a step fails that image alone.
    """

    def prepare(self, item: PlannedImage, data: bytes) -> Any:
        """Decode and resize; runs in a thread, one image ahead of `process`."""

    def process(self, item: PlannedImage, prepared: Any) -> Any:
        """Run the model; always in the main thread."""

    def finish(self, item: PlannedImage, result: Any) -> Finished:
        """Encode what the shard is made of; runs in a thread, one image behind."""


class Stage(Protocol):
    """A stage of the data engine. It is sent to the workers, so it must pickle."""

    name: str

    def make_worker(self, config: Any) -> StageWorker:
        """Load the model; called once in every worker process that has work.

        `config.threads_per_worker` is settled by now.
        """

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


def check_driver(spec: WorkerSpec) -> None:
    """Raise RunError unless the run's folder is held by this worker's driver."""
    if read_lock(spec.paths).get("session") != spec.session:
        raise RunError(
            f"{spec.paths.out} is not held by this run (any more): another run has taken it, or "
            "this machine does not share that folder with the one that started"
        )


class Pipeline:
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
        if not isinstance(finished, Failure):
            finished = self._step("finish", image, self._release, finished)
        if isinstance(finished, Failure):
            withdraw(self._spec.paths, image.key)
            self._store.fail(finished)
        else:
            self._store.save(finished)

    def _step(
        self, step: str, image: PlannedImage, function: Callable[..., Any], *inputs: Any
    ) -> Any:
        """Run one step of one image; what a failed image passes on is its Failure."""
        if inputs and isinstance(inputs[0], Failure):
            return inputs[0]
        try:
            return function(image, *inputs)
        except OutputFailed as failed:
            raise failed.error from None
        except Exception as error:  # whatever a photo sets off must cost that photo alone
            return Failure(
                key=image.key,
                image_id=image.image_id,
                status="skipped" if isinstance(error, SkipImage) else "failed",
                step=step,
                error=type(error).__name__,
                message=one_line(str(error)),
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

    def _encode(self, image: PlannedImage, result: Any) -> Finished:
        """The finished image, with all parts that its shard needs and no other."""
        finished = self._worker.finish(image, result)
        if finished.image_id != image.image_id:
            raise ValueError(f"record of image {finished.image_id} for image {image.image_id}")
        needed = self._spec.config.parts()
        missing = [name for name in needed if name not in finished.parts]
        if missing:
            raise ValueError(f"the stage made no {missing[0]}, which the shards need")
        kept = (*needed, "audit", "left_out")
        parts = {name: part for name, part in finished.parts.items() if name in kept}
        return replace(finished, parts=parts)

    def _release(self, image: PlannedImage, finished: Finished) -> Finished:
        """Put the files in place that are an image's own. A broken disk is not the image's fault."""
        out = self._spec.paths.out
        try:
            for name, data in finished.released.items():
                atomic_write(out / name, data, scratch=tree_scratch(self._spec.paths))
        except OSError as error:
            if is_disk_error(error) or not isinstance(out, Path):
                raise OutputFailed(error) from error
            raise
        return finished


def _check_unchanged(image: PlannedImage, size: int, mtime_ns: int) -> None:
    for name, planned, found in (
        ("size", image.size, size),
        ("mtime_ns", image.mtime_ns, mtime_ns),
    ):
        if found != planned:
            raise RunError(f"changed since the plan: {name} was {planned}, is {found}")
    if size > _LARGEST_FILE:
        raise RunError(f"a file of {size:,} bytes is no photo: at most {_LARGEST_FILE:,} are read")
