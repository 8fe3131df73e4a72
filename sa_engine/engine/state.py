"""How far a loop is: one file, `engine.json`, written whole after every change."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from sa_engine import __version__
from sa_engine.engine.file import EngineError, Loop, Step
from sa_engine.export_folder import MARKER
from sa_engine.listing import walk
from sa_engine.progress import duration
from sa_engine.remote import is_uri
from sa_engine.rounds import INFO, RoundError, read_round
from sa_engine.storage import AnyPath, atomic_write, find_run, list_names, location

FILE = "engine.json"
SCHEMA_VERSION = 1
_SMALL = 1 << 20  # bytes of a JSON that is told by its content, such as a marker or model.json
_MOST = 1_000_000  # files of a folder that is no run; 100,000 take about a second
_WRITTEN = ("out", "work", "review", "embeddings")  # options that name what a command writes
_WORDS = {"open": "-", "waiting": "waits", "failed": "FAILED", "refused": "REFUSED"}


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
        refused: why the gate refused the round that it made; "" if it did not.
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
    refused: str = ""

    @property
    def shown(self) -> str:
        """The status as people see it: a step that is done may have made a round that they must know of."""
        return "refused" if self.status == "done" and self.refused else self.status

    def complete(self, step: Step, loop: Loop) -> bool:
        """Whether a step has nothing to do: it is done, by the same command, and since then no file has changed."""
        return (
            self.status == "done"
            and self.command == step.command
            and self.reads == stamps(step, loop)
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
            if step.shown == "refused":
                last = f"the gate refused this round: {step.refused}"
            line = last.splitlines()[0] if last else ""
            lines.append(
                f"{step.name:{width}}  {_WORDS.get(step.shown, step.shown):7}  {took:>7}  {line}".rstrip()
            )
        return "\n".join(lines)

    def refusals(self, loop: Loop) -> dict[str, str]:
        """Of the rounds that the gate refused: why, and what can be done, by their steps."""
        found = {}
        for step in self.steps:
            if step.shown == "refused":
                readers = [other.name for other in loop.steps if step.name in other.reads]
                found[step.name] = (
                    f"{step.refused}. The loop goes on with it all the same, in {' and '.join(readers)}: to use the "
                    f"earlier model there, name that in {loop.file}; a step that has run already also needs a new name."
                    if readers
                    else f"{step.refused}. No later step of the loop reads it."
                )
        return found


def read_state(loop: Loop) -> LoopState:
    """The state of a loop, in the order that its file now has; a new one if there is none.

    A step that the file no longer has is forgotten, one that was running is stopped: nothing runs it any more.

    Raises:
        EngineError: the file is damaged, or of another version.
    """
    found = _read(loop.out / FILE)
    known = {step.name: step for step in found.steps} if found is not None else {}
    for step in known.values():
        step.status = "stopped" if step.status == "running" else step.status
    steps = [
        known.get(step.name, StepState(step.name, step.kind, step.command)) for step in loop.steps
    ]
    state = "stopped" if found is None or found.state == "running" else found.state
    return LoopState(str(loop.file), str(loop.out.resolve()), state, steps)


def _read(path: Path) -> LoopState | None:
    """What the file says; None if there is none. Raises EngineError."""
    from pydantic import TypeAdapter, ValidationError

    try:
        content = path.read_bytes()
        version = json.loads(content)["schema_version"]
        if version != SCHEMA_VERSION:
            raise EngineError(
                f"{path}: schema_version {version}, expected {SCHEMA_VERSION}: it is of another version of sa-engine"
            )
        return TypeAdapter(LoopState).validate_json(content, strict=True)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, LookupError, TypeError) as error:
        wrong = f"{type(error).__name__}: {error}"
    raise EngineError(
        f"{path}: damaged ({wrong}); remove it: the next `engine run` asks every step anew whether it is complete"
    )


def refused(step: Step) -> str:
    """Why the gate refused the round that a step made; "" if it did not, or if there is none."""
    out = None if step.out is None else location(step.out)
    if not isinstance(out, Path) or not (out / INFO).is_file():
        return ""
    try:
        gate = read_round(out).gate
    except RoundError:  # whoever reads it says why it cannot be read
        return ""
    return "" if gate is None or gate.promoted else gate.reason


def stamps(step: Step, loop: Loop) -> dict[str, str]:
    """What a step reads, by name, with a stamp of each: outputs of earlier steps, and what its command line names.

    A folder in the output of an earlier step has that one's stamp. But where a step reads an export, people may have
    worked in it: what it reads of it is looked at.
    """
    out = loop.out.resolve()
    found = {name: stamp(place, out) for name, place in step.reads.items()}
    outputs = [location(place) for place in step.reads.values()]
    for text, path in _named(step):
        of = [place for place in outputs if place in (path, *path.parents)]
        if path.is_file() or not of:
            found[text] = _walked(path, out) if _is_export(path) else stamp(text, out)
        elif _is_export(of[0]):
            found[text] = _walked(path, out)
    return found


def _named(step: Step) -> Iterator[tuple[str, Path]]:
    """Files and folders on this machine that a command line names to be read: the words, and where they are."""
    words = step.words[len(step.kind.split()) :]
    for before, word in pairwise(("", *words)):
        name, _, value = word.partition("=")
        for option, text in ((before, word), (name, value)):
            if option.lstrip("-") in _WRITTEN or not text or is_uri(text):
                continue
            path = os.path.expanduser(text)
            if os.path.exists(path):
                yield text, Path(path).resolve()


def stamp(place: str | None, besides: Path | None = None) -> str:
    """A text that changes with what is in a place, "" if nothing is there.

    Of a run or a round it is over the names and sizes at its top, and over the content of small JSON files, among which
    are the markers of shards; a copy has the same, and thousands of shards take no time. Of an export it is over the
    marker alone, as people may work in the folder. In an object store it is over the names. Of any other folder it is
    over the name, size and time of every file below it, up to a million.

    Args:
        place: a path or URI; None: nothing.
        besides: a folder that is not looked into.
    """
    if place is None:
        return ""
    where = location(place)
    run = find_run(where)
    if isinstance(where, Path):
        if where.is_file():
            return _of_file(where)
        if _is_export(where):
            return hashlib.sha256((where / MARKER).read_bytes()).hexdigest()[:16]
        if not run.info.exists() and not (where / INFO).exists():
            return _walked(where, besides)
    lines: list[str] = []
    # A tree of images has its markers beside it.
    for folder in [where] if run.work is None else [where, run.shards]:
        lines += (f"{name} {_inside(folder / name)}" for name in sorted(list_names(folder)))
    return _digest(lines)


def _is_export(path: AnyPath) -> bool:
    return isinstance(path, Path) and (path / MARKER).is_file()


def _of_file(path: Path) -> str:
    about = path.stat()
    return f"{about.st_size} {about.st_mtime_ns}"


def _inside(path: AnyPath) -> str:
    """The content of a small JSON file, else a file's size."""
    if not isinstance(path, Path) or not path.is_file():
        return ""
    size = path.stat().st_size
    if path.suffix == ".json" and size < _SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return str(size)


def _walked(folder: Path, besides: Path | None) -> str:
    files = islice(walk(folder, besides, Counter()), _MOST)
    return _digest(f"{key} {size} {mtime_ns}" for key, size, mtime_ns in files)


def _digest(lines: Iterable[str]) -> str:
    """Of lines, each of which tells of a file; "" if there is none."""
    digest, found = hashlib.sha256(), False
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
        found = True
    return digest.hexdigest()[:16] if found else ""


def is_there(place: str) -> bool:
    """Whether what a step waits for has come: a file, or a folder with something in it."""
    where = location(place)
    if isinstance(where, Path):
        return where.is_file() or bool(list_names(where))
    return where.exists() or bool(list_names(where))
