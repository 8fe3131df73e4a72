"""Image embeddings kept on the disk: where the image encoder is frozen, each is made once.

A file is named by what it is made from, the image's content and the encoder's weights, so that runs and rounds share
it. float16 halves the space. Measured on vit_t and four photos: values reach 0.6, and rounding moves each by at most
0.05 %; of the decoder's logits, which reach 50, by at most 0.013, and 2 in 100,000 pixels of masks change sides.
"""

import math
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sa_engine.errors import SaEngineError
from sa_engine.storage import atomic_write

_BLOCK = 4096  # bytes: a file's header, and its part of a disk's block
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


class EmbeddingCacheError(SaEngineError):
    """The embeddings cannot be kept: no space, no permission, or values that are no numbers."""


class EmbeddingCache:
    """Embeddings of one encoder, (1, 256, 64, 64) each; for many threads and processes at once.

    Args:
        folder: on this machine, made if it is missing; caches of other encoders and precisions may share it.
        encoder: as of `encoder_fingerprint`; and whatever else decides the values, such as bf16 arithmetic.
        dtype: "float16" (2 MB an image) or "float32" (4 MB), on the disk.
        shape: of an embedding.
    """

    def __init__(
        self,
        folder: Path,
        encoder: str,
        dtype: str = "float16",
        shape: tuple[int, ...] = (1, 256, 64, 64),
    ) -> None:
        self._shape = shape
        self.folder = folder / f"{encoder[:32]}-{dtype}"
        self._encoder, self._dtype = encoder, _DTYPES[dtype]

    def path(self, key: str) -> Path:
        """The file of an image, by its `TrainingData.content_key`."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> Tensor | None:
        """The embedding of an image, (1, 256, 64, 64) float32 on the CPU; None if there is none, or it is damaged."""
        try:
            with safe_open(self.path(key), "pt") as file:
                values, told = file.get_tensor("embedding"), file.metadata()
        except (OSError, SafetensorError):
            return None
        return values.float() if told == self._label(key, values) else None

    def put(self, key: str, embedding: Tensor) -> None:
        """Keep an embedding, (1, 256, 64, 64) of any float type, from any device.

        Raises:
            EmbeddingCacheError: a value is not finite, or not in this precision; or the file cannot be written.
            ValueError: another shape.
        """
        if embedding.shape != self._shape:
            raise ValueError(f"an embedding is {tuple(embedding.shape)}: expected {self._shape}")
        values = embedding.detach().to("cpu", self._dtype).contiguous()
        if not values.isfinite().all():
            raise EmbeddingCacheError(
                f"an embedding has values that are not finite in {self._dtype}: the checkpoint is damaged, or needs "
                "float32"
            )
        content = save({"embedding": values}, self._label(key, values))
        try:
            # A power cut may leave less than this: its label tells.
            atomic_write(self.path(key), content, durable=False)
        except OSError as error:
            raise self._told(error) from None

    def rounded(self, embedding: Tensor) -> Tensor:
        """An embedding as it comes back: in float32, rounded to the cache's precision.

        It lies in memory as that does, too: encoders leave other strides, by which sums are taken in another order.
        """
        return embedding.to(self._dtype).float().contiguous()

    def check_space(self, keys: Iterable[str]) -> None:
        """Raise EmbeddingCacheError if the embeddings that are missing do not fit on the disk."""
        count = sum(not self._has(key) for key in keys)
        if not count:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._told(error) from None
        needed, free = count * (self._bytes + _BLOCK), shutil.disk_usage(self.folder).free
        if needed > free:
            raise EmbeddingCacheError(
                f"the embeddings of {count:,} images need {needed / 1e9:,.1f} GB in {self.folder}, where "
                f"{free / 1e9:,.1f} GB are free: free some space, name another folder, or train without kept "
                "embeddings"
            )

    def _has(self, key: str) -> bool:
        """Whether there is an embedding; whether it is damaged is seen when it is needed."""
        path = self.path(key)
        return path.exists() and path.stat().st_size > self._bytes

    @property
    def _bytes(self) -> int:
        """Of an embedding."""
        return math.prod(self._shape) * self._dtype.itemsize

    def _label(self, key: str, values: Tensor) -> dict[str, str]:
        """What a file says of itself."""
        checksum = zlib.crc32(values.numpy().tobytes())
        return {"image": key, "encoder": self._encoder, "crc32": f"{checksum:08x}"}

    def _told(self, error: OSError) -> EmbeddingCacheError:
        return EmbeddingCacheError(
            f"cannot write to {self.folder}: {error.strerror or error}; free some space, name another folder, or "
            "train without kept embeddings"
        )
