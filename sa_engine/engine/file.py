"""The file of a loop: its steps in order, each a command line as a user would type it.

```yaml
out: build/engine                 # every step writes into a folder below it
inputs: {photos: /data/photos}    # names for what steps read
steps:
  - blurred: blur --images {photos}
  - drawn:
      wait: annotations.zip
      tell: Draw masks on the photos in {blurred}.
  - round0: ingest --images {blurred} --annotations {drawn}
```
"""

import difflib
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sa_engine.errors import SaEngineError
from sa_engine.remote import is_uri

OWN = "_engine"  # in `out`: what is no step's
PROGRAM = "sa-engine"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
_REFERENCE = re.compile(r"\{([^{}]*)\}")
_TOP = ("out", "inputs", "steps")
_WAIT = ("wait", "tell")


class EngineError(SaEngineError):
    """A loop's file that cannot be used, or a step that has failed."""


@dataclass(frozen=True)
class Known:
    """What the command line says of a command.

    Attributes:
        name: of the command, such as "retrain detector".
        words: the command line, with `--out` if the command takes it.
        out: what it writes, as given; None if it takes no `--out`.
    """

    name: str
    words: tuple[str, ...]
    out: str | None


# Looks at a command line, and adds `--out` and the second argument where the command takes it and it is not there.
# Raises EngineError for what the command line does not know.
Look = Callable[[list[str], str], Known]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a loop.

    Attributes:
        name: its own, and that of its folder below the loop's `out`.
        kind: the command's name; "wait" if people do the step.
        words: the command line without the program.
        out: what it writes or waits for, as a command line names it; None: nothing of its own.
        reads: `out` of the earlier steps that it refers to, by their names.
        tell: what people are asked to do.
    """

    name: str
    kind: str
    words: tuple[str, ...] = ()
    out: str | None = None
    reads: dict[str, str]
    tell: str = ""

    @property
    def command(self) -> str:
        """What a user would type; of a step that waits, what it waits for."""
        return shlex.join([PROGRAM, *self.words]) if self.words else f"wait for {self.out}"


@dataclass(frozen=True)
class Loop:
    """A loop as its file describes it.

    Attributes:
        file: where it is described.
        out: the folder that all steps write below.
        steps: in order.
    """

    file: Path
    out: Path
    steps: tuple[Step, ...]

    @property
    def own(self) -> Path:
        """Logs and the lock."""
        return self.out / OWN

    @property
    def page(self) -> Path:
        """What people look at."""
        return self.out / "index.html"


def read_loop(file: Path, look: Look) -> Loop:
    """Read a loop's file.

    Args:
        file: YAML, see this module's example. Paths in it are as in a shell: below the working directory.
        look: what knows the commands.

    Raises:
        EngineError: names the file and the step, what was found there and what was expected.
    """
    try:
        return _loop(file, _content(file), look)
    except EngineError as error:
        raise EngineError(f"{file}: {error}") from None


def _content(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(f"cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EngineError(f"not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise EngineError(f"is {_said(content)}: expected `out:` and `steps:`, see docs/engine.md")
    _only(content, _TOP, "key")
    for name in ("out", "steps"):
        if name not in content:
            raise EngineError(f"has no `{name}:`, see docs/engine.md")
    return content


def _loop(file: Path, content: dict[str, Any], look: Look) -> Loop:
    out, inputs, steps = content["out"], content.get("inputs") or {}, content["steps"]
    if not isinstance(out, str) or not out or is_uri(out):
        raise EngineError(
            f"out is {_said(out)}: expected a folder on this machine, for the state and the page; a "
            "step may have another place by its own --out"
        )
    if not isinstance(inputs, dict) or not all(isinstance(one, str) for one in inputs.values()):
        raise EngineError(f"inputs is {_said(inputs)}: expected lines of `name: path`")
    if not isinstance(steps, list) or not steps:
        raise EngineError(f"steps is {_said(steps)}: expected a list of `- name: command`")
    top = Path(out).expanduser()
    names = _Names({str(name): path for name, path in inputs.items()}, _names_of(steps))
    read: list[Step] = []
    for number, entry in enumerate(steps, 1):
        name, what = _entry(entry, number)
        names.check_new(name)
        try:
            made = _step(name, what, top, names, look)
        except EngineError as error:
            raise EngineError(f"step {name}: {error}") from None
        names.done[name] = made.out
        read.append(made)
    return Loop(file, top, tuple(read))


def _step(name: str, what: Any, top: Path, names: "_Names", look: Look) -> Step:
    """A step, its references filled in."""
    if isinstance(what, dict):
        _only(what, _WAIT, "key")
        if missing := [key for key in _WAIT if not isinstance(what.get(key), str)]:
            raise EngineError(
                f"{missing[0]} is {_said(what.get(missing[0]))}: expected `wait:` with a file or "
                "folder, and `tell:` with what people are asked to do"
            )
        reads: dict[str, str] = {}
        place = names.fill(what["wait"], reads)
        place = place if Path(place).is_absolute() or is_uri(place) else str(top / place)
        tell = names.fill(" ".join(what["tell"].split()), reads)
        return Step(name=name, kind="wait", out=place, reads=reads, tell=tell)
    if not isinstance(what, str):
        raise EngineError(f"is {_said(what)}: expected a command line, or `wait:` and `tell:`")
    try:
        words = shlex.split(what)
    except ValueError as error:
        raise EngineError(f"{what!r} is no command line: {error}") from None
    if words[:1] == [PROGRAM]:
        words = words[1:]
    reads = {}
    known = look([names.fill(word, reads) for word in words], str(top / name))
    return Step(name=name, kind=known.name, words=known.words, out=known.out, reads=reads)


@dataclass
class _Names:
    """What `{name}` may mean at a step: inputs, and steps before it."""

    inputs: dict[str, str]
    steps: list[str]

    def __post_init__(self) -> None:
        self.done: dict[str, str | None] = {}

    def check_new(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise EngineError(
                f"step {name!r}: expected a name of letters, digits, '.', '-' and '_' that starts "
                "with a letter or digit; a / makes a folder in a folder"
            )
        if name in self.done or name in self.inputs:
            raise EngineError(f"the name {name} is there twice: each step and input needs its own")
        if name in ("index.html", "engine.json"):
            raise EngineError(f"step {name}: that is a file of the engine: use another name")
        for other in self.done:
            if f"{name}/".startswith(f"{other}/") or f"{other}/".startswith(f"{name}/"):
                raise EngineError(
                    f"steps {other} and {name}: one would write into the other's folder"
                )

    def fill(self, text: str, reads: dict[str, str]) -> str:
        """Put in what names stand for; steps among them are added to `reads`."""

        def meant(match: re.Match[str]) -> str:
            name = match[1]
            if name in self.inputs:
                return self.inputs[name]
            place = self.done.get(name)
            if place is None:
                raise EngineError(f"{{{name}}} {self._why_not(name)}")
            reads[name] = place
            return place

        return _REFERENCE.sub(meant, text)

    def _why_not(self, name: str) -> str:
        if name in self.done:
            return "writes no folder of its own: name the step that it worked on"
        if name in self.steps:
            return "is no step before this one: a step can only read what is there by then"
        known = [*self.inputs, *self.done]
        close = difflib.get_close_matches(name, known, n=1)
        advice = (
            f"did you mean {{{close[0]}}}?"
            if close
            else f"known here: {', '.join(known) or 'nothing'}"
        )
        return f"is neither an input nor a step before this one: {advice}"


def _names_of(steps: list[Any]) -> list[str]:
    return [str(name) for entry in steps if isinstance(entry, dict) for name in entry]


def _entry(entry: Any, number: int) -> tuple[str, Any]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise EngineError(f"step {number} is {_said(entry)}: expected `- name: command`")
    ((name, what),) = entry.items()
    return str(name), what


def _only(found: dict[Any, Any], expected: tuple[str, ...], word: str) -> None:
    for key in found:
        if key not in expected:
            raise EngineError(f"unknown {word} {key!r}: expected {', '.join(expected)}")


def _said(value: Any) -> str:
    """A value of YAML in a sentence."""
    return (
        "empty"
        if value is None
        else repr(value)
        if len(repr(value)) < 60
        else f"{repr(value)[:57]}..."
    )
