"""The full state of a training, written whole or not at all: what a resumed round goes on from.

Random choices need no state: each is drawn from a generator seeded by the round's seed, the iteration and the image's
position in the batch, so that the iteration alone says where the sampler and all generators stand.
"""

import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sa_engine.storage import AnyPath, RunError, RunPaths, place


@dataclass
class TrainingState:
    """What there is after some iterations.

    Attributes:
        iteration: finished ones.
        model: state dict of the SAM.
        optimizer: state dict of the optimizer.
        seconds: of training so far.
        count: of masks (or images) trained so far.
        validations: of every validation so far, {"iteration": ..., data set: mean IoU, ...}.
        best: iteration with the best validation, and its state dict; None before the first.
    """

    iteration: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    seconds: float = 0.0
    count: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)
    best: tuple[int, dict[str, Tensor]] | None = None


def state_path(paths: RunPaths) -> AnyPath:
    """Where a round keeps its state."""
    return paths.run / "state.pt"


def save_state(paths: RunPaths, state: TrainingState) -> None:
    """Replace the saved state of a round."""
    paths.scratch.mkdir(parents=True, exist_ok=True)
    temporary = paths.scratch / f".{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(vars(state), file)
        place(temporary, state_path(paths))
    except RuntimeError as error:
        if isinstance(
            error.__context__, OSError
        ):  # a full disk; torch stumbles over what is missing then
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def load_state(paths: RunPaths) -> TrainingState | None:
    """The saved state of a round, on the CPU; None if it has none. Raises RunError if it cannot be read."""
    path = state_path(paths)
    try:
        with path.open("rb") as file:
            return TrainingState(**torch.load(file, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        return None
    except Exception as error:  # torch raises a dozen unrelated types for a damaged file
        raise RunError(
            f"cannot read {path}: {type(error).__name__}; put back the file that was written, or start "
            "the round over with --overwrite"
        ) from error
