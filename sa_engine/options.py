"""How options are declared, checked and read.

A value comes from the defaults, then the YAML file, then `--set key=value`, then a flag; the last
one given wins. An option with `identity` in its metadata changes the bytes of a run and therefore
belongs to the run's fingerprint.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sa_engine.errors import SaEngineError

Bounds = tuple[float | None, float | None]
ConfigT = TypeVar("ConfigT", bound="Config")


class ConfigError(SaEngineError):
    """An option that does not exist, or a value that it cannot take."""


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    bounds: Bounds | None = None,
    identity: bool = False,
) -> Any:
    """Declare one option; `bounds` are inclusive, None leaves that side open."""
    metadata = {"help": help, "bounds": bounds, "identity": identity}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all option sets; checks every field's type and range on construction."""

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the option, for a value of the wrong type or out of range."""
        for name in option_names(type(self)):
            object.__setattr__(self, name, _checked(type(self), name, getattr(self, name)))

    def identity_of_files(self) -> dict[str, Any]:
        """What decides a run's bytes and lies in files that options name: their hashes by option."""
        return {}


def load_config(
    cls: type[ConfigT], path: Path | None, sets: Sequence[str], flags: Mapping[str, Any]
) -> ConfigT:
    """Build a config from its defaults, then `path` (YAML), then `sets`, then `flags`.

    `sets` are "key=value" texts whose values are read as YAML; a flag that is None was not given.
    Raises ConfigError that names the option, where it was written, and what was expected.
    """
    values: dict[str, Any] = {}
    try:
        for key, value in (_read_yaml(path) if path is not None else {}).items():
            values[key] = _checked(cls, key, value)
    except ConfigError as error:
        raise ConfigError(f"config file {path}: {error}") from None
    given = {key: value for key, value in flags.items() if value is not None}
    for more in [*(_parse_set(cls, text) for text in sets), given]:
        values |= {key: _checked(cls, key, value) for key, value in more.items()}
    for entry in dataclasses.fields(cls):
        if entry.default is dataclasses.MISSING and entry.name not in values:
            raise ConfigError(
                f"{entry.name} is not set: give --{entry.name}, or write `{entry.name}: ...` "
                f"in {path or 'a --config file'}. {entry.metadata['help']}"
            )
    return cls(**values)


def option_names(cls: type[Config]) -> list[str]:
    """Names of all options of a config class, in their declared order."""
    return [entry.name for entry in dataclasses.fields(cls)]


def help_text(cls: type[Config], name: str) -> str:
    """The one-sentence description of an option."""
    return next(str(e.metadata["help"]) for e in dataclasses.fields(cls) if e.name == name)


def to_dict(config: Config) -> dict[str, Any]:
    """All options as plain JSON and YAML values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """All options as a YAML file that `load_config` reads back to an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None)


def identity_values(config: Config) -> dict[str, Any]:
    """The options that decide a run's bytes, as plain JSON values."""
    values = to_dict(config)
    chosen = {e.name: values[e.name] for e in dataclasses.fields(config) if e.metadata["identity"]}
    return {**chosen, **config.identity_of_files()}


def fingerprint(config: Config) -> str:
    """Sha256 (hex) of the canonical JSON of `identity_values`."""
    canonical = json.dumps(identity_values(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_yaml(path: Path) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"not valid YAML: {detail}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        found = type(content).__name__
        raise ConfigError(f"holds a {found}: expected lines of `option: value`")
    return content


def _parse_set(cls: type[Config], text: str) -> dict[str, Any]:
    """Read "key=value" as the option's type wants it; commas separate a list's items."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected key=value, like --set points_per_side=16")
    hint = get_type_hints(cls).get(key)
    if get_origin(hint) is tuple:
        items = [item.strip() for item in raw.strip("[]").split(",") if item.strip()]
        return {key: items if get_args(hint)[0] is str else [yaml.safe_load(i) for i in items]}
    if str in _alternatives(hint) and raw not in ("null", "~"):
        return {key: raw}
    try:
        return {key: yaml.safe_load(raw)}
    except yaml.YAMLError:
        return {key: raw}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union such as `int | None`, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _checked(cls: type[Config], name: Any, value: Any) -> Any:
    """Return `value` in the option's own type, or raise ConfigError."""
    names = option_names(cls)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        advice = f"did you mean {close[0]}?" if close else f"the options are {', '.join(names)}"
        raise ConfigError(f"unknown option {name}: {advice}")
    kinds = _alternatives(get_type_hints(cls)[name])
    if value is None and type(None) in kinds:
        return None
    bounds = next(e.metadata["bounds"] for e in dataclasses.fields(cls) if e.name == name)
    kind = kinds[0]
    converted = _convert(kind, value)
    if converted is None or not _within(converted, bounds):
        expected = _expected(kind, bounds) + (", or null" if type(None) in kinds else "")
        share = bounds == (0, 1) and _within(_convert(float, value), (1, 100))
        advice = "; write a percentage as a fraction: 88 is 0.88" if share else ""
        written = json.dumps(value, default=str)
        raise ConfigError(f"{name} = {written}: expected {expected}{advice}")
    return converted


def _convert(kind: Any, value: Any) -> Any:
    """Return `value` as `kind` without loss, or None if it is something else."""
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return None
        items = [_convert(get_args(kind)[0], item) for item in value]
        return None if None in items else tuple(items)
    if kind is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-3 as text
            number = float(value)
        except (TypeError, ValueError):
            return None
        return number if math.isfinite(number) else None
    if kind is str:
        return value if isinstance(value, str) and value else None
    return value if type(value) is kind else None


def _within(value: Any, bounds: Bounds | None) -> bool:
    """Whether a number lies in its inclusive bounds; what has no bounds always does."""
    if bounds is None or value is None:
        return value is not None
    low, high = bounds
    return (low is None or value >= low) and (high is None or value <= high)


def _expected(kind: Any, bounds: Bounds | None) -> str:
    """Say in words what an option takes."""
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return (
            "a list of " + {str: "names", int: "whole numbers", float: "numbers"}[get_args(kind)[0]]
        )
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    low, high = bounds or (None, None)
    if low is not None and high is not None:
        return f"{words} from {low} to {high}"
    return f"{words} of at least {low}" if low is not None else words
