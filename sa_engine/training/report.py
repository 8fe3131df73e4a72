"""What is said of a round: before it is trained, and when it is finished. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa_engine.options import ConfigError
from sa_engine.rounds import Parent, RoundInfo
from sa_engine.storage import RunPaths, location
from sa_engine.training.config import RoundConfig

if TYPE_CHECKING:
    from sa_engine.evaluation.data import DataSet
    from sa_engine.training.data import TrainingData
    from sa_engine.training.memory import MemoryEstimate


@dataclass(frozen=True)
class Plan:
    """A round before it is trained: all that can be known and refused by then.

    Attributes:
        stage: by which it is trained.
        config: its options.
        paths: its folder.
        data: what it is trained on.
        parent: what it starts from.
        fingerprint: of the weights that it starts from.
        gate: data sets that it is judged on.
        parameters: trained, and all.
        memory: of a worker; None: not known.
        shortage: what to do if that is too much; None if it is not.
        done: iterations that are done already.
        finished: the round, if it is there already.
    """

    stage: str
    config: RoundConfig
    paths: RunPaths
    data: TrainingData
    parent: Parent
    fingerprint: str
    gate: tuple[DataSet, ...]
    parameters: tuple[int, int]
    memory: MemoryEstimate | None = None
    shortage: str | None = None
    done: int = 0
    finished: RoundInfo | None = None

    @property
    def out(self) -> Path:
        """The round's folder."""
        assert isinstance(self.paths.out, Path), "see `round_paths`"
        return self.paths.out

    def __str__(self) -> str:
        """One line for each thing that a person wants to check before the start."""
        config = self.config
        trained, total = self.parameters
        lines = [f"init: {self.parent.name} ({self.fingerprint[:12]})"]
        lines += [f"  {note}" for note in self.parent.notes]
        lines.append(f"trained: {trained / 1e6:.1f} of {total / 1e6:.1f} million parameters")
        for run in self.data.runs:
            kept = f"; {run.validation_images} images to validate on" * (run.validation_images > 0)
            held = f"; {run.held_out} held out" * (run.held_out > 0)
            left = f"; {run.large_masks} masks too large" * (run.large_masks > 0)
            left += f"; {run.other_masks} masks of other sources" * (run.other_masks > 0)
            lines.append(
                f"data: {run.name}, {run.images} images, {run.masks} masks{kept}{held}{left}"
            )
        epochs = config.iterations * config.batch_size / self.data.slots
        lines.append(
            f"{config.iterations} iterations of {config.batch_size} images, {epochs:.1f} epochs"
            + f"; {self.done} done" * (self.done > 0)
        )
        if self.memory is not None:
            lines.append(str(self.memory))
        if self.shortage is not None:
            lines.append(f"warning: {self.shortage}")
        for one in self.gate:
            left = f"; {one.left_out} left out, which are in the data" * (one.left_out > 0)
            lines.append(f"gate: {one.name}, {len(one.image_ids)} images{left}")
        return "\n".join([*lines, f"output: {self.paths.out}"])


@dataclass(frozen=True)
class RoundReport:
    """A finished round."""

    paths: RunPaths
    info: RoundInfo

    def __str__(self) -> str:
        """Give what was reached, in a few lines."""
        info = self.info
        lines = [f"round: {self.paths.out} ({info.architecture}, {info.fingerprint[:12]})"]
        lines.append(f"{info.iterations} iterations, {info.seconds / 60:.1f} minutes of training")
        kept = info.metrics.get("kept_iteration", info.iterations)
        if kept == 0:
            lines.append(
                "weights of iteration 0: on the validation images none was better than what it started from; "
                "try a lower lr, more iterations or other data"
            )
        elif kept != info.iterations:
            lines.append(f"weights of iteration {kept}, the best on the validation images")
        before, after = info.metrics.get("before", {}), info.metrics.get("after", {})
        lines += [
            f"validation {name}: {before[name]:.3f} -> {after[name]:.3f} ({after[name] - before[name]:+.3f})"
            for name in after
        ]
        if info.gate is not None:
            verdict = "promoted" if info.gate.promoted else "NOT promoted"
            lines.append(f"gate: {verdict}: {info.gate.reason}")
        return "\n".join(lines)


def round_paths(config: RoundConfig) -> RunPaths:
    """Where a round's files are.

    Raises ConfigError for what is no folder on a file system, or one that holds what the round is made from.
    """
    out = location(config.out)
    if not isinstance(out, Path):
        raise ConfigError(
            f"out = {config.out}: expected a folder on a file system that all workers share"
        )
    for name in ("data", "gate", "init", "encoder_init", "checkpoint"):
        given = getattr(config, name, None) or ()
        for text in (given,) if isinstance(given, str) else given:
            place = location(text)
            if isinstance(place, Path) and place.exists() and place.is_relative_to(out):
                raise ConfigError(
                    f"{name} {text} lies in out = {config.out}, which the round will own: name another folder "
                    "for the round"
                )
    return RunPaths(out)
