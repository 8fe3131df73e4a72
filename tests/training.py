"""What tests of training share: shards with drawn masks, a SAM small enough to train, objects whose shape is known."""

import io
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import small_stage
import torch
from PIL import Image

from sa_engine import rle, runner
from sa_engine.modeling.image_encoder import ImageEncoderViT
from sa_engine.modeling.mask_decoder import MaskDecoder
from sa_engine.modeling.prompt_encoder import PromptEncoder
from sa_engine.modeling.sam import Sam
from sa_engine.partial import Finished, finished_record
from sa_engine.plan import PlannedImage
from sa_engine.records import ImageRecord, image_name, mask_id
from sa_engine.training.data import TrainingData
from sa_engine.training.simulate import Simulation

Masks = list[tuple[str | None, np.ndarray]]
SIDE = 128  # pixels of its input; embeddings are 8x8, logits 32x32
SIMULATION = Simulation(loss_size=32)


def small_sam(seed: int = 0, drop_path: float = 0.0, dropout: float = 0.0) -> Sam:
    """A whole SAM with random weights, in eval mode: a ViT of two blocks, the released decoder."""
    torch.manual_seed(seed)
    encoder = ImageEncoderViT(32, 2, 2, (1,), image_size=SIDE, window_size=4, drop_path=drop_path)
    torch.nn.init.normal_(encoder.pos_embed, std=0.5)
    prompts = PromptEncoder(image_size=SIDE, embedding_size=SIDE // 16)
    return Sam(encoder, prompts, MaskDecoder(dropout=dropout)).eval()


def discs(*circles: tuple[int, int, int], size: tuple[int, int] = (96, SIDE)) -> np.ndarray:
    """Masks (M, h, w) of circles: x, y, radius."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([(columns - x) ** 2 + (rows - y) ** 2 <= r * r for x, y, r in circles])


@dataclass(frozen=True)
class DrawnStage(small_stage.SmallStage):
    """Masks as a test draws them: by the photo's key and size."""

    draw: Callable[[str, int, int], Masks] = lambda key, height, width: []

    def make_worker(self, config: small_stage.SmallConfig) -> "DrawnWorker":
        return DrawnWorker(config, self.draw)


class DrawnWorker(small_stage.SmallWorker):
    def __init__(self, config: small_stage.SmallConfig, draw: Callable[..., Masks]) -> None:
        super().__init__(config)
        self.draw = draw

    def process(self, item: PlannedImage, prepared: tuple[np.ndarray, str]) -> Any:
        image, sha256 = prepared
        return image, sha256, self.draw(item.key, *image.shape[:2])

    def finish(self, item: PlannedImage, result: Any) -> Finished:
        image, sha256, masks = result
        records = [record_of(mask_id(item.image_id, i), *mask) for i, mask in enumerate(masks)]
        record = ImageRecord(image_id=item.image_id, width=image.shape[1], height=image.shape[0],
                             file_name=image_name(item.image_id), source_path=item.key,
                             sha256=sha256, masks=tuple(records))  # fmt: skip
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        return finished_record(record, buffer.getvalue() if self.config.write_images else None)


def record_of(number: int, source: str | None, mask: np.ndarray) -> Any:
    full = small_stage.mask_record(number, mask | (not mask.any()))
    return replace(full, source=source, segmentation=rle.encode(mask), area=int(mask.sum()))


def make_run(folder: Path, out: Path, draw: Callable[..., Masks], **options: Any) -> Path:
    config = small_stage.small_config(folder, out, **{"shard_size": 5, **options})
    extend = (out / "_run").exists()
    identity = lambda: {"model_fingerprint": "drawn"}  # noqa: E731
    report = runner.run(DrawnStage(draw=draw), config, identity, runner.Start(extend=extend))
    assert report.failed == 0
    return out


def turned_run(folder: Path, photos: list[np.ndarray]) -> Path:
    """Small photos, each also upside down, with quarters of them as masks."""
    (folder / "photos").mkdir()
    for number, photo in enumerate(photos):
        for turn in range(2):
            picture = Image.fromarray(photo).reduce(8).rotate(180 * turn)
            picture.save(folder / "photos" / f"{number}{turn}.png")
    return make_run(folder / "photos", folder / "run", quarters)


def share(height: int, width: int, *, of: float) -> np.ndarray:
    """A mask that covers so much of an image, from its left."""
    return np.arange(width)[None].repeat(height, 0) < width * of


def quarter(key: str, height: int, width: int) -> Masks:
    return [("automatic", share(height, width, of=0.25))]


def save(folder: Path, number: int, photos: list[np.ndarray]) -> None:
    picture = Image.fromarray(photos[number % 4]).reduce(16).rotate(number)
    picture.save(folder / f"{number:03}.png")


def quarters(key: str, height: int, width: int) -> Masks:
    """Three quarters of an image and its middle."""
    masks = []
    for rows, columns in itertools.product((0, 1), (0, 1)):
        mask = np.zeros((height, width), dtype=bool)
        top, left = rows * height // 2, columns * width // 2
        mask[top : top + height // 2, left : left + width // 2] = True
        masks.append(("manual", mask))
    return masks


def paths_aside(data: TrainingData) -> set[str | None]:
    return {record.source_path for one in data.validation_sets() for record, _ in one}
