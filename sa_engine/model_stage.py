"""What stages that prompt SAM have in common: the model, and that every worker has the driver's."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sa_engine.errors import SaEngineError

if TYPE_CHECKING:  # a finished run returns without importing torch
    from sa_engine.modeling.sam import Sam

# Peak memory measured on a CPU with a 16-megapixel photo: 1.1 GB for vit_t (40 MB of weights), 1.5 for vit_b (375 MB),
# 3.1 for vit_l (1.25 GB), 5.6 for vit_h (2.56 GB); the paper's setting takes 0.2 to 0.5 more (benchmarks/README.md).
_MEMORY_WITHOUT_MODEL = 1_300_000_000
_MEMORY_PER_WEIGHT_BYTE = 2


class ModelMismatch(SaEngineError):
    """A worker found other weights under the checkpoint's name than the driver."""


@dataclass(kw_only=True)
class ModelStage:
    """A stage as the runner knows it; it travels to the workers with the driver's model fingerprint.

    Attributes:
        checkpoint: as `absolute` gives it.
        fingerprint: of the weights that the driver found; None before it has looked.
        sam: the driver's model.
    """

    checkpoint: str
    fingerprint: str | None = None
    sam: "Sam | None" = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        """Leave the model behind: a worker loads its own and compares fingerprints."""
        return {**vars(self), "sam": None}

    def load_model(self) -> str:
        """Load the model; gives its fingerprint."""
        from sa_engine.modeling.sam import load_sam, model_fingerprint
        from sa_engine.modeling.weights import resolve

        self.sam = load_sam(resolve(self.checkpoint))
        self.fingerprint = model_fingerprint(self.sam)
        return self.fingerprint

    def dry_identity(self) -> dict[str, str]:
        """What `identity` says of the model, for a dry run; empty if it would have to be fetched first.

        Raises SaEngineError for a model that `load_model` would refuse.
        """
        from sa_engine.modeling.weights import MODELS, find

        if self.checkpoint in MODELS and find(self.checkpoint) is None:
            return {}
        return {"model_fingerprint": self.load_model()}

    def model_of_worker(self) -> tuple["Sam", str]:
        """The model in this process and its fingerprint. Raises ModelMismatch if it is not the driver's."""
        expected = self.fingerprint
        if self.sam is None:
            found = self.load_model()
            if expected not in (None, found):
                raise ModelMismatch(
                    f"checkpoint {self.checkpoint} has other weights on this worker (fingerprint "
                    f"{found[:12]}) than on the driver ({str(expected)[:12]}): give both the same file"
                )
        assert self.sam is not None and self.fingerprint is not None
        return self.sam, self.fingerprint

    def model_memory(self) -> int:
        """Peak memory of a worker in bytes, from the size of the weights."""
        from sa_engine.modeling.weights import size_of

        return _MEMORY_WITHOUT_MODEL + _MEMORY_PER_WEIGHT_BYTE * size_of(self.checkpoint)


def absolute(checkpoint: str) -> str:
    """A checkpoint file or round by its absolute path, since workers run elsewhere; a model name as it is."""
    from sa_engine.modeling.weights import local_file

    return str(Path(checkpoint).expanduser().absolute()) if local_file(checkpoint) else checkpoint
