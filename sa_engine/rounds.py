"""Rounds: what a retraining leaves in a folder, and how it is read back.

A round is a folder with `model.safetensors`, the weights, and `model.json`, which says what they were made from.
`model.json` is written last: where it is, the weights are whole and its own. Both carry the model's fingerprint, so
that two rounds whose files were mixed are told apart by reading a file's header.

Nothing here imports torch until a model is written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sa_engine import __version__
from sa_engine.errors import SaEngineError
from sa_engine.storage import atomic_write, place

if TYPE_CHECKING:
    from torch.nn import Module

    from sa_engine.modeling.sam import Sam

SCHEMA_VERSION = 1
WEIGHTS, INFO = "model.safetensors", "model.json"
MIOU = "miou_1pt"  # the mean IoU after one click, in metrics and in what a gate measured
FRESH = "fresh"  # the parent's name of what started from no other weights
RECALL = "ar_100"  # average recall of 100 boxes, likewise


class RoundError(SaEngineError):
    """A folder that is no round, or one whose files cannot be read or written."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The model that a round started from.

    Attributes:
        name: as it was given: a model's name, a file or a round.
        fingerprint: of that model's weights.
        sha256: of its file.
        encoder: where another image encoder came from, as it was given, or "fresh"; None: the parent's own.
        encoder_sha256: of that file.
        notes: what was done to the weights before training, a sentence each.
    """

    name: str
    fingerprint: str
    sha256: str
    encoder: str | None = None
    encoder_sha256: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """A run that a round was trained on.

    Attributes:
        run: its folder.
        name: for tables.
        fingerprint: sha256 over its photos' hashes and masks.
        images, masks: that were trained on.
        left_out: masks that were not, by reason.
    """

    run: str
    name: str
    fingerprint: str
    images: int
    masks: int
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a round may be used in its parent's place, see `training.gate`.

    Attributes:
        promoted: it may.
        reason: a sentence with the numbers.
        before, after: what was measured of both, `miou_1pt` among it.
        margins: by how much a number may fall.
    """

    promoted: bool
    reason: str
    before: dict[str, Any]
    after: dict[str, Any]
    margins: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DetectorFacts:
    """What a box detector is.

    Attributes:
        backbone: what it sees, see `detection.config`.
        image_size: longest side of the image in its input, in pixels.
        objectness: what its scores say.
        encoder: fingerprint of the image encoder whose embedding it sees; None: it sees the pixels.
        start: what its backbone began from, "fresh" or torchvision's name of weights; None: it is older than this line.
    """

    backbone: str
    image_size: int
    objectness: str
    encoder: str | None
    start: str | None = None


@dataclass(frozen=True, kw_only=True)
class RoundInfo:
    """The content of `model.json`.

    Attributes:
        architecture, decoder_depth, fingerprint: of the weights, see `model_facts`; a detector has no depth: 0.
        parent: what training started from.
        data: what it was trained on.
        config: all options.
        iterations: optimizer steps.
        seconds: that training took.
        metrics: what training measured; `before` and `after`, each with the `measure`, are of the validation images.
        gate: None: there was none.
        detector: of a box detector; None: it is a SAM.
        schema_version: of this file.
        version: of sa-engine.
    """

    architecture: str
    decoder_depth: int
    fingerprint: str
    parent: Parent
    data: tuple[TrainingData, ...]
    config: dict[str, Any]
    iterations: int
    seconds: float
    metrics: dict[str, Any]
    gate: Verdict | None = None
    detector: DetectorFacts | None = None
    schema_version: int = SCHEMA_VERSION
    version: str = __version__

    @property
    def measure(self) -> str:
        """By which such models are compared: the name of a figure."""
        return MIOU if self.detector is None else RECALL

    def validation(self) -> tuple[float, float] | None:
        """The `measure` before and after training: of the validation images, else of the gate; None: not measured."""
        measured = [(self.metrics.get("before"), self.metrics.get("after"))]
        if self.gate is not None:
            measured.append((self.gate.before, self.gate.after))
        for pair in measured:
            values = [one.get(self.measure) if isinstance(one, dict) else None for one in pair]
            if all(isinstance(value, int | float) for value in values):
                return float(values[0]), float(values[1])  # type: ignore[arg-type]
        return None


def model_facts(sam: Sam) -> dict[str, Any]:
    """Of a model: `architecture`, `decoder_depth` and `fingerprint`, as `RoundInfo` wants them."""
    from sa_engine.modeling.sam import detect_architecture, model_fingerprint

    return {
        "architecture": detect_architecture(sam.state_dict(), Path(WEIGHTS)),
        "decoder_depth": len(sam.mask_decoder.transformer.layers),
        "fingerprint": model_fingerprint(sam),
    }


