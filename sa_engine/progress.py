"""What a person sees of a run while it works, and how they stop it."""

import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType

from tqdm import tqdm

from sa_engine.errors import SaEngineError
from sa_engine.partial import PartialShard, list_begun
from sa_engine.storage import RunPaths

_POLL_S = 0.5
_REMOTE_POLL_S = 10.0  # a store counts every look
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


# What a command asks for once: repeated, it would undo what has been done since.
_ONCE = ("--overwrite", "--steal-lock")


def this_command() -> str:
    """The command line that goes on with this process's run, ready to be pasted into a shell."""
    words = [word for word in sys.argv[1:] if word not in _ONCE]
    return shlex.join([Path(sys.argv[0]).name, *words])


class Progress:
    """Counts finished images, as a context manager: a bar on a terminal, else a line now and then.

    It looks at the finished images in the run's folder, so it counts them wherever the workers are.
    """

    def __init__(
        self,
        paths: RunPaths,
        unfinished: Mapping[str, int],
        committed: int,
        tell: Callable[..., None] | None = None,
    ) -> None:
        """Start to count.

        Args:
            paths: of the run.
            unfinished: images of each shard that is to do, by name.
            committed: images of the other shards.
            tell: called now and then with what is known, for the heartbeat.
        """
        self._paths = paths
        self._open = dict(unfinished)
        self._committed = committed
        self._total = committed + sum(unfinished.values())
        self._tell = tell or (lambda **known: None)
        self._stop = threading.Event()
        self._changed = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

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

    def commit(self, name: str) -> None:
        """Count a shard as committed."""
        with self._changed:
            self._committed += self._open.pop(name)

    def _count(self) -> int:
        with self._changed:
            begun = [name for name in list_begun(self._paths) if name in self._open]
            ended = sum(len(PartialShard(self._paths, name).ended()) for name in begun)
            return self._committed + ended

    def _watch(self) -> None:
        start, first = time.time(), self._count()
        poll = _POLL_S if isinstance(self._paths.out, Path) else _REMOTE_POLL_S
        with self._bar(first) if sys.stderr.isatty() else self._lines(first) as show:
            running = True
            done = first
            while running:
                running = not self._stop.wait(poll)
                with suppress(
                    OSError
                ):  # a store that does not answer now may do so at the next look
                    # A shard's images leave the disk a moment before its commit is counted.
                    done = max(done, self._count())
                show(done)
                self._tell(since=start, images_at_start=first, images=done, total=self._total)

    @contextmanager
    def _bar(self, first: int) -> Iterator[Callable[[int], None]]:
        with tqdm(total=self._total, initial=first, unit="image", dynamic_ncols=True) as bar:

            def show(done: int) -> None:
                bar.update(done - bar.n)

            yield show

    @contextmanager
    def _lines(self, first: int) -> Iterator[Callable[[int], None]]:
        start = last = time.monotonic()

        def show(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if self._stop.is_set() or now - last < _LINE_S:
                return
            last = now
            rate = (done - first) / (now - start)
            left = f", {duration((self._total - done) / rate)} left" if rate > 0 else ""
            sys.stderr.write(f"{done} of {self._total} images, {rate:.2f} images/s{left}\n")
            sys.stderr.flush()

        yield show


def duration(seconds: float) -> str:
    """A time span as a person says it: 40 s, 12 min, 3.5 h, 4.2 days."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (129_600, 3600, "h")):
        if seconds < limit:
            return (
                f"{seconds / unit:.1f} {name}" if unit == 3600 else f"{seconds / unit:.0f} {name}"
            )
    return f"{seconds / 86_400:.1f} days"
