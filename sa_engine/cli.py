"""The command line: each command reads its options, calls one function, and prints its report."""

import importlib
import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from sa_engine import __version__
from sa_engine.config import (
    ANNOTATION_FORMATS,
    AutoConfig,
    BlurConfig,
    Config,
    IngestConfig,
    PrivacyConfig,
    load_config,
    to_yaml,
)
from sa_engine.errors import SaEngineError, TooManyFailures
from sa_engine.flags import STARTS, flag, given_options, numbers, privacy_flags, run_flags
from sa_engine.modeling.zoo import MODELS
from sa_engine.privacy.weights import PLATE_WEIGHTS

EXPORT_NAMES = ("coco", "coco-rle", "cvat", "label-studio", "labelme", "png", "sa1b", "yolo-seg")
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


@main.command()
@run_flags(AutoConfig)
@flag(AutoConfig, "checkpoint", metavar="NAME|FILE|ROUND")
@flag(AutoConfig, "device", metavar="DEVICE")
@flag(AutoConfig, "precision", type=click.Choice(["fp32", "bf16"]))
@flag(AutoConfig, "blur")
@flag(AutoConfig, "extra_boxes", "--boxes", metavar="FILE")
def auto(file: Path | None, sets: tuple[str, ...], **flags: Any) -> None:
    """Segment everything in a folder of photos.

    This is the paper's fully automatic stage. Run it again with the same options to resume it.
    """
    _run_stage("auto", AutoConfig, file, sets, flags)


@main.command()
@run_flags(BlurConfig)
@privacy_flags(BlurConfig)
@flag(BlurConfig, "redaction", type=click.Choice(["mosaic", "solid", "gaussian"]))
@flag(BlurConfig, "extra_boxes", "--boxes", metavar="FILE")
@flag(BlurConfig, "work", metavar="DIR|URI")
@flag(BlurConfig, "keep_icc")
@click.option(
    "--review",
    "review_dir",
    type=Path,
    metavar="DIR",
    help="Afterwards, draw the detections of lowest score and a random sample, for a human check.",
)
def blur(file: Path | None, sets: tuple[str, ...], review_dir: Path | None, **flags: Any) -> None:
    """Redact faces and licence plates in a tree of photos.

    The output has the same names and folders, without any metadata. A photo that anything goes wrong
    with is not written, and the exit code is 3. Run it again with the same options to resume it.
    """
    if review_dir is None or flags["dry_run"]:
        _run_stage("blur", BlurConfig, file, sets, flags)
        return
    config = load_config(BlurConfig, file, sets, given_options(flags))
    from sa_engine.privacy.review import check_dest, review
    from sa_engine.run_dir import run_paths

    paths = run_paths(config)
    check_dest(paths, review_dir)  # not after hours of work
    try:
        _run_stage("blur", BlurConfig, file, sets, flags)
    except TooManyFailures:
        # What was released all the same is to be looked at; if nothing was, the failures are told.
        with suppress(SaEngineError):
            _tell_pictures(review(paths, review_dir))
        raise
    _tell_pictures(review(paths, review_dir))


def _tell_pictures(pictures: list[Path]) -> None:
    for picture in pictures:
        click.echo(f"to be looked at: {picture}")


@main.command()
@run_flags(IngestConfig)
@flag(IngestConfig, "annotations", metavar="FILE|DIR")
@flag(
    IngestConfig, "format", "--annotation-format", type=click.Choice(["auto", *ANNOTATION_FORMATS])
)
@flag(IngestConfig, "source", type=click.Choice(["assisted", "manual"]))
@flag(IngestConfig, "annotator", metavar="NAME")
@flag(IngestConfig, "round")
@flag(IngestConfig, "crowd", type=click.Choice(["auto", "keep", "drop"]))
@flag(IngestConfig, "allow_unmatched")
def ingest(file: Path | None, sets: tuple[str, ...], **flags: Any) -> None:
    """Take masks that annotators drew into shards.

    This is the paper's assisted-manual stage. Photos are found by the names that the annotations
    give them; what has no counterpart is listed and refused.
    """
    _run_stage("ingest", IngestConfig, file, sets, flags)


