"""What is asked of runs: how far they are, whether they are whole, and what is in them."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from sa_engine.cli.flags import split_flag

EXPORT_NAMES = ("coco", "coco-rle", "cvat", "label-studio", "labelme", "png", "sa1b", "yolo-seg")
_WATCH_S, _WATCH_LOG_S = 2.0, 30.0


@click.command()
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


@click.command()
@click.argument("run", metavar="OUT")
@click.option("--list", "listed", is_flag=True, help="Every image with its reason.")
@click.option("--json", "as_json", is_flag=True, help="Every image as a line of JSON.")
def errors(run: str, listed: bool, as_json: bool) -> None:
    """Say which images failed or were skipped, which masks were left out, and why."""
    from sa_engine import failures
    from sa_engine.storage import location

    found = failures.list_failures(location(run))
    if as_json:
        for failure in found:
            click.echo(json.dumps(vars(failure)))
    elif listed:
        for failure in found:
            key, message = map(failures.printable, (failure.key, failure.message))
            click.echo(f"{failure.status}\t{key}\t{message}")
    elif found:
        click.echo(failures.table(failures.by_reason(found)))
        retry = any(failure.status == "failed" for failure in found)
        again = "; --retry-failed tries the failed ones again" * retry
        click.echo(f"\nsa-engine errors --list names every image{again}")
    else:
        click.echo("no image has failed or was skipped")


@click.command()
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


@click.command()
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


@click.command()
@click.argument("runs", metavar="DIR...", nargs=-1, required=True)
@click.option("--out", "dest", type=Path, metavar="DIR", help="For report.html and report.json.")
@click.option(
    "--compare", multiple=True, metavar="DIR", help="A data set to put beside; repeatable."
)
@click.option("--json", "as_json", is_flag=True, help="All numbers instead of the table.")
def report(
    runs: tuple[str, ...], dest: Path | None, compare: tuple[str, ...], as_json: bool
) -> None:
    """Say what the masks of one or more runs look like.

    The table has a row for each stage and round, as the paper's; runs are added up in the order
    given.
    """
    from sa_engine.analysis.report import make_report, write_report

    found = make_report(runs, compare)
    written = write_report(found, dest) if dest else []
    click.echo(json.dumps(found.to_dict()) if as_json else found)
    for note in found.notes():
        click.echo(f"Note: {note}", err=True)
    for file in written:
        click.echo(f"written: {file}", err=as_json)


@click.command()
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


@click.command()
@click.argument("run", metavar="OUT")
@click.argument("corrected", metavar="[CORRECTED]", required=False)
@click.option("--out", "dest", type=Path, metavar="DIR", help="For numbers and pictures.")
@click.option(
    "--worst", type=click.IntRange(min=1), default=20, show_default=True, help="Pairs to draw."
)
@click.option("--json", "as_json", is_flag=True, help="All numbers, and every pair.")
@click.option(
    "--sample",
    "count",
    type=click.IntRange(min=1),
    metavar="N",
    help="Hand out N random images instead.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sample.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(EXPORT_NAMES),
    default="cvat",
    show_default=True,
    help="Of the sample, see export.",
)
def audit(
    run: str,
    corrected: str | None,
    dest: Path | None,
    worst: int,
    as_json: bool,
    count: int | None,
    seed: int,
    format_name: str,
) -> None:
    """Say how well a run's masks agree with their corrected versions.

    OUT is the run's folder, CORRECTED the run that the corrected masks were ingested into. With
    --sample, draw images of OUT to be corrected, and write them to DIR as export --with-images does.
    """
    from sa_engine import agreement
    from sa_engine.export import export as write
    from sa_engine.storage import location

    if (count is None) == (corrected is None):
        raise click.UsageError("expected either CORRECTED or --sample N")
    out = location(run)
    if count is not None:
        if dest is None:
            raise click.UsageError("--sample needs --out DIR")
        ids = agreement.sample(out, count, seed)
        click.echo(write(out, dest, format_name, pictures=True, names="released", ids=ids))
        return
    found = agreement.compare(out, location(str(corrected)))
    click.echo(json.dumps(found.to_dict()) if as_json else found)
    if dest is not None:
        for path in agreement.write_audit(found, out, dest, worst):
            click.echo(path, err=as_json)


@click.command()
@click.argument("run", metavar="OUT")
@click.option(
    "--format", "format_name", required=True, type=click.Choice(EXPORT_NAMES), help="Of the output."
)
@click.option("--out", "dest", type=Path, required=True, metavar="DIR", help="A new folder.")
@click.option("--with-images", "pictures", is_flag=True, help="Write the released pictures too.")
@click.option(
    "--names",
    type=click.Choice(["original", "released"]),
    help="Of the images; default: the photos' own, for sa1b the released ones.",
)
@split_flag
@click.option("--id", "ids", type=int, multiple=True, help="Image to export; repeatable.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Pixels by which polygons may be simplified (coco, yolo-seg).",
)
def export(run: str, **options: Any) -> None:
    """Write a run's masks in another tool's format.

    OUT is the run's folder. Masks are kept to the pixel where the format can hold them; what it cannot hold
    is told. Given again, the command leaves what it has written to the people who work in it.
    """
    from sa_engine.export import export as write
    from sa_engine.storage import location

    click.echo(write(location(run), progress=sys.stderr.isatty(), **options))
