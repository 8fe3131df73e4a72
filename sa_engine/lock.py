"""Who runs in a folder: one live process at a time, by host and process id, with a heartbeat.

On this machine's file systems the operating system's file lock decides, which a dead process loses
at once. Elsewhere (another host on a shared disk, an object store) a run is believed to live while
its heartbeat is fresh. Workers compare the lock's session with their driver's before they start
and before they commit, so that a run whose lock was taken puts no more shards in place.
"""

import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from sa_engine.storage import RunError, RunPaths, atomic_write, modified

_BEAT_S = 15.0
# A driver whose machine stalls for a few beats is not dead yet.
_DEAD_AFTER_S = 180.0
# The system reckons a process's birth from its boot, whose time moves when the clock is set.
_BIRTH_S = 30.0
_CLOCK = "clock"


class RunLock:
    """Holds a run's folder for this process, as a context manager.

    Args:
        paths: of the run.
        session: unique to this start of the run.
        steal: take the lock from whoever holds it.
    """

    def __init__(self, paths: RunPaths, session: str, steal: bool = False) -> None:
        self._paths = paths
        self._session = session
        self._steal = steal
        self._file = -1
        self._started = time.time()
        self._progress: dict[str, Any] = {}
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "RunLock":
        """Take the lock. Raises RunError, naming the holder, if a live run has it."""
        if isinstance(self._paths.lock, Path):
            self._take_local(self._paths.lock)
        else:
            self._refuse_if_held()
            self._sign()
        self._heart.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock, and remove the run's folders if nothing was written into them."""
        self._released.set()
        self._heart.join()
        if self.held():  # otherwise it is another run's by now
            self._paths.heartbeat.unlink(missing_ok=True)
            self._paths.lock.unlink(missing_ok=True)
        if self._file >= 0:
            os.close(self._file)
        for folder in (self._paths.scratch, self._paths.shards, self._paths.run, self._paths.out):
            if isinstance(folder, Path):
                with suppress(OSError):  # there is something in it
                    folder.rmdir()

    def held(self) -> bool:
        """Whether the lock is still this session's."""
        return read_lock(self._paths).get("session") == self._session

    def tell(self, **progress: Any) -> None:
        """Say how far the run is; the next heartbeat carries it."""
        self._progress = progress

    def _take_local(self, lock: Path) -> None:
        while True:
            file = self._open(lock)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                if not self._steal:
                    advice = "end that run first, use another --out, or take over with --steal-lock"
                    raise RunError(self._held(advice)) from None
                lock.unlink(missing_ok=True)  # its holder keeps a lock on a file without a name
                continue
            if os.fstat(file).st_nlink:
                break
            os.close(file)  # its last holder removed it between our open and our lock
        try:
            if read_lock(self._paths).get("host") != socket.gethostname():
                self._refuse_if_held()  # a shared file system may not carry locks between hosts
        except RunError:
            os.close(file)
            raise
        self._file = file
        self._sign()

    def _open(self, lock: Path) -> int:
        try:
            # A folder of its own holds an audit, which is nobody else's business.
            mode = 0o777 if self._paths.work is None else 0o700
            lock.parent.mkdir(mode, parents=True, exist_ok=True)
            return os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"cannot write to the output {self._paths.out}: {error}") from None

    def _refuse_if_held(self) -> None:
        """Raise RunError if the lock names a run that may still live."""
        if self._steal or not is_live(self._paths, probe=True):
            return
        silent = silence(self._paths, probe=True)
        raise RunError(
            self._held(
                f"its last sign of life is {silent:.0f} s old; it counts as dead after "
                f"{_DEAD_AFTER_S:.0f} s, or at once with --steal-lock"
            )
        )

    def _sign(self) -> None:
        process = psutil.Process()
        holder = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "born": process.create_time(),
            "session": self._session,
        }
        content = json.dumps(holder).encode()
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, content, 0)
        else:
            atomic_write(self._paths.lock, content)
        self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        content = {
            "session": self._session,
            "started": self._started,
            "updated": time.time(),
            **self._progress,
        }
        data = json.dumps(content).encode()
        atomic_write(self._paths.heartbeat, data, scratch=self._paths.scratch, durable=False)

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_S):
            with suppress(OSError):  # a disk that is full is told where the work is written
                if self.held():
                    self._write_heartbeat()

    def _held(self, advice: str) -> str:
        holder = read_lock(self._paths)
        return (
            f"{self._paths.out} is in use by another run: process {holder.get('pid', '?')} "
            f"on host {holder.get('host', '?')}; {advice}"
        )


def read_lock(paths: RunPaths) -> dict[str, Any]:
    """Host, pid, birth and session of the run that holds a folder; empty if none does."""
    return _read_json(paths.lock)


def read_heartbeat(paths: RunPaths) -> dict[str, Any]:
    """What the run in a folder last said of its progress; empty if it has not."""
    return _read_json(paths.heartbeat)


def is_live(paths: RunPaths, probe: bool = False) -> bool:
    """Whether the process that the lock names lives, as far as can be told from here.

    Of another host it is its heartbeat that tells; `probe` as for `silence`.
    """
    holder = read_lock(paths)
    if not holder:
        return False
    if holder.get("host") == socket.gethostname():
        try:
            process = psutil.Process(int(holder["pid"]))
            return abs(process.create_time() - holder["born"]) < _BIRTH_S
        except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
            return False
    return silence(paths, probe) < _DEAD_AFTER_S


def silence(paths: RunPaths, probe: bool) -> float:
    """Seconds since the last heartbeat.

    Args:
        paths: of the run.
        probe: write a file to read the clock of the file system, which may differ from ours.
    """
    now = time.time()
    if probe:
        clock = paths.run / _CLOCK
        atomic_write(clock, b"", durable=False)
        now = modified(clock)
        clock.unlink(missing_ok=True)
    for sign in (paths.heartbeat, paths.lock):
        try:
            return max(0.0, now - modified(sign))
        except FileNotFoundError:
            continue
    return float("inf")


def _read_json(path: Any) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
