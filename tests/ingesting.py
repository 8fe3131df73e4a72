"""What tests of `sa-engine ingest` share: two photos, an export of their masks, and the command."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from lost_masks import HEIGHT, WIDTH, masks
from test_format_coco import uncompressed

from sa_engine.cli import main
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord

NAMES = ("bild ä.png", "sub/leer.png")


def annotations(**changes: Any) -> dict[str, Any]:
    """All masks on the first photo, none on the second."""
    return {
        "images": [
            {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for number, name in enumerate(NAMES)
        ],
        "annotations": [
            {"id": number, "image_id": 0, "segmentation": uncompressed(mask), "iscrowd": 0}
            for number, mask in enumerate(masks().values(), 100)
        ],
        **changes,
    }


def ingest(images: Path, content: Any, *more: str) -> Result:
    file = images.parent / "export.json"
    file.write_text(json.dumps(content))
    out = images.parent / "out"
    command = ["ingest", f"--images={images}", f"--annotations={file}", f"--out={out}", "--local"]
    return CliRunner().invoke(main, [*command, "--set=shard_size=8", *more])


def records(images: Path) -> dict[str, ImageRecord]:
    return {str(record.source_path): record for record in iter_records(images.parent / "out")}


def assert_refused(result: Result, images: Path, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (images.parent / "out").exists()
