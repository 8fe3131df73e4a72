"""A step's command in a process of its own: its output is passed on and kept, and so are signals to it."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from sa_engine.engine.file import PROGRAM

Tell = Callable[[str, bool], None]  # a line, and whether it is of the error output

# The working directory is not searched for modules, as it is not when a user types the command.
_START = (
    f"import sys; sys.path[:] = filter(None, sys.path); sys.argv[0] = {PROGRAM!r}; "
    "from sa_engine.cli import main; main()"
)
_KEPT = 12  # last lines of an output
_LAST_WORDS_S = 5.0


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        exit_code: as a shell would tell it: 128 + the number of a signal that killed it.
        report: last lines of its output.
        error: of its error output, the lines from the last one on that begins with "Error:"; else the last ones.
    """

    exit_code: int
    report: str
    error: str


class Commands:
    """Runs commands, one at a time, as a context manager that passes SIGINT and SIGTERM on to them.

    Each is the leader of a process group of its own, so that Ctrl-C reaches it once, from here.

    Attributes:
        signum: the first signal that came; 0: none.
    """

    def __init__(self, tell: Tell) -> None:
        self.signum = 0
        self._tell = tell
        self._child: subprocess.Popen[str] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Commands":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signum)

    def run(self, words: tuple[str, ...], log: Path) -> Ended:
        """Run a command of sa-engine to its end.

        Args:
            words: the command line without the program.
            log: file that its output is added to.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join([PROGRAM, *words])}\n")
            child = subprocess.Popen(
                [sys.executable, "-c", _START, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
                text=True,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
            self._child = child
            if self.signum:  # it came before there was a process to send it to
                child.send_signal(self.signum)
            lock = threading.Lock()
            kept = [deque[str](maxlen=_KEPT), deque[str](maxlen=4 * _KEPT)]

            def pump(stream: IO[str], lines: deque[str], wrong: bool) -> None:
                for line in stream:
                    with lock:
                        if file.closed:
                            return
                        lines.append(line.rstrip())
                        file.write(line)
                        file.flush()
                        with suppress(OSError):  # nobody reads it any more, as after `| head`
                            self._tell(line.rstrip("\n"), wrong)

            assert child.stdout is not None and child.stderr is not None
            threads = [
                threading.Thread(target=pump, args=(stream, lines, bool(wrong)), daemon=True)
                for wrong, (stream, lines) in enumerate(
                    zip((child.stdout, child.stderr), kept, strict=True)
                )
            ]
            for thread in threads:
                thread.start()
            code = child.wait()
            for thread in threads:  # what it started may hold its output open and live on
                thread.join(_LAST_WORDS_S)
        self._child = None
        return Ended(code if code >= 0 else 128 - code, "\n".join(kept[0]), _error(list(kept[1])))


def _error(lines: list[str]) -> str:
    starts = [number for number, line in enumerate(lines) if line.startswith("Error:")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-5:])
