"""How our time and memory grow: with the number of prompts, with the image's size, with the number of masks.

    python benchmarks/growth.py PHOTO --out growth.png

Whole images without crops; every point is a new process. Writes the plot, and its numbers as JSON beside it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sa_engine.generator import MaskGenerator  # noqa: E402
from sa_engine.images import decode_image, resize_image  # noqa: E402
from sa_engine.modeling.sam import load_sam  # noqa: E402
from sa_engine.modeling.weights import resolve  # noqa: E402
from sa_engine.option_groups import MaskConfig  # noqa: E402
from sa_engine.predictor import Predictor  # noqa: E402

USUAL: dict[str, Any] = {"points_per_side": 16, "megapixels": 3.4, "pred_iou_thresh": 0.88}
SERIES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "prompts": ("prompts", [{"points_per_side": n} for n in (8, 16, 24, 32, 40, 48)]),
    "image size": ("megapixels", [{"megapixels": m} for m in (0.3, 1, 3.4, 8, 16.3, 32)]),
    # Without NMS and with the IoU filter opened step by step, ever more masks are measured, rendered and encoded.
    "masks": (
        "masks",
        [
            {"pred_iou_thresh": t, "stability_score_thresh": 0, "box_nms_thresh": 1}
            for t in (0.99, 0.97, 0.95, 0.9, 0.8, 0)
        ],
    ),
}


def measure(photo: str, point: dict[str, Any]) -> dict[str, Any]:
    """One run in this process."""
    options = {**USUAL, **point}
    image = decode_image(Path(photo).read_bytes())
    scale = (options.pop("megapixels") * 1e6 / (image.shape[0] * image.shape[1])) ** 0.5
    image = resize_image(image, round(image.shape[0] * scale), round(image.shape[1] * scale))
    config = MaskConfig(crop_n_layers=0, short_side=None, **options)
    generator = MaskGenerator(Predictor(load_sam(resolve("vit_t"))), config)
    start = time.perf_counter()
    masks = generator.generate(image)
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "prompts": config.points_per_side**2,
        "megapixels": image.shape[0] * image.shape[1] / 1e6,
        "masks": len(masks),
    }


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A column for each series: seconds above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(2, len(SERIES), figsize=(12, 6), sharex="col", sharey="row")
    for column, (title, (axis, _)) in enumerate(SERIES.items()):
        x = [point[axis] for point in found[title]]
        for row, key, label in ((0, "seconds", "seconds"), (1, "peak_mb", "peak memory, MB")):
            cell = rows[row, column]
            cell.plot(x, [point[key] for point in found[title]], "o-")
            cell.set_xlim(left=0)
            cell.grid(alpha=0.3)
            if column == 0:
                cell.set_ylabel(label)
        fixed = ", ".join(
            f"{USUAL[name]:g} {unit}"
            for name, unit in (("points_per_side", "points per side"), ("megapixels", "MP"))
            if name not in SERIES[title][1][0]
        )
        rows[0, column].set_title(f"{axis} ({fixed})", fontsize=10)
        rows[1, column].set_xlabel(axis)
    for (
        row
    ) in rows:  # after all columns: they share the axis, and setting one limit fixes the other
        row[0].set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    print(f"the plot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo")
    parser.add_argument("--out", type=Path, default=Path("growth.png"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not Path(args.photo).is_file():
        parser.error(f"{args.photo} is not a file: expected a photo")
    torch.set_num_threads(args.threads)
    if args.child is not None:
        print(json.dumps(measure(args.photo, args.child)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    for title, (_, points) in SERIES.items():
        found[title] = []
        for point in points:
            command = [sys.executable, __file__, args.photo, "--child", json.dumps(point)]
            output = subprocess.run(
                [*command, "--threads", str(args.threads)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            one = json.loads(output.stdout.splitlines()[-1])
            found[title].append(one)
            print(
                f"{title:11} {one['prompts']:5} prompts {one['megapixels']:5.1f} MP "
                f"{one['masks']:4} masks {one['seconds']:6.1f} s {one['peak_mb']:6.0f} MB",
                flush=True,
            )
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, args.out)


if __name__ == "__main__":
    main()
