"""How far a loop is: one file, `engine.json`, written whole after every change."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sa_engine import __version__
from sa_engine.engine.file import EngineError, Loop, Step
from sa_engine.export_folder import MARKER
from sa_engine.progress import duration
from sa_engine.storage import AnyPath, atomic_write, find_run, list_names, location

FILE = "engine.json"
SCHEMA_VERSION = 1
# JSON files that are told by their content, such as markers and model.json: their bytes, and, in a folder that is no
# run, the files beside them. An export has a JSON for every image.
_SMALL, _FEW = 1 << 20, 100
_WORDS = {"open": "-", "waiting": "waits", "failed": "FAILED"}


@dataclass
class StepState:
    """What is known of a step.

    Attributes:
        name, kind, command: of the step, when it was last begun.
        status: "open", "running", "done", "waiting", "failed" or "stopped".
        seconds: of work in it, over all sessions.
        ended: when it last ended, seconds since 1970; None: never.
        exit_code: of its command; None: it has not ended.
        report: the last lines that it wrote to its output.
        error: why it failed.
        reads: stamps of what it read, by step or file.
        wrote: stamp of its output.
    """

    name: str
    kind: str = ""
    command: str = ""
    status: str = "open"
    seconds: float = 0.0
    ended: float | None = None
    exit_code: int | None = None
    report: str = ""
    error: str = ""
    reads: dict[str, str] = field(default_factory=dict)
    wrote: str = ""

    def complete(self, step: Step) -> bool:
        """Whether a step has nothing to do: it is done, by the same command, and since then no file has changed."""
        return (
            self.status == "done"
            and self.command == step.command
            and self.reads == stamps(step)
            and self.wrote == stamp(step.out)
        )


@dataclass
class LoopState:
    """The content of `engine.json`.

    Attributes:
        file: of the loop.
        out: its folder, absolute.
        state: "running", "waiting", "failed", "stopped" or "finished".
        steps: in the loop's order.
        seconds: that the loop has worked, over all sessions.
    """

    file: str
    out: str
    state: str
    steps: list[StepState]

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    def __getitem__(self, name: str) -> StepState:
        return next(step for step in self.steps if step.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        known = {"schema_version": SCHEMA_VERSION, "version": __version__, "updated": time.time()}
        return {**known, **asdict(self)}

    def save(self) -> None:
        """Write it. Raises EngineError if the folder cannot be written."""
        path = Path(self.out) / FILE
        try:
            atomic_write(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        except OSError as error:
            raise EngineError(f"cannot write {path}: {error.strerror}") from None

    def __str__(self) -> str:
        """A line for each step."""
        width = max(len(step.name) for step in self.steps)
        done = sum(step.status == "done" for step in self.steps)
        lines = [f"{self.out}: {self.state}, {done} of {len(self.steps)} steps done"]
        for step in self.steps:
            took = duration(step.seconds) if step.seconds else ""
            last = step.error if step.status in ("failed", "waiting") else step.report
            line = last.splitlines()[0] if last else ""
            lines.append(
                f"{step.name:{width}}  {_WORDS.get(step.status, step.status):7}  {took:>7}  {line}".rstrip()
            )
        return "\n".join(lines)


def read_state(loop: Loop) -> LoopState:
    """The state of a loop, in the order that its file now has; a new one if there is none.

    A step that the file no longer has is forgotten, one that was running is stopped: nothing runs it any more.

    Raises:
        EngineError: the file is damaged, or of another version.
    """
    path = loop.out / FILE
    known: dict[str, StepState] = {}
    try:
        content = json.loads(path.read_bytes())
        if content["schema_version"] != SCHEMA_VERSION:
            raise EngineError(
                f"{path}: schema_version {content['schema_version']}, expected {SCHEMA_VERSION}: it is of "
                "another version of sa-engine"
            )
        known = {one["name"]: StepState(**one) for one in content["steps"]}
    except FileNotFoundError:
        content = {"state": "stopped"}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{path}: damaged ({error}); remove it: the next `engine run` asks every step anew whether it "
            "is complete"
        ) from None
    for step in known.values():
        step.status = "stopped" if step.status == "running" else step.status
    steps = [
        known.get(step.name, StepState(step.name, step.kind, step.command)) for step in loop.steps
    ]
    state = "stopped" if content["state"] == "running" else str(content["state"])
    return LoopState(str(loop.file), str(loop.out.resolve()), state, steps)


def stamps(step: Step) -> dict[str, str]:
    """What a step reads, by name, with a stamp of each: outputs of earlier steps, and files in its command line."""
    found = {name: stamp(place) for name, place in step.reads.items()}
    for word in step.words:
        for text in (word, word.partition("=")[2]):
            if text and text not in step.reads.values() and Path(text).is_file():
                found[text] = stamp(text)
    return found


def stamp(place: str | None) -> str:
    """A text that changes with what is in a place, "" if nothing is there; cheap, also for thousands of shards.

    Of a folder it is over the names and sizes at its top, and over the content of small JSON files, among which are
    the markers of shards and of rounds; a copy of a folder has the same. Of an export it is over the marker alone, as
    people may work in the folder. In an object store it is over the names.
    """
    if place is None:
        return ""
    where = location(place)
    if isinstance(where, Path):
        if where.is_file():
            about = where.stat()
            return f"{about.st_size} {about.st_mtime_ns}"
        if (where / MARKER).is_file():
            return hashlib.sha256((where / MARKER).read_bytes()).hexdigest()[:16]
    digest, found = hashlib.sha256(), 0
    run = find_run(where)
    # A tree of images has its markers beside it.
    for folder in [where] if run.work is None else [where, run.shards]:
        names = sorted(list_names(folder))
        found += len(names)
        whole = len(names) <= _FEW or run.info.exists()
        for name in names:
            digest.update(f"{name} {_inside(folder / name, whole)}\n".encode())
    return digest.hexdigest()[:16] if found else ""


def _inside(path: AnyPath, whole: bool) -> str:
    """The content of a small JSON file, if it is to be read, else a file's size."""
    if not isinstance(path, Path) or not path.is_file():
        return ""
    size = path.stat().st_size
    if whole and path.suffix == ".json" and size < _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return str(size)


def is_there(place: str) -> bool:
    """Whether what a step waits for has come: a file, or a folder with something in it."""
    where = location(place)
    if isinstance(where, Path):
        return where.is_file() or bool(list_names(where))
    return where.exists() or bool(list_names(where))