@main.command("blur-eval")
@click.option(
    "--truth", type=Path, required=True, metavar="FILE", help="COCO annotations of boxes."
)
@click.option("--images", type=Path, metavar="DIR", help="Photos; default: images/ beside FILE.")
@click.option("--kind", type=click.Choice(["face", "plate"]), help="Default: by the categories.")
@click.option("--config", "file", type=Path, metavar="FILE", help="YAML file, see configs/.")
@click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Set any option; repeatable."
)
@privacy_flags(BlurConfig)
@click.option("--json", "as_json", is_flag=True, help="All numbers, and every missed box.")
def blur_eval(
    truth: Path,
    images: Path | None,
    kind: str | None,
    file: Path | None,
    sets: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure on labelled photos what `blur` finds and covers.

    For boxes of every height: the share with a detection at an IoU of 0.5 or more, and the share of
    which at least 95 % is redacted.
    """
    from sa_engine.privacy.recall import measure
    from sa_engine.privacy.redactor import load_redactor
    from sa_engine.resources import cores

    config = load_config(BlurConfig, file, sets, {**flags, "images": "-", "out": "-"})
    _tell_notes(config)
    redactor = load_redactor(config, config.threads_per_worker or cores(), config.device)
    found = measure(redactor, truth, images, kind, progress=sys.stderr.isatty())
    click.echo(json.dumps(found.to_dict()) if as_json else found)


def _tell_notes(config: Config) -> None:
    from sa_engine import rounds
    from sa_engine.privacy.notes import notes

    told = rounds.notes(config.checkpoint) if isinstance(config, AutoConfig) else []
    if isinstance(config, PrivacyConfig) and getattr(config, "blur", True):
        told += notes(config)
    for note in told:
        click.echo(f"Note: {note}", err=True)


def _run_stage(
    name: str, cls: type[Config], file: Path | None, sets: tuple[str, ...], flags: dict[str, Any]
) -> None:
    """Read a stage's options, then run it or say what it would do."""
    config = load_config(cls, file, sets, given_options(flags))
    from sa_engine.runner import Start

    start = Start(**{key: flags[key] for key in (name.replace("-", "_") for name in STARTS)})
    stage = importlib.import_module(f"stages.{name}")
    _tell_notes(config)
    if flags["dry_run"]:
        click.echo(f"{stage.describe(config, start)}\n\n{to_yaml(config)}", nl=False)
    else:
        click.echo(stage.run(config, start))


@main.command()
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="DIR|URI",
    help="Shards whose masks are the truth; repeatable.",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    default=["vit_t"],
    show_default=True,
    metavar="NAME|FILE|ROUND",
    help="Model; repeatable: the others are compared with the first.",
)
@click.option("--out", metavar="DIR|URI", help="For evaluate.json and evaluate.png.")
@click.option(
    "--points",
    default="1,2,3,5,9",
    show_default=True,
    metavar="N,N,...",
    callback=numbers,
    help="Numbers of points after which IoU is reported.",
)
@click.option(
    "--first-point",
    type=click.Choice(["center", "random"]),
    default="center",
    show_default=True,
    help="Farthest from the mask's boundary, or any of the mask.",
)
@click.option("--boxes", is_flag=True, help="Box prompts too.")
@click.option(
    "--split",
    type=click.Choice(["all", "holdout", "rest"]),
    default="all",
    show_default=True,
    help="Images of `sa-engine split`, or the others.",
)
@click.option(
    "--limit-images",
    "limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Images per data set, a random sample.",
)
@click.option(
    "--max-masks", type=click.IntRange(min=1), metavar="N", help="Masks per image, likewise."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N, mps.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@click.option("--json", "as_json", is_flag=True, help="All numbers, with the sums of every image.")
def evaluate(
    data: tuple[str, ...],
    checkpoints: tuple[str, ...],
    out: str | None,
    points: tuple[int, ...],
    first_point: str,
    boxes: bool,
    max_masks: int | None,
    seed: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure how well a model segments what is clicked on.

    This is the paper's point-prompt protocol: a click in the middle of a mask, then in the middle of
    what is wrong, and the mean IoU over all masks after each. The masks of shards are the truth.
    """
    from sa_engine.evaluation import run
    from sa_engine.evaluation.interactive import Protocol
    from sa_engine.storage import location

    if out is not None:
        run.prepare_output(location(out))
    protocol = Protocol(
        points=points, first_point=first_point, boxes=boxes, max_masks=max_masks, seed=seed
    )
    report = run.evaluate(data, checkpoints, protocol, progress=sys.stderr.isatty(), **settings)
    click.echo(json.dumps(report.to_dict()) if as_json else report)
    if out is not None:
        run.write(report, location(out))


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


@main.command()
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
@click.option(
    "--split",
    type=click.Choice(["all", "holdout", "rest"]),
    default="all",
    show_default=True,
    help="Images that `sa-engine split` held out, or the others.",
)
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
    is told.
    """
    from sa_engine.export import export as write
    from sa_engine.storage import location

    click.echo(write(location(run), progress=sys.stderr.isatty(), **options))


@main.command()
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
    from sa_engine.privacy import weights as plates

    for model in store.list_models():
        where = model.path or f"{model.size_bytes / 1e6:,.0f} MB to download"
        click.echo(f"{model.name:9} {model.encoder:8} {model.licence:11} {where}")
    for spec in plates.PLATE_WEIGHTS.values():
        where = plates.find(spec.name) or f"{spec.size_bytes / 1e6:,.0f} MB to download"
        click.echo(f"{spec.name:9} {'plates':8} {spec.licence:11} {where}")


@weights.command()
@click.argument("name", type=click.Choice([*MODELS, *PLATE_WEIGHTS]))
def pull(name: str) -> None:
    """Fetch and verify a model's weights."""
    from sa_engine.modeling import weights as store
    from sa_engine.privacy import weights as plates

    if name in PLATE_WEIGHTS:
        if PLATE_WEIGHTS[name].note:
            click.echo(f"Note: {name}: {PLATE_WEIGHTS[name].note}", err=True)
        click.echo(plates.pull(name))
    else:
        click.echo(store.pull(name, progress=sys.stderr.isatty()))


@weights.command()
@click.argument("name", type=click.Choice([*MODELS, *PLATE_WEIGHTS]))
def path(name: str) -> None:
    """Print where a model's weights are."""
    from sa_engine.modeling import weights as store
    from sa_engine.privacy import weights as plates

    found = plates.find(name) if name in PLATE_WEIGHTS else store.find(name)
    if found is None:
        raise store.WeightsError(
            f"{name} is not in {store.cache_dir()}: fetch it with `sa-engine weights pull {name}`"
        )
    click.echo(found)


@main.command("rounds")
@click.argument("folder", metavar="DIR", type=Path)
@click.option("--json", "as_json", is_flag=True, help="All that is known of every round.")
def list_rounds(folder: Path, as_json: bool) -> None:
    """Say which model came from which, and whether it got better.

    DIR holds rounds, as retrain writes them. "1 point" is the mean IoU after one click before
    training, "after" the same after it.
    """
    from sa_engine.lineage import lineage

    found = lineage(folder)
    click.echo(json.dumps(found.to_dict()) if as_json else found)
    for note in found.notes:
        click.echo(f"Note: {note}", err=True)
