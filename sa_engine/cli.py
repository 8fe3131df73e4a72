"""The command line: each command reads its options, calls one function, and prints its report."""

import importlib
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import click

from sa_engine import __version__
from sa_engine.config import (
    FACE_DETECTORS,
    FORMATS,
    PLATE_DETECTORS,
    AutoConfig,
    BlurConfig,
    Config,
    ShardConfig,
    load_config,
    to_yaml,
)
from sa_engine.errors import SaEngineError
from sa_engine.modeling.zoo import MODELS
from sa_engine.options import help_text

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_INTERRUPTED = 130
_WATCH_S, _WATCH_LOG_S = 2.0, 30.0


class _Group(click.Group):
    """Tells a user's mistake in one sentence; anything else is a crash, with its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SaEngineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sa-engine")
def main() -> None:
    """Photos in, SA-1B-style segmentation data out."""


def _flag(cls: type[Config], name: str, *declarations: str, **settings: Any) -> Decorator:
    """A flag for an option of a config; None when it was not given."""
    kind = get_type_hints(cls)[name]
    types = {int: int, int | None: int, float: float, float | None: float}
    defaults: dict[str, Any] = {"type": types.get(kind), "help": help_text(cls, name)}
    if kind is bool:
        defaults |= {"is_flag": True, "callback": _or_none}
    return click.option(
        *(declarations or [f"--{name.replace('_', '-')}"]), name, **{**defaults, **settings}
    )


def _or_none(ctx: click.Context, param: click.Parameter, given: Any) -> Any:
    """What click gives for a flag or a list that was not given becomes None."""
    return given or None


_STARTS = {
    "extend": "Also plan the images that have come since; none is renumbered.",
    "retry-failed": "Try failed images again, as their files are now.",
    "overwrite": "Remove the run that is there, and start over.",
    "steal-lock": "Take the folder from the run that holds it.",
}


def _shard_flags(cls: type[Config]) -> list[Decorator]:
    """The flags of stages that write shards of masks."""
    return [
        _flag(
            cls,
            "formats",
            "--format",
            type=click.Choice(FORMATS),
            multiple=True,
            callback=_or_none,
            help="Part of a shard to write; repeatable, default: all.",
        ),
        _flag(
            cls,
            "write_images",
            "--no-images",
            callback=lambda ctx, param, given: False if given else None,
            help="Masks only, no pictures in the tars.",
        ),
    ]


def _run_flags(cls: type[Config]) -> Decorator:
    """The flags of every stage that runs over images."""
    flags = [
        _flag(cls, "images", metavar="DIR|URI"),
        _flag(cls, "out", metavar="DIR|URI"),
        click.option(
            "--config", "file", type=Path, metavar="FILE", help="YAML file, see configs/."
        ),
        click.option(
            "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any option; repeatable."
        ),
        _flag(cls, "local"),
        _flag(cls, "ray_address", metavar="ADDRESS"),
        _flag(cls, "num_workers"),
        _flag(cls, "gpus_per_worker"),
        _flag(cls, "cpus_per_worker"),
        _flag(cls, "threads_per_worker"),
        _flag(cls, "wait_for_resources", metavar="SECONDS"),
        *(_shard_flags(cls) if issubclass(cls, ShardConfig) else ()),
        _flag(cls, "max_failed"),
        _flag(cls, "limit"),
        *(click.option(f"--{name}", is_flag=True, help=text) for name, text in _STARTS.items()),
        click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing."),
        _flag(cls, "verbose", "-v", "--verbose"),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


@main.command()
@_run_flags(AutoConfig)
@_flag(AutoConfig, "checkpoint", metavar="NAME|FILE")
@_flag(AutoConfig, "device", metavar="DEVICE")
@_flag(AutoConfig, "precision", type=click.Choice(["fp32", "bf16"]))
def auto(file: Path | None, sets: tuple[str, ...], **flags: Any) -> None:
    """Segment everything in a folder of photos.

    This is the paper's fully automatic stage. Run it again with the same options to resume it.
    """
    _run_stage("auto", AutoConfig, file, sets, flags)


_detector = partial(_flag, multiple=True, callback=_or_none)


@main.command()
@_run_flags(BlurConfig)
@_flag(BlurConfig, "work", metavar="DIR|URI")
@_flag(BlurConfig, "extra_boxes", "--boxes", metavar="FILE")
@_detector(BlurConfig, "face_detectors", "--faces", type=click.Choice(FACE_DETECTORS))
@_detector(BlurConfig, "plate_detectors", "--plates", type=click.Choice(PLATE_DETECTORS))
@_flag(BlurConfig, "redaction", type=click.Choice(["mosaic", "solid", "gaussian"]))
@_flag(BlurConfig, "keep_icc")
def blur(file: Path | None, sets: tuple[str, ...], **flags: Any) -> None:
    """Redact faces and licence plates in a tree of photos.

    The output has the same names and folders, without any metadata. A photo that anything goes wrong
    with is not written, and the exit code is 3. Run it again with the same options to resume it.
    """
    _run_stage("blur", BlurConfig, file, sets, flags)


def _run_stage(
    name: str, cls: type[Config], file: Path | None, sets: tuple[str, ...], flags: dict[str, Any]
) -> None:
    """Read a stage's options, then run it or say what it would do."""
    dry_run = flags.pop("dry_run")
    given = {key: flags.pop(key) for key in (flag.replace("-", "_") for flag in _STARTS)}
    config = load_config(cls, file, sets, flags)
    from sa_engine.runner import Start

    stage = importlib.import_module(f"stages.{name}")
    start = Start(**given)
    if dry_run:
        click.echo(f"{stage.describe(config, start)}\n\n{to_yaml(config)}", nl=False)
    else:
        click.echo(stage.run(config, start))


