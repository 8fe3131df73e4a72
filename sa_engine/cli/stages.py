"""The stages, each over a folder of photos, and what measures one of them before it is run."""

import importlib
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from sa_engine.cli.flags import (
    STARTS,
    config_flags,
    flag,
    given_options,
    privacy_flags,
    round_flags,
    run_flags,
)
from sa_engine.config import ANNOTATION_FORMATS, AutoConfig, BlurConfig, IngestConfig, PrefillConfig
from sa_engine.detection.config import DetectorConfig
from sa_engine.errors import SaEngineError, TooManyFailures
from sa_engine.option_groups import ModelConfig, PrivacyConfig
from sa_engine.options import Config, load_config, to_yaml
from sa_engine.training.config import RetrainConfig, RoundConfig


@click.command()
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


@click.command()
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
@flag(IngestConfig, "prefill", metavar="DIR|URI")
def ingest(file: Path | None, sets: tuple[str, ...], **flags: Any) -> None:
    """Take masks that annotators drew into shards.

    This is the paper's assisted-manual stage. Photos are found by the names that the annotations
    give them; what has no counterpart is listed and refused.
    """
    _run_stage("ingest", IngestConfig, file, sets, flags)


@click.command()
@run_flags(PrefillConfig)
@flag(PrefillConfig, "detector", metavar="DETECTOR")
@flag(PrefillConfig, "boxes", metavar="FILE")
@flag(PrefillConfig, "checkpoint", metavar="NAME|FILE|ROUND")
@flag(PrefillConfig, "device", metavar="DEVICE")
@flag(PrefillConfig, "precision", type=click.Choice(["fp32", "bf16"]))
def prefill(file: Path | None, sets: tuple[str, ...], **flags: Any) -> None:
    """Draw masks of detected boxes, for annotators to start from.

    This is the first half of the paper's semi-automatic stage. Run it again with the same options to
    resume it.
    """
    _run_stage("prefill", PrefillConfig, file, sets, flags)


@click.command()
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


@click.command("blur-eval")
@click.option(
    "--truth", type=Path, required=True, metavar="FILE", help="COCO annotations of boxes."
)
@click.option("--images", type=Path, metavar="DIR", help="Photos; default: images/ beside FILE.")
@click.option("--kind", type=click.Choice(["face", "plate"]), help="Default: by the categories.")
@config_flags
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

    told = rounds.notes(config.checkpoint) if isinstance(config, ModelConfig) else []
    if isinstance(config, PrefillConfig) and config.detector is not None:
        told += rounds.notes(config.detector)
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


@click.command()
@flag(RetrainConfig, "init", metavar="NAME|FILE|ROUND")
@round_flags(RetrainConfig)
def retrain(file: Path | None, sets: tuple[str, ...], **flags: Any) -> None:
    """Train SAM again on the masks of shards.

    This is the paper's training between rounds. The output is a round, a folder that every command takes as
    --checkpoint. Run it again with the same options to resume it.
    """
    _train("retrain", RetrainConfig, file, sets, flags)


@click.command("retrain detector")
@flag(DetectorConfig, "checkpoint", metavar="NAME|FILE|ROUND")
@flag(DetectorConfig, "init", metavar="DETECTOR")
@flag(DetectorConfig, "backbone", type=click.Choice(["sam", "resnet50", "mobilenet"]))
@round_flags(DetectorConfig)
def retrain_detector(file: Path | None, sets: tuple[str, ...], **flags: Any) -> None:
    """Train the class-agnostic box detector on the masks of shards.

    It proposes the boxes from which `prefill --detector` draws masks. The output is a folder like a round. Run it
    again with the same options to resume it.
    """
    _train("retrain_detector", DetectorConfig, file, sets, flags)


def _train(
    name: str,
    cls: type[RoundConfig],
    file: Path | None,
    sets: tuple[str, ...],
    flags: dict[str, Any],
) -> None:
    """Read a round's options, then train it or say what would be done."""
    overwrite, steal_lock, dry_run = (
        flags.pop(key) for key in ("overwrite", "steal_lock", "dry_run")
    )
    config = load_config(cls, file, sets, flags)
    stage = importlib.import_module(f"stages.{name}")
    planned = stage.plan(config, overwrite)
    if dry_run or planned.finished is None:
        click.echo(planned, err=not dry_run)
    if dry_run:
        click.echo(f"\n{to_yaml(config)}", nl=False)
        return
    click.echo(stage.run(planned, overwrite, steal_lock))
