"""What tests of `sa-engine engine` share: the command, what it leaves, and what people draw."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from PIL import Image

from sa_engine.cli import main


def engine(*words: Any) -> Result:
    return CliRunner().invoke(main, ["engine", *map(str, words)])


def state(out: Path) -> dict[str, Any]:
    content = json.loads((out / "engine.json").read_text())
    assert isinstance(content, dict)
    return content


def statuses(out: Path) -> dict[str, str]:
    return {step["name"]: step["status"] for step in state(out)["steps"]}


def logs(out: Path) -> dict[str, int]:
    """How often each command was begun."""
    return {
        path.stem: path.read_text().count("$ sa-engine") for path in (out / "_engine").glob("*.log")
    }


def boxes_drawn(folder: Path, file: Path) -> Path:
    """COCO polygons: a box on each photo, by its size."""
    images: list[dict[str, Any]] = []
    for number, path in enumerate(sorted(folder.rglob("*.jpg")), 1):
        width, height = Image.open(path).size
        name = path.relative_to(folder).as_posix()
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    annotations = [
        {"id": image["id"], "image_id": image["id"], "category_id": 1, "iscrowd": 0,
         "segmentation": [[5, 5, image["width"] - 9, 5, image["width"] - 9, 40, 5, 40]]}
        for image in images
    ]  # fmt: skip
    categories = [{"id": 1, "name": "object"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return file
