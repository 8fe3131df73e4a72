"""What a loop's page shows of a step's output: numbers and pictures, read from the folder alone.

Markers and a few images are read, never all masks: the page of eleven million images takes as long as that of eleven.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from sa_engine.analysis.text import table_cells
from sa_engine.engine.file import Step
from sa_engine.errors import SaEngineError
from sa_engine.finished import FinishedRun
from sa_engine.images import decode_image, encode_jpeg
from sa_engine.pictures import draw_masks, fit
from sa_engine.plan import Plan, read_plan
from sa_engine.rounds import INFO, RoundInfo, read_round
from sa_engine.shards import committed_shards
from sa_engine.status import read_status
from sa_engine.storage import AnyPath, RunPaths, find_run, list_names, location

PICTURES = 4  # of a step
_RUNS = ("blur", "ingest", "prefill", "auto")
_FIT = (420, 240)  # pixels
_QUALITY = 85
# What commands leave for people to look at, at the top of their output.
_PNG_JPG = ("contact_sheet.jpg", "curves.png", "evaluate.png", "recall.png", "worst.jpg")
_TABLE = "report.json"
T = TypeVar("T")


@dataclass
class Shown:
    """What there is to show of a step.

    Attributes:
        images, masks: finished ones, if it is a run over images.
        counts: what was found, such as {"masks": 120}.
        pictures: JPEG files with a caption each: photos with their masks, or redacted ones.
        round: if it is a round of SAM or of the detector.
        files: pictures in its folder.
        table: of `sa-engine report`, as text, heads first.
        page: its report.html.
        note: why something is missing here.
    """

    images: int | None = None
    masks: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    pictures: list[tuple[bytes, str]] = field(default_factory=list)
    round: RoundInfo | None = None
    files: list[Path] = field(default_factory=list)
    table: list[list[str]] = field(default_factory=list)
    page: Path | None = None
    note: str = ""


def look_at(step: Step) -> Shown:
    """What there is to show of a step; what cannot be read is said in its note, as a page is not worth a crash."""
    shown = Shown()
    if step.out is None or step.kind == "wait":
        return shown
    out = location(step.out)
    for add in (_add_run if step.kind in _RUNS else _add_round, _add_files, _add_table):
        try:
            add(shown, out)
        # A file that is damaged, or of another version, makes readers raise nearly anything.
        except Exception as error:
            said = " ".join(str(error).split())
            shown.note = f"{out} cannot be shown: {type(error).__name__}: {said}"
    return shown


def _add_round(shown: Shown, out: AnyPath) -> None:
    if isinstance(out, Path) and (out / INFO).exists():
        shown.round = read_round(out)


def _add_run(shown: Shown, out: AnyPath) -> None:
    paths = find_run(out)
    if not paths.info.exists():
        return
    status = read_status(out)
    shown.images, shown.counts = status.ok, status.counts
    shown.masks = None if paths.work is not None else status.masks
    for picture, caption in _pictures(paths):
        small = fit(picture, *_FIT)
        shown.pictures.append((encode_jpeg(small, _QUALITY), caption))
        if len(shown.pictures) == PICTURES:
            return


def _pictures(paths: RunPaths) -> Iterator[tuple[np.ndarray, str]]:
    """Images of a run, spread over it: redacted photos, or photos with their masks."""
    done = sorted(committed_shards(paths))
    plan = read_plan(paths.plan)
    run = None if paths.work is not None else FinishedRun(paths.out)
    for image in _spread(plan, done):
        name = Path(image[1]).stem
        try:
            if run is None:
                yield decode_image((paths.out / image[1]).read_bytes()), name
            else:
                record = run.record(image[0])
                number = len(record.masks)
                masks = "1 mask" if number == 1 else f"{number} masks"
                yield draw_masks(run.picture(record), record.masks), f"{name}: {masks}"
        except (SaEngineError, OSError):
            continue  # it failed; another one is shown


def _spread(plan: Plan, done: list[int]) -> Iterator[tuple[int, str]]:
    """Ids and keys of images in the done shards: evenly spread ones, then, if one has failed, others."""
    chosen = _evenly(done, PICTURES)
    each = -(-PICTURES // max(1, len(chosen)))
    seen = set()
    for image in (image for index in chosen for image in _evenly(plan[index].images, each)):
        seen.add(image.image_id)
        yield image.image_id, image.key
    for image in (image for index in done for image in plan[index].images):
        if image.image_id not in seen:
            yield image.image_id, image.key


def _evenly(items: Sequence[T], count: int) -> list[T]:
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _add_files(shown: Shown, out: AnyPath) -> None:
    if isinstance(out, Path) and out.is_dir():
        names = list_names(out)
        shown.files = [out / name for name in _PNG_JPG if name in names]
        shown.page = out / "report.html" if "report.html" in names else None


def _add_table(shown: Shown, out: AnyPath) -> None:
    if isinstance(out, Path) and (out / _TABLE).is_file():
        shown.table = table_cells(json.loads((out / _TABLE).read_bytes())["stages"], True)
