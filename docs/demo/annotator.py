"""Stands in for people in the demo of the loop: knows where objects are, and has SAM draw them.

    python docs/demo/annotator.py draw PHOTOS annotations.json       # stage 1: everything is drawn by hand
    python docs/demo/annotator.py correct HANDOUT returned.json      # stage 2: what was prefilled is looked through

In stage 1 annotators click and SAM draws (paper §4); a box from `objects.yaml` is the click here. In stage 2 a
prefilled mask that agrees with an object is kept (IoU of at least 0.9) or drawn anew (0.5), any other is deleted, and
objects without a mask are added.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pycocotools import mask as coco

from sa_engine.images import decode_image
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.predictor import Predictor

OBJECTS = {
    Path(name).stem: boxes
    for name, boxes in yaml.safe_load((Path(__file__).parent / "objects.yaml").read_text()).items()
}
KEEP, SAME = 0.9, 0.5  # IoU


def draw(predictor: Predictor, photo: Path, boxes: list[list[float]]) -> list[dict[str, Any]]:
    """Masks of the objects in a photo, as COCO's run lengths."""
    embedding = predictor.embed(decode_image(photo.read_bytes()))
    found = predictor.predict(embedding, boxes=np.array(boxes, float), multimask=False)
    drawn = [pixels[0] > 0 for pixels in predictor.upsample(found.logits, embedding)]
    return [encode(np.asarray(mask)) for mask in drawn]


def encode(mask: np.ndarray) -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def entry(image: dict[str, Any], mask: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image["id"],
        "category_id": 1,
        "iscrowd": 0,
        "segmentation": mask,
        "area": int(coco.area(mask)),
        "bbox": coco.toBbox(mask).tolist(),
    }


def first(predictor: Predictor, photos: Path) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for photo in sorted(path for path in photos.iterdir() if path.is_file()):
        masks = draw(predictor, photo, OBJECTS[photo.stem])
        height, width = masks[0]["size"]
        images.append(
            {"id": len(images) + 1, "file_name": photo.name, "width": width, "height": height}
        )
        for mask in masks:
            annotations.append(entry(images[-1], mask, len(annotations) + 1))
    categories = [{"id": 1, "name": "object"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def second(predictor: Predictor, handout: Path) -> dict[str, Any]:
    """The hand-out's annotations, looked through."""
    content = json.loads((handout / "annotations.json").read_text())
    kept: list[dict[str, Any]] = []
    number = max((one["id"] for one in content["annotations"]), default=0)
    counts = {"kept": 0, "drawn anew": 0, "deleted": 0, "added": 0}
    for image in content["images"]:
        photo = handout / "images" / image["file_name"]
        truth = draw(predictor, photo, OBJECTS[photo.stem])
        shown = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        ious = coco.iou([one["segmentation"] for one in shown], truth, [0] * len(truth))
        ious = np.asarray(ious, float).reshape(len(shown), len(truth))
        for row, one in enumerate(shown):
            best = int(ious[row].argmax())
            iou = float(ious[row, best])
            if iou < SAME:
                counts["deleted"] += 1
                continue
            ious[:, best] = -1.0  # an object has one mask
            truth[best], drawn = {}, truth[best]
            counts["kept" if iou >= KEEP else "drawn anew"] += 1
            kept.append(one if iou >= KEEP else {**one, **entry(image, drawn, one["id"])})
        for mask in filter(None, truth):
            number += 1
            counts["added"] += 1
            kept.append(entry(image, mask, number))
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return {**content, "annotations": kept}


def main() -> None:
    what, source, dest = sys.argv[1:]
    predictor = Predictor(load_sam(resolve("vit_t")))
    made = {"draw": first, "correct": second}[what](predictor, Path(source))
    Path(dest).write_text(json.dumps(made))
    print(f"{len(made['annotations'])} masks on {len(made['images'])} photos: {dest}")


if __name__ == "__main__":
    main()
