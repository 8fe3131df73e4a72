"""Reads a hand-out with an annotation tool's own code; it runs in the tools' environment, without sa-engine.

python read_with_tools.py TOOL FOLDER prints a JSON list of masks: image, id, label, size and COCO's run lengths.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

Found = tuple[str, str, str, np.ndarray]  # image, id, label, (H, W) pixels


def cvat(folder: Path) -> Iterator[Found]:
    """CVAT's format in datumaro, the library that CVAT reads and writes most formats with."""
    import datumaro

    dataset = datumaro.Dataset.import_from(str(folder), "cvat")
    labels = dataset.categories()[datumaro.AnnotationType.label]
    for item in dataset:
        for one in item.annotations:
            assert one.type == datumaro.AnnotationType.mask, one.type
            yield item.id, one.attributes["sa_mask_id"], labels[one.label].name, one.image


def label_studio(folder: Path) -> Iterator[Found]:
    from label_studio_sdk.converter.brush import decode_rle
    from label_studio_sdk.label_interface import LabelInterface

    config = LabelInterface((folder / "labeling_config.txt").read_text())
    for task in json.loads((folder / "tasks.json").read_text()):
        assert config.validate_task({"data": task["data"]}), task["data"]
        assert not task["annotations"], "what a model drew is no annotation"
        for prediction in task["predictions"]:
            assert not config.validate_prediction(prediction, return_errors=True)
            for one in prediction["result"]:
                size = one["original_height"], one["original_width"]
                rgba = decode_rle(one["value"]["rle"]).reshape(*size, 4)
                # The page paints what is not transparent; an alpha of 1 is there and cannot be seen.
                assert set(np.unique(rgba)) <= {0, 255}, np.unique(rgba)
                name = Path(task["data"]["image"]).stem
                yield name, one["id"], one["value"]["brushlabels"][0], rgba[..., 3]


def labelme(folder: Path) -> Iterator[Found]:
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    from labelme import LabelFile
    from labelme.utils import img_data_to_arr, shapes_to_label

    for file in sorted(folder.glob("*.json")):
        content = LabelFile(str(file))  # opens the picture too, and compares the sizes
        size = img_data_to_arr(content.image_data).shape[:2]
        for shape in content.shapes:
            pixels, _ = shapes_to_label(size, [shape], {"object": 1})
            yield Path(content.image_path).stem, shape["group_id"], shape["label"], pixels


def main() -> None:
    tool, folder = sys.argv[1:]
    read = {"cvat": cvat, "label-studio": label_studio, "labelme": labelme}[tool]
    masks = []
    for image, id_, label, pixels in read(Path(folder)):
        rle = coco.encode(np.asfortranarray(pixels != 0, np.uint8))
        counts = rle["counts"].decode()
        masks.append(
            {"image": image, "id": str(id_), "label": label, "size": rle["size"], "counts": counts}
        )
    print(json.dumps(masks))


if __name__ == "__main__":
    main()