@main.command()
@click.argument("run", metavar="OUT")
@click.option("--out", "dest", type=Path, required=True, metavar="DIR", help="For the pictures.")
@click.option("--id", "ids", type=int, multiple=True, help="Image to draw; repeatable.")
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Images to draw, spread over the run.",
)
def show(run: str, dest: Path, ids: tuple[int, ...], count: int) -> None:
    """Draw images of a run beside their masks.

    OUT is the run's folder. A contact sheet shows all that were drawn.
    """
    from sa_engine import pictures
    from sa_engine.storage import location

    *drawn, sheet = pictures.show(location(run), dest, ids, count)
    click.echo(f"{len(drawn)} pictures in {dest}, all of them on {sheet}")


@main.command()
@click.argument("run", metavar="OUT")
@click.option("--watch", is_flag=True, help="Look again and again until nothing runs there.")
@click.option("--json", "as_json", is_flag=True, help="All numbers as a line of JSON.")
def status(run: str, watch: bool, as_json: bool) -> None:
    """Say how far a run is: done, running, failed, speed and time left."""
    from sa_engine.status import read_status
    from sa_engine.storage import location

    out = location(run)
    terminal = sys.stdout.isatty() and not as_json
    while True:
        found = read_status(out)
        if watch and terminal:
            click.clear()
        click.echo(json.dumps(found.to_dict()) if as_json else found)
        if not watch or found.state != "running":
            return
        if not (terminal or as_json):
            click.echo()
        time.sleep(_WATCH_S if terminal else _WATCH_LOG_S)


@main.command()
@click.argument("run", metavar="OUT")
@click.option("--list", "listed", is_flag=True, help="Every image with its reason.")
@click.option("--json", "as_json", is_flag=True, help="Every image as a line of JSON.")
def errors(run: str, listed: bool, as_json: bool) -> None:
    """Say which images failed or were skipped, and why."""
    from sa_engine import failures
    from sa_engine.storage import location

    found = failures.list_failures(location(run))
    if as_json:
        for failure in found:
            click.echo(json.dumps(vars(failure)))
    elif listed:
        for failure in found:
            click.echo(f"{failure.status}\t{failures.printable(failure.key)}\t{failure.message}")
    elif found:
        click.echo(failures.table(failures.by_reason(found)))
        click.echo("\nsa-engine errors --list names every image; --retry-failed tries them again")
    else:
        click.echo("no image has failed or was skipped")


@main.command()
@click.argument("run", metavar="OUT")
@click.option("--num-workers", type=click.IntRange(min=1), help="Processes; default: all cores.")
def verify(run: str, num_workers: int | None) -> None:
    """Check a run's finished shards: hashes, masks, ids, tar against Parquet.

    The exit code is 1 if anything is wrong.
    """
    from sa_engine.storage import location
    from sa_engine.verify import verify as check

    found = check(location(run), num_workers, progress=sys.stderr.isatty())
    click.echo(found)
    if found.problems:
        sys.exit(1)


@main.command()
@click.argument("run", metavar="OUT")
@click.option(
    "--holdout", type=click.IntRange(min=1), required=True, metavar="N", help="Images to hold out."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, another split.")
def split(run: str, holdout: int, seed: int) -> None:
    """Hold out random images for testing; no model may be trained on them.

    The split is written to OUT/holdout.json. It depends on the images' content, so that it stays
    the same when others are added; called again, it takes in their share of them.
    """
    from sa_engine.holdout import split as hold_out
    from sa_engine.storage import location

    out = location(run)
    held_out = hold_out(out, holdout, seed)
    click.echo(f"{len(held_out.images)} images held out: {out / 'holdout.json'}")


@main.group()
def weights() -> None:
    """List and fetch model weights."""


@weights.command("list")
def list_weights() -> None:
    """List models and where they are."""
    from sa_engine.modeling import weights as store

    for model in store.list_models():
        where = model.path or f"{model.size_bytes / 1e6:,.0f} MB to download"
        click.echo(f"{model.name:6} {model.encoder:8} {model.licence:11} {where}")


@weights.command()
@click.argument("name", type=click.Choice(list(MODELS)))
def pull(name: str) -> None:
    """Fetch and verify a model's weights."""
    from sa_engine.modeling import weights as store

    click.echo(store.pull(name, progress=sys.stderr.isatty()))


@weights.command()
@click.argument("name", type=click.Choice(list(MODELS)))
def path(name: str) -> None:
    """Print where a model's weights are."""
    from sa_engine.modeling import weights as store

    found = store.find(name)
    if found is None:
        raise store.WeightsError(
            f"{name} is not in {store.cache_dir()}: fetch it with `sa-engine weights pull {name}`"
        )
    click.echo(found)
