"""An evaluation from start to report: data sets opened, models loaded and compared, results written."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm

from sa_engine import __version__
from sa_engine.evaluation.data import open_data
from sa_engine.evaluation.interactive import EvaluationError, Protocol, evaluate_models
from sa_engine.evaluation.results import ModelResult, Report, short_names
from sa_engine.modeling.sam import load_sam, model_fingerprint, select_device
from sa_engine.modeling.weights import resolve
from sa_engine.predictor import Predictor
from sa_engine.resources import cores
from sa_engine.storage import AnyPath, location, write_results


def evaluate(
    data: Sequence[str],
    checkpoints: Sequence[str],
    protocol: Protocol,
    *,
    split: str = "all",
    limit: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    progress: bool = False,
) -> Report:
    """Compare models on data sets.

    Args:
        data: folders of runs of shards.
        checkpoints: names or files; all are loaded before there is work, and the first is what the
            others are compared with.
        protocol: what to measure.
        split: of each run, see `open_data`.
        limit: images per data set, likewise.
        device, precision: of the models.
        threads: CPU threads; None: all.
        progress: show a bar on stderr.

    Raises:
        SaEngineError: no run, no masks, no such checkpoint or device, or an image that cannot be read.
    """
    places = [location(one) for one in data]
    if len(set(map(str, places))) < len(places):
        raise EvaluationError(f"--data names a folder twice: {', '.join(data)}")
    threads = threads or cores()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    names = short_names([str(place) for place in places])
    sets = tuple(
        open_data(place, name, split, limit, protocol.seed)
        for place, name in zip(places, names, strict=True)
    )
    where = select_device(device)
    sams = [load_sam(resolve(checkpoint, progress)) for checkpoint in checkpoints]
    predictors = [Predictor(sam.to(where), precision) for sam in sams]
    seconds = [0.0] * len(sams)
    total = len(sams) * sum(len(one.image_ids) for one in sets)
    with tqdm(total=total, unit="image", disable=not progress, dynamic_ncols=True) as bar:
        found = [evaluate_models(predictors, one, protocol, bar.update, seconds) for one in sets]
    models = tuple(
        ModelResult(name, model_fingerprint(sam), spent, tuple(evaluations))
        for name, sam, spent, *evaluations in zip(
            short_names(checkpoints), sams, seconds, *found, strict=True
        )
    )
    settings = {
        "split": split,
        "limit_images": limit,
        "device": str(where),
        "precision": precision,
        "threads": threads,
        "versions": _versions(),
    }
    return Report(protocol=protocol, data=sets, models=models, settings=settings)


def prepare_output(out: AnyPath) -> None:
    """Make the folder of the results. Raises EvaluationError if it cannot be, before there is work."""
    if not isinstance(out, Path):
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(
            f"--out {out}: {error.strerror}; name a folder that can be written"
        ) from None


def write(report: Report, out: AnyPath) -> list[AnyPath]:
    """Write `evaluate.json` and `evaluate.png` into a folder, each whole or not at all.

    Raises RunError if they cannot be written.
    """
    from sa_engine.evaluation.plots import plot

    content = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    return write_results(out, {"evaluate.json": content.encode(), "evaluate.png": plot(report)})


def _versions() -> dict[str, Any]:
    return {
        "sa_engine": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
