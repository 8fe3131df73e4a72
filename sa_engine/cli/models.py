"""What is asked of models: how good they are, and where their weights are."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from sa_engine.cli.flags import numbers, split_flag
from sa_engine.modeling.zoo import MODELS
from sa_engine.privacy.weights import PLATE_WEIGHTS


@click.command()
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
@split_flag
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


@click.command("rounds")
@click.argument("folder", metavar="DIR", type=Path)
@click.option("--json", "as_json", is_flag=True, help="All that is known of every round.")
def list_rounds(folder: Path, as_json: bool) -> None:
    """Say which model came from which, and whether it got better.

    DIR holds rounds, as retrain writes them. "before" and "after" training is the mean IoU after one
    click, or of a detector the average recall of its 100 best boxes.
    """
    from sa_engine.lineage import lineage

    found = lineage(folder)
    click.echo(json.dumps(found.to_dict()) if as_json else found)
    for note in found.notes:
        click.echo(f"Note: {note}", err=True)


@click.command()
@click.argument("truth", metavar="TRUTH")
@click.argument("runs", metavar="[OUT]...", nargs=-1)
@click.option(
    "--detector",
    "detectors",
    multiple=True,
    metavar="DETECTOR",
    help="Detector whose boxes to measure too, with --boxes; repeatable.",
)
@click.option(
    "--checkpoint",
    default="vit_t",
    show_default=True,
    metavar="NAME|FILE|ROUND",
    help="Model whose embedding detectors see.",
)
@click.option("--out", metavar="DIR|URI", help="For recall.json and recall.png.")
@click.option(
    "--proposals",
    "limits",
    default="10,100,1000",
    show_default=True,
    metavar="N,N,...",
    callback=numbers,
    help="Numbers of proposals per image at which recall is reported.",
)
@click.option("--boxes", is_flag=True, help="IoU of boxes around the masks, not of the masks.")
@split_flag
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the intervals."
)
@click.option("--json", "as_json", is_flag=True, help="All numbers, with the sums of every image.")
def recall(
    truth: str,
    runs: tuple[str, ...],
    out: str | None,
    boxes: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure how many true masks automatic masks find.

    This is the paper's AR@1000: of the masks of TRUTH, the share that the best masks of OUT find, ranked by
    the mean of predicted IoU and stability score, averaged over IoUs of 0.5 to 0.95. Both are folders of runs
    over the same photos; if there are several OUT, the others are compared with the first. Boxes of detectors
    are ranked by their score.
    """
    from sa_engine.evaluation.recall import measure, write
    from sa_engine.evaluation.run import prepare_output
    from sa_engine.storage import location

    if out is not None:
        prepare_output(location(out))
    kind = "boxes" if boxes else "masks"
    report = measure(truth, runs, kind=kind, progress=sys.stderr.isatty(), **settings)
    click.echo(json.dumps(report.to_dict()) if as_json else report)
    for note in report.notes():
        click.echo(f"Note: {note}", err=True)
    if out is not None:
        write(report, location(out))


@click.group()
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
