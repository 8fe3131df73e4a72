"""The flags of the command line, made from the options of the configs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import click

from sa_engine.option_groups import FACE_DETECTORS, FORMATS, PLATE_DETECTORS, ShardConfig
from sa_engine.options import Config, help_text

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

split_flag = click.option(
    "--split",
    type=click.Choice(["all", "holdout", "rest"]),
    default="all",
    show_default=True,
    help="Images that `sa-engine split` held out, or the others.",
)

HELP = ["-h", "--help"]  # what asks every command for its help


def config_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The file of options, and any option by its name."""
    file = click.option(
        "--config", "file", type=Path, metavar="FILE", help="YAML file, see configs/."
    )
    sets = click.option(
        "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any option; repeatable."
    )
    return file(sets(command))


def flag(cls: type[Config], name: str, *declarations: str, **settings: Any) -> Decorator:
    """A flag for an option of a config; None when it was not given."""
    kind = get_type_hints(cls)[name]
    types = {int: int, int | None: int, float: float, float | None: float}
    defaults: dict[str, Any] = {"type": types.get(kind), "help": help_text(cls, name)}
    if kind is bool:
        defaults |= {"is_flag": True, "callback": or_none}
    return click.option(
        *(declarations or [f"--{name.replace('_', '-')}"]), name, **{**defaults, **settings}
    )


def or_none(ctx: click.Context, param: click.Parameter, given: Any) -> Any:
    """What click gives for a flag or a list that was not given becomes None."""
    return given or None


def numbers(ctx: click.Context, param: click.Parameter, given: str) -> tuple[int, ...]:
    """Numbers from 1 on, as in "1,2,3", ascending and each once."""
    try:
        found = sorted({int(number) for number in given.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise click.BadParameter(f"{given!r}: expected numbers from 1 on, as in 1,2,3")
    return tuple(found)


STARTS = {
    "extend": "Also plan the images that have come since; none is renumbered.",
    "retry-failed": "Try failed images again, as their files are now.",
    "overwrite": "Remove the run that is there, and start over.",
    "steal-lock": "Take the folder from the run that holds it.",
}


def _shard_flags(cls: type[Config]) -> list[Decorator]:
    """The flags of stages that write shards of masks."""
    return [
        flag(
            cls,
            "formats",
            "--format",
            type=click.Choice(FORMATS),
            multiple=True,
            callback=or_none,
            help="Part of a shard to write; repeatable, default: all.",
        ),
        flag(
            cls,
            "write_images",
            "--no-images",
            callback=lambda ctx, param, given: False if given else None,
            help="Masks only, no pictures in the tars.",
        ),
    ]


def run_flags(cls: type[Config]) -> Decorator:
    """The flags of every stage that runs over images."""
    flags = [
        flag(cls, "images", metavar="DIR|URI"),
        flag(cls, "out", metavar="DIR|URI"),
        config_flags,
        flag(cls, "local"),
        flag(cls, "ray_address", metavar="ADDRESS"),
        flag(cls, "num_workers"),
        flag(cls, "gpus_per_worker"),
        flag(cls, "cpus_per_worker"),
        flag(cls, "threads_per_worker"),
        flag(cls, "wait_for_resources", metavar="SECONDS"),
        *(_shard_flags(cls) if issubclass(cls, ShardConfig) else ()),
        flag(cls, "max_failed"),
        flag(cls, "limit"),
        *(click.option(f"--{name}", is_flag=True, help=text) for name, text in STARTS.items()),
        click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing."),
        flag(cls, "verbose", "-v", "--verbose"),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


def round_flags(cls: type[Config]) -> Decorator:
    """The flags of trainings between rounds."""
    several = {"multiple": True, "callback": or_none, "metavar": "DIR|URI"}
    names = ("iterations", "batch_size", "lr", "seed", "device", "precision", "num_workers")
    flags = [
        flag(cls, "data", help="Runs of shards whose masks are trained on; repeatable.", **several),
        flag(cls, "out", metavar="DIR"),
        config_flags,
        flag(cls, "gate", help="Run to judge the round on, not trained on; repeatable.", **several),
        *(flag(cls, name, **_ROUND_FLAGS.get(name, {})) for name in names),
        flag(cls, "threads_per_worker"),
        flag(cls, "ray"),
        flag(cls, "ray_address", metavar="ADDRESS"),
        flag(cls, "gpus_per_worker"),
        click.option("--overwrite", is_flag=True, help=STARTS["overwrite"]),
        click.option("--steal-lock", is_flag=True, help=STARTS["steal-lock"]),
        click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing."),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


_ROUND_FLAGS: dict[str, dict[str, Any]] = {
    "device": {"metavar": "DEVICE"},
    "precision": {"type": click.Choice(["fp32", "bf16"])},
}


def privacy_flags(cls: type[Config]) -> Decorator:
    """The flags of commands that look for faces and plates."""
    several = {"multiple": True, "callback": or_none}
    faces = flag(cls, "face_detectors", "--faces", type=click.Choice(FACE_DETECTORS), **several)
    plates = flag(cls, "plate_detectors", "--plates", type=click.Choice(PLATE_DETECTORS), **several)
    return lambda command: faces(plates(command))


def given_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Of a stage's flags, those that are options of its config."""
    starts = {flag.replace("-", "_") for flag in (*STARTS, "dry-run")}
    return {key: value for key, value in flags.items() if key not in starts}
