"""What a person sees of a run while it works, and how they stop it."""

import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from tqdm import tqdm

from sa_engine.errors import SaEngineError
from sa_engine.partial import PartialShard, list_begun
from sa_engine.plan import Shard
from sa_engine.storage import RunPaths

_POLL_S = 0.5
_LINE_S = 30.0


class Interrupted(SaEngineError):
    """The run was stopped by a signal; nothing is lost."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignal(BaseException):
    """Raised by SIGINT or SIGTERM; not an Exception, so that it costs no image a failure."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise `StopSignal` in the main thread; elsewhere do nothing."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise StopSignal(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def this_command() -> str:
    """The command line of this process, ready to be pasted into a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


class Progress:
    """Counts finished images, as a context manager: a bar on a terminal, else a line now and then.

    It looks at the finished images on disk, so it counts them wherever the workers are.
    """

    def __init__(self, paths: RunPaths, shards: Sequence[Shard], committed: int) -> None:
        """`committed` images are done; those of `shards` are to do."""
        self._paths = paths
        self._open = {shard.name for shard in shards}
        self._committed = committed
        self._total = committed + sum(len(shard.images) for shard in shards)
        self._stop = threading.Event()
        self._changed = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.reused = self._count() - committed

    def __enter__(self) -> "Progress":
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._watcher.join()

    def commit(self, name: str, images: int) -> None:
        """Count a shard as committed."""
        with self._changed:
            self._open.remove(name)
            self._committed += images

    def _count(self) -> int:
        with self._changed:
            begun = [name for name in list_begun(self._paths) if name in self._open]
            return self._committed + sum(PartialShard(self._paths, name).count() for name in begun)

    def _watch(self) -> None:
        if sys.stderr.isatty():
            self._draw_bar()
        else:
            self._write_lines()

    def _draw_bar(self) -> None:
        first = self._count()
        with tqdm(total=self._total, initial=first, unit="image", dynamic_ncols=True) as bar:
            running = True
            while running:
                running = not self._stop.wait(_POLL_S)
                # A shard's images leave the disk a moment before its commit is counted.
                bar.update(max(0, self._count() - bar.n))

    def _write_lines(self) -> None:
        start, first = time.monotonic(), self._count()
        while not self._stop.wait(_LINE_S):
            done = self._count()
            rate = (done - first) / (time.monotonic() - start)
            left = f", {(self._total - done) / rate / 60:.0f} min left" if rate > 0 else ""
            sys.stderr.write(f"{done} of {self._total} images, {rate:.2f} images/s{left}\n")
            sys.stderr.flush()
