"""One process of a training: builds its model, fills its share of the cache, trains, and as the main one writes."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from tqdm import tqdm

from sa_engine.modeling.sam import Sam, encoder_fingerprint, model_fingerprint
from sa_engine.storage import RunError, RunPaths, atomic_write
from sa_engine.training.config import RetrainConfig, RoundConfig
from sa_engine.training.data import TrainingData
from sa_engine.training.embeddings import EmbeddingCache
from sa_engine.training.group import Group
from sa_engine.training.init import initial_model
from sa_engine.training.loop import Trainer
from sa_engine.training.sam import SamTrainer
from sa_engine.training.state import TrainingState, load_state, save_state
from sa_engine.training.tally import TIMES
from sa_engine.training.validation import Validation, ValidationImages

METRICS = "metrics.jsonl"
_LINE_S = 30.0


@dataclass(frozen=True)
class Job:
    """What a worker is sent.

    Attributes:
        make: a function of a module, which gives the trainer in a worker's process.
        config: of the round.
        paths: of the round.
        data: what it is trained on.
        fingerprint: of the model that it starts from, which every worker loads by itself.
    """

    make: "Callable[[Group, Job, TrainingState | None], Trainer[Any, Any]]"
    config: RoundConfig
    paths: RunPaths
    data: TrainingData
    fingerprint: str


def work(group: Group, job: Job) -> int:
    """Train, in this process; gives the number of the signal that ended it, 0 if none did."""
    cv2.setNumThreads(1)
    trainer = job.make(group, job, load_state(job.paths))
    if not group.is_main:
        return trainer.run(_nothing, _nothing)
    with _Journal(job.paths, trainer) as journal:
        return trainer.run(lambda state: save_state(job.paths, state), journal.note, journal.tick)


def first_model(config: RetrainConfig, device: torch.device | str = "cpu") -> Any:
    """The SAM that a round starts from, and its parent; the same in every process."""
    return initial_model(
        config.init,
        architecture=config.architecture,
        encoder_init=config.encoder_init,
        decoder_depth=config.decoder_depth,
        dropout=config.dropout,
        drop_path=config.drop_path if config.train_encoder else 0.0,
        seed=config.seed,
        device=device,
    )


def sam_trainer(group: Group, job: Job, state: TrainingState | None) -> SamTrainer:
    """The trainer of a SAM. Raises RunError if a worker finds another model than the round was started with."""
    config = job.config
    assert isinstance(config, RetrainConfig)
    sam, _ = first_model(config)
    if model_fingerprint(sam) != job.fingerprint:
        raise RunError(
            f"init {config.init} has other weights on worker {group.rank} than where the round was "
            "started: give all machines the same file"
        )
    sam.to(group.device)
    cache = open_cache(group, job, sam) if config.cached else None
    validation = None
    if config.validation:
        images = ValidationImages(job.data.validation_sets(), config.validation_images, group)
        validation = Validation(images, frozen=not config.train_encoder)
    return SamTrainer(config, group, sam, job.data, cache, validation, state)


def open_cache(group: Group, job: Job, sam: Sam) -> EmbeddingCache:
    """The embeddings of a round's images by a model's encoder, made or not.

    Raises EmbeddingCacheError if those that are missing have no room.
    """
    own = job.config.embeddings
    folder = Path(own).expanduser() if own else job.paths.scratch.parent / "embeddings"
    cache = EmbeddingCache(folder, f"{encoder_fingerprint(sam)}-{job.config.precision}")
    if group.is_main:
        cache.check_space({job.data.content_key(index) for index in range(len(job.data))})
    return cache


def _nothing(*args: object) -> None:
    """What workers other than the main one do with what all of them know."""


class _Journal:
    """What the main worker tells of a training: `metrics.jsonl`, TensorBoard where it is installed, a bar or lines."""

    def __init__(self, paths: RunPaths, trainer: Trainer[Any, Any]) -> None:
        state = trainer.state
        self._path, self._scratch = paths.out / METRICS, paths.scratch
        self._measured, self._words = trainer.measure_name, trainer.told
        # Lines after the state that training goes on from will be written again.
        reached = state.iteration or -1
        self._lines = [one for one in read_metrics(paths) if one["iteration"] <= reached]
        self._total, self._first = trainer.config.iterations, state.iteration
        self._board = _board(paths)
        self._bar: tqdm | None = None
        self._told = time.monotonic()

    def __enter__(self) -> "_Journal":
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total, initial=self._first, unit="step", dynamic_ncols=True
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()

    def tick(self, iteration: int) -> None:
        """An iteration is finished."""
        if self._bar is not None:
            self._bar.update(iteration - self._bar.n)

    def note(self, line: dict[str, Any]) -> None:
        """Keep a line of metrics."""
        self._lines.append(line)
        text = "".join(json.dumps(one) + "\n" for one in self._lines)
        atomic_write(self._path, text.encode(), scratch=self._scratch, durable=False)
        parts: dict[str, float] = next((line[key] for key in line if key.startswith(TIMES)), {})
        values = {**line, **line.get("validation", {}), **parts}
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("iteration", "masks", "images"):
                    self._board.add_scalar(name, value, line["iteration"])
        told = words(line, self._words, self._measured)
        if self._bar is not None:
            self._bar.set_postfix_str(told)
        elif time.monotonic() - self._told > _LINE_S or "validation" in line:
            self._told = time.monotonic()
            sys.stderr.write(f"{line['iteration']} of {self._total} steps, {told}\n")
            sys.stderr.flush()


def words(line: dict[str, Any], names: Mapping[str, str], measured: str) -> str:
    """A line of metrics as a person reads it: means by their `names`, or what was `measured` on validation images."""
    if "validation" in line:
        found = [f"{name} {value:.3f}" for name, value in line["validation"].items()]
        return f"validation {measured}: " + ", ".join(found)
    known = {told: line[name] for name, told in names.items() if line[name] is not None}
    return ", ".join(f"{told} {value:.3f}" for told, value in known.items())


def read_metrics(paths: RunPaths) -> list[dict[str, Any]]:
    """All whole lines of a round's `metrics.jsonl`; none if there is no such file."""
    try:
        lines = (paths.out / METRICS).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(
            ValueError
        ):  # cut off by a power cut: metrics are not worth waiting for the disk
            found.append(json.loads(line))
    return found


def _board(paths: RunPaths) -> Any:
    """A writer of TensorBoard's files; Ray Train brings the package, a leaner installation may lack it."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(paths.run / "tensorboard"))
