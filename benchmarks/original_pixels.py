"""Which masks does a large photo owe to its original pixels?

    python benchmarks/original_pixels.py PHOTO [--out PICTURE]

Generates masks at the paper's setting twice: with crops cut from the original, and from the photo scaled down to its
released size beforehand. Lists the masks of the first run that have no counterpart in the second, and the other way
round, and draws the former.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from sa_engine import rle
from sa_engine.generator import GeneratedMask, MaskGenerator
from sa_engine.images import decode_image, encode_jpeg, fit_short_side, resize_image
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.option_groups import MaskConfig
from sa_engine.pictures import draw_masks
from sa_engine.predictor import Predictor
from stages.auto import mask_record

SAME_OBJECT = 0.75  # mask IoU from which two masks show the same thing


def without_counterpart(
    masks: list[GeneratedMask], others: list[GeneratedMask]
) -> list[GeneratedMask]:
    """Masks whose best mask IoU with any of the others is below SAME_OBJECT."""
    overlap = rle.iou([m.segmentation for m in masks], [m.segmentation for m in others])
    best = overlap.max(axis=1, initial=0)
    return [mask for mask, iou in zip(masks, best, strict=True) if iou < SAME_OBJECT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("--checkpoint", default="vit_t")
    parser.add_argument("--out", type=Path, default=Path("original_pixels.jpg"))
    arguments = parser.parse_args()
    image = decode_image(arguments.photo.read_bytes())
    config = MaskConfig()
    height, width = fit_short_side(image.shape[0], image.shape[1], config.short_side)
    released = resize_image(image, height, width)
    generator = MaskGenerator(Predictor(load_sam(resolve(arguments.checkpoint))), config)
    runs = {}
    for name, source in (("original", image), ("released", released)):
        start = time.monotonic()
        runs[name] = generator.generate(source, released)
        areas = np.array([mask.area for mask in runs[name]])
        print(
            f"crops from the {name} pixels {source.shape[1]}x{source.shape[0]}: {len(areas)} masks, "
            f"median area {np.median(areas):.0f} px, {time.monotonic() - start:.0f} s",
            flush=True,
        )
    only_original = without_counterpart(runs["original"], runs["released"])
    only_released = without_counterpart(runs["released"], runs["original"])
    print(f"only with the original's pixels: {len(only_original)} masks")
    print(f"only without them: {len(only_released)} masks")
    records = [mask_record(i, mask, arguments.checkpoint) for i, mask in enumerate(only_original)]
    drawn = draw_masks(released, records)
    arguments.out.write_bytes(encode_jpeg(np.hstack([released, drawn]), 90))
    print(f"drawn in {arguments.out}")


if __name__ == "__main__":
    main()