def write_model(out: Path, model: Module, info: RoundInfo, scratch: Path | None = None) -> None:
    """Write a round: `model.safetensors`, then `model.json`, each whole or not at all.

    Args:
        out: its folder; it is made if it is missing, and a round that is there is replaced.
        scratch: folder for temporary files, on the same file system; default: `out`.
        model: a SAM or a detector.
        info: what to say of it.

    Raises:
        RoundError: the folder cannot be written.
        ValueError: `info` is of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from sa_engine.modeling.sam import model_fingerprint

    found = {"fingerprint": model_fingerprint(model)}
    facts = found if info.detector else model_facts(cast("Sam", model))
    if any(getattr(info, name) != value for name, value in facts.items()):
        raise ValueError(f"info is of another model than {facts}")
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    content = json.dumps(_plain(dataclasses.asdict(info)), indent=1, allow_nan=False) + "\n"
    temporary = (scratch or out) / f".{uuid.uuid4().hex}.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, {"fingerprint": info.fingerprint})
            temporary.chmod(mode)  # safetensors makes files that their owner alone can read
            (out / INFO).unlink(missing_ok=True)  # it would be of other weights for a moment
            place(temporary, out / WEIGHTS)
        finally:
            temporary.unlink(missing_ok=True)
        atomic_write(out / INFO, content.encode(), scratch=scratch)
    except (OSError, SafetensorError) as error:
        detail = getattr(error, "strerror", None) or error
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise RoundError(
            f"cannot write the round {out}: {detail}; name a folder that can be written, with room "
            f"for {size / 1e6:,.0f} MB"
        ) from None


def read_round(path: Path) -> RoundInfo:
    """What the `model.json` of a round's folder says. Raises RoundError."""
    file = path / INFO
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise RoundError(
            f"{path} is not a round: there is no {INFO} in it. A round is a folder that "
            f"`sa-engine retrain --out` has finished, with {WEIGHTS} and {INFO}"
        ) from None
    except OSError as error:
        raise RoundError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RoundError(
            f"{file}: damaged, it is not JSON ({error}); name {path / WEIGHTS} to use the weights "
            "without it"
        ) from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        found = "none" if version is None else json.dumps(version)
        raise RoundError(
            f"{file}: schema_version {found}, expected {SCHEMA_VERSION}: it is of another program, "
            "or of another version of sa-engine"
        )
    return _checked(content, file)


def _checked(content: dict[str, Any], file: Path) -> RoundInfo:
    """The content of `model.json` with the types that are stated. Raises RoundError."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(RoundInfo).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        found = json.dumps(first["input"])[:40]
        raise RoundError(f"{file}: damaged, {where}: {first['msg']}; found {found}") from None


def read_detector(path: Path) -> RoundInfo:
    """What a detector's folder says of it. Raises RoundError for what is no detector."""
    return _read_kind(path, detector=True)


def _read_kind(path: Path, detector: bool) -> RoundInfo:
    """The content of `model.json`. Raises RoundError also if the model is of the other kind."""
    info = read_round(path)
    if detector and info.detector is None:
        raise RoundError(
            f"{path / INFO} is of a {info.architecture} SAM, expected a detector: name a folder that "
            "`sa-engine retrain detector --out` has finished"
        )
    if info.detector is not None and not detector:
        raise RoundError(
            f"{path / INFO} is of a detector, expected a SAM: name a folder that `sa-engine retrain "
            "--out` has finished, a file or a model's name"
        )
    return info


def weights_of(path: Path, detector: bool = False) -> Path:
    """The weights of a round, by its folder; cheap: of the weights only the header is read.

    Args:
        path: the folder.
        detector: whether it is to be a detector's, or a SAM's.

    Raises:
        RoundError: not a finished round, one of the other kind, or weights that are cut off or of another round.
    """
    from safetensors import SafetensorError, safe_open

    fingerprint, file = _read_kind(path, detector).fingerprint, path / WEIGHTS
    try:
        with safe_open(file, framework="numpy") as tensors:
            found = (tensors.metadata() or {}).get("fingerprint")
    except (OSError, SafetensorError) as error:
        raise RoundError(
            f"the round {path} has no weights that can be read: {file}: {error}; train it again"
        ) from None
    if found != fingerprint:
        raise RoundError(
            f"{file} is not what {INFO} beside it describes: its fingerprint is "
            f"{(found or 'missing')[:12]}, expected {fingerprint[:12]}; restore the file, or name the "
            "file itself to use it all the same"
        )
    return file


def notes(checkpoint: str) -> list[str]:
    """What a user should be told of a round that is used as a checkpoint, a sentence each."""
    folder = Path(checkpoint).expanduser()
    gate = read_round(folder).gate if (folder / INFO).is_file() else None
    if gate is None or gate.promoted:
        return []
    return [f"the gate refused the round {checkpoint}: {gate.reason}"]


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; what is not finite becomes null: a model is not lost for the sake of a metric."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    number = value.item() if hasattr(value, "item") else value  # of NumPy or torch
    return None if isinstance(number, float) and not math.isfinite(number) else number
