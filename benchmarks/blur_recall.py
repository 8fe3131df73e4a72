"""What `sa-engine blur` finds and covers, and what it redacts for nothing: the table of docs/blur.md.

    python benchmarks/blur_recall.py ../shared/data      # ten minutes on two cores

Photos with labelled faces are shown as they are and rescaled, so that half of each photo's faces are lower
than 16 or 400 pixels. Photos without any person say how much is redacted for nothing.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from sa_engine.config import BlurConfig
from sa_engine.images import decode_image
from sa_engine.privacy.recall import measure
from sa_engine.privacy.redactor import load_redactor
from sa_engine.resources import cores

DEFAULT: dict[str, Any] = {}
FACES: dict[str, Any] = {"plate_detectors": ()}
ENLARGED_ONCE = {"detect_scale": 1.0}
PLATEDET = {"plate_detectors": ("platedet",)}


def main() -> None:
    data = Path(sys.argv[1])
    faces, plates = data / "faces/group_photos/annotations.json", data / "plates/annotations.json"
    report("faces", faces, "face", DEFAULT)
    for height in (10, 16, 400):
        with rescaled(faces, height) as truth:
            report(f"faces, median {height} px high", truth, "face", DEFAULT)
    report("plates", plates, "plate", DEFAULT)
    with rescaled(plates, 12) as truth:
        report("plates, median 12 px high", truth, "plate", DEFAULT)
    for part in ("val", "train"):
        with without_people(data / f"coco/{part}/annotations.json") as truth:
            report(f"coco/{part} without people", truth, "face", DEFAULT)
    with without_people(data / "coco/val/annotations.json") as truth:
        report(
            "coco/val without people, faces of any size in any level", truth, "face", FACES, 1000
        )
    report("faces, detect_scale=1", faces, "face", ENLARGED_ONCE)
    with rescaled(faces, 16) as truth:
        report("faces, median 16 px high, detect_scale=1", truth, "face", ENLARGED_ONCE)
    report("plates, detect_scale=1", plates, "plate", ENLARGED_ONCE)
    report("plates, platedet (AGPL-3.0)", plates, "plate", PLATEDET)


def report(
    name: str, truth: Path, kind: str, options: dict[str, Any], largest: float | None = None
) -> None:
    """Measure and print; `largest`: in place of the detectors' own (`Detector.largest`)."""
    redactor = load_redactor(BlurConfig(images="-", out="-", **options), cores(), "cpu")
    if largest is not None:
        for detector in redactor.detectors:
            detector.largest = largest
    start = time.perf_counter()
    found = measure(redactor, truth, kind=kind)
    seconds = time.perf_counter() - start
    print(f"\n{name} ({found.images} photos, {seconds:.0f} s)\n{found}", flush=True)


@contextmanager
def rescaled(truth: Path, height: float) -> Iterator[Path]:
    """The labelled photos, each scaled so that its labelled boxes have this median height."""
    content = json.loads(truth.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        for image in content["images"]:
            labels = [one for one in content["annotations"] if one["image_id"] == image["id"]]
            photo = decode_image((truth.parent / "images" / image["file_name"]).read_bytes())
            scale = height / float(np.median([label["bbox"][3] for label in labels]))
            size = (round(photo.shape[1] * scale), round(photo.shape[0] * scale))
            method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            image["file_name"] = f"{image['id']}.png"
            resized = Image.fromarray(cv2.resize(photo, size, interpolation=method))
            resized.save(Path(folder) / image["file_name"], compress_level=1)
            for label in labels:
                label["bbox"] = [side * scale for side in label["bbox"]]
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(content))
        yield path


@contextmanager
def without_people(truth: Path) -> Iterator[Path]:
    """The photos in which nobody has labelled a person, without any label."""
    content = json.loads(truth.read_bytes())
    people = {
        label["image_id"] for label in content["annotations"] if label["coco_category"] == "person"
    }
    images = [image for image in content["images"] if image["id"] not in people]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").symlink_to((truth.parent / "images").resolve())
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps({"images": images, "annotations": []}))
        yield path


if __name__ == "__main__":
    main()
