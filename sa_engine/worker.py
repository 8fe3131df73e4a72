"""The worker: takes a shard through a stage, commits it, and finds out which image workers die on."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

from sa_engine.errors import SaEngineError
from sa_engine.partial import Breadcrumbs, Failure, PartialShard
from sa_engine.pipeline import Pipeline, StageWorker, WorkerSpec, check_driver
from sa_engine.plan import PlannedImage, Shard
from sa_engine.reader import reopen_shard
from sa_engine.shards import ShardStats, commit_shard
from sa_engine.storage import RunError, told_if_output_fails
from sa_engine.tree import withdraw

_FATAL_DEATHS = 2
_FATAL_DEATHS_OUTSIDE = 5
# Held in place of an image's key while the model is loaded or the shard is written.
_NO_IMAGE = ""


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
                pipeline = Pipeline(self._spec, self._load(), store, breadcrumbs, attempts)
                for images in [[image] for image in todo] if breadcrumbs.deaths else [todo]:
                    pipeline.run(images)
            breadcrumbs.hold([_NO_IMAGE])
            check_driver(self._spec)
            seconds = time.monotonic() - start
            return commit_shard(paths, shard, self._spec.config.shard_formats(), seconds)

    def run_image(self, shard: Shard, image_id: int) -> None:
        """Take one image through the stage, so that it is saved or has failed; commits nothing."""
        store = PartialShard(self._spec.paths, shard.name)
        image = next(image for image in shard.images if image.image_id == image_id)
        Pipeline(self._spec, self._load(), store, None, {}).run([image])

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
                self._give_up(store, image, breadcrumbs.deaths[image.key])
            else:
                todo.append(image)
        return todo

    def _give_up(self, store: PartialShard, image: PlannedImage, deaths: int) -> None:
        withdraw(self._spec.paths, image.key)
        store.fail(_worker_died(image, deaths))

    def _try_alone(self, shard: Shard, store: PartialShard, breadcrumbs: Breadcrumbs) -> None:
        """Take images that may have crashed this worker's predecessor in processes of their own."""
        suspects = [image for image in shard.images if image.key in breadcrumbs.suspects]
        for index, image in enumerate(suspects):
            breadcrumbs.hold(suspect.key for suspect in suspects[index:])
            if store.load(image.image_id) is None:
                crashed = _crashes(self._spec, shard, image.image_id)
                if crashed and store.load(image.image_id) is None:
                    self._give_up(store, image, _FATAL_DEATHS)

    def _load(self) -> StageWorker:
        if self._stage_worker is None:
            settled = replace(self._spec.config, threads_per_worker=self._spec.threads)
            self._stage_worker = self._spec.stage.make_worker(settled)
            _limit_threads(self._spec.threads)
        return self._stage_worker


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
