"""Privacy (paper §5, §F): the same tree of images, without faces and licence plates.

It comes before everything else, so that no unblurred pixel is ever annotated, trained on or released. What happens to
a photo is in ``sa_engine/privacy``: detectors look at it in many sizes, what they find is redacted, and they look again
at the file that will be released. A photo that anything goes wrong with is not released.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sa_engine import runner
from sa_engine.boxes import Boxes, extra_boxes
from sa_engine.config import BlurConfig
from sa_engine.images import decode_image, encode_as, read_icc
from sa_engine.partial import Finished, finished_redaction
from sa_engine.plan import PlannedImage

if TYPE_CHECKING:
    from sa_engine.privacy.redactor import Redacted, Redactor

# Peak memory measured: 0.51 GB with photos of 3.4 megapixels, 0.72 with one of 24 (docs/blur.md).
_MEMORY = 1_000_000_000


class Decoded(NamedTuple):
    """A photo ready for the detectors."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, upright
    icc: bytes | None
    sha256: str  # of the file


@dataclass
class BlurStage:
    """The stage as the runner knows it; it travels to the workers with the driver's fingerprints."""

    boxes: Boxes = field(default_factory=Boxes)
    name: str = "blur"
    expected: dict[str, str] | None = None

    def identity(self, config: BlurConfig) -> dict[str, str]:
        """Load the detectors, try them, and say which weights they have."""
        self.expected = self._load(config).identity()
        return self.expected

    def worker_memory(self, config: BlurConfig) -> int:
        """Peak memory of a worker with photos of usual sizes."""
        return _MEMORY

    def make_worker(self, config: BlurConfig) -> "BlurWorker":
        """Load the detectors in this process, try them, and check that they are the driver's."""
        redactor = self._load(config)
        if self.expected is not None:
            redactor.check_same(self.expected)
        return BlurWorker(redactor, self.boxes, config)

    def _load(self, config: BlurConfig) -> "Redactor":
        from sa_engine.privacy.redactor import load_redactor

        return load_redactor(config, config.threads_per_worker or 1, config.device)


class BlurWorker:
    """One photo at a time, in the runner's three overlapping steps."""

    def __init__(self, redactor: "Redactor", boxes: Boxes, config: BlurConfig) -> None:
        self.redactor = redactor
        self.boxes = boxes
        self.config = config
        self.detectors = redactor.describe()

    def prepare(self, item: PlannedImage, data: bytes) -> Decoded:
        """Decode a photo, upright; its metadata ends here."""
        icc = read_icc(data) if self.config.keep_icc else None
        return Decoded(decode_image(data), icc, hashlib.sha256(data).hexdigest())

    def process(self, item: PlannedImage, prepared: Decoded) -> "tuple[Decoded, Redacted]":
        """Detect, redact, encode, and look at what came out."""
        suffix = PurePosixPath(item.key).suffix

        def release(image: np.ndarray) -> tuple[bytes, np.ndarray]:
            encoded = encode_as(image, suffix, self.config.jpeg_quality, prepared.icc)
            return encoded, decode_image(encoded)

        boxes = self.boxes.of(item.key)[:, :4].tolist()
        return prepared, self.redactor.redact(prepared.image, boxes, release)

    def finish(self, item: PlannedImage, result: "tuple[Decoded, Redacted]") -> Finished:
        """Write down what was done."""
        from sa_engine.privacy.audit import audit_of

        decoded, redacted = result
        audit = audit_of(
            item,
            redacted,
            sha256_in=decoded.sha256,
            sha256_out=hashlib.sha256(redacted.encoded).hexdigest(),
            detectors=self.detectors,
            config=self.config,
        )
        return finished_redaction(audit, {item.key: redacted.encoded})


def run(config: BlurConfig, start: runner.Start = runner.RESUME) -> runner.Report:
    """Redact every photo of ``config.images`` into the same tree under ``config.out``.

    Raises:
        SaEngineError: bad input, another run's folder, detectors that fail their self-test, or too many failures: by
            default, one.
    """
    stage = _stage(config)
    return runner.run(stage, config, lambda: stage.identity(config), start)


def describe(config: BlurConfig, start: runner.Start = runner.RESUME) -> runner.PlanSummary:
    """What :func:`run` would do, without doing or writing anything."""
    return runner.describe(_stage(config), config, start)


def _stage(config: BlurConfig) -> BlurStage:
    return BlurStage(extra_boxes(config, config))
