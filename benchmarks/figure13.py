"""A miniature of the paper's figure 13 (left): what each stage of the data engine adds for the model trained on it.

    python benchmarks/figure13.py ../shared/data --out build/figure13 [--iterations 120] [--seeds 3] [--limit-images 30]

The stages are simulated with masks that people drew. In stage 1 annotators draw what is prominent: the larger half of
each image's masks, on half of the photos. In stage 2 they add the rest: all masks, on the other half. The automatic
stage is `sa-engine auto` with the first model on all of them. Every training starts from that model; they differ in
data and seed alone. The measure is what that adds to the mean IoU after one click on photos that none of them saw, with
intervals over these photos; points are seeds. Everything is a command of sa-engine, and whatever is there already is
not done again.
"""

import argparse
import io
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

SETS = ("coco", "bsds500", "bbbc038")
STAGES = {
    "stage 1": ("first",),
    "stages 1 + 2": ("first", "second"),
    "automatic only": ("automatic",),
}
_ENGINE = [sys.executable, "-c", "from sa_engine.cli import main; main()"]


def main() -> None:
    """Make the data, train, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/figure13"))
    parser.add_argument("--iterations", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=60, help="of each train set")
    parser.add_argument("--limit-images", type=int, default=30, help="of each val set")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    for name in SETS:
        make_runs(asked, name)
    rounds = [train(asked, stage, seed) for seed in range(asked.seeds) for stage in STAGES]
    data = [f"--data={asked.out / f'{name}-val'}" for name in SETS]
    checkpoints = [f"--checkpoint={one}" for one in ("vit_t", *rounds)]
    results = asked.out / "results"
    if not (results / "evaluate.json").exists():
        engine("evaluate", *data, *checkpoints, "--points=1", "--max-masks=20", f"--out={results}",
               f"--limit-images={asked.limit_images}", f"--threads={asked.threads}")  # fmt: skip
    models = json.loads((results / "evaluate.json").read_text())["models"]
    table(models, asked.seeds)
    (asked.out / "figure13.png").write_bytes(draw(models, asked.seeds))


def engine(*arguments: str) -> None:
    """Run a command of sa-engine, and end with it if it fails."""
    print("$ sa-engine", *arguments, flush=True)
    subprocess.run([*_ENGINE, *arguments], check=True)


def make_runs(asked: argparse.Namespace, name: str) -> None:
    """The shards of a data set's stages, and of its val photos."""
    local = ("--local", f"--threads-per-worker={asked.threads}")
    train_set, out = asked.data / name / "train", asked.out
    content = json.loads((train_set / "annotations.json").read_text())
    order = np.random.default_rng(0).permutation(len(content["images"]))[: asked.photos]
    images = [content["images"][i] for i in sorted(order)]
    half = len(images) // 2
    parts = {"first": prominent(content, images[:half]), "second": whole(content, images[half:])}
    for part, annotations in parts.items():
        folder = out / "photos" / part / name
        folder.mkdir(parents=True, exist_ok=True)
        for image in annotations["images"]:
            link(train_set / "images" / image["file_name"], folder / image["file_name"])
            both = out / "photos" / "automatic" / name
            both.mkdir(parents=True, exist_ok=True)
            link(train_set / "images" / image["file_name"], both / image["file_name"])
        file = out / f"{name}-{part}.json"
        file.write_text(json.dumps(annotations))
        engine("ingest", f"--images={folder}", f"--annotations={file}",
               f"--out={out / f'{name}-{part}'}", *local)  # fmt: skip
    engine("auto", f"--images={out / 'photos' / 'automatic' / name}", "--config=configs/preview.yaml",
           f"--out={out / f'{name}-automatic'}", "--set=points_per_side=12", *local)  # fmt: skip
    val = asked.data / name / "val"
    engine("ingest", f"--images={val / 'images'}", f"--annotations={val / 'annotations.json'}",
           f"--out={out / f'{name}-val'}", *local)  # fmt: skip


def link(source: Path, place: Path) -> None:
    """A photo in another folder, without a copy."""
    if not place.exists():
        place.symlink_to(source.resolve())


def whole(content: dict[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """All masks of some images."""
    ids = {image["id"] for image in images}
    some = [one for one in content["annotations"] if one["image_id"] in ids]
    return {**content, "images": images, "annotations": some}


def prominent(content: dict[str, Any], images: list[dict[str, Any]]) -> dict[str, Any]:
    """The larger half of each image's masks."""
    kept = []
    for image in images:
        own = whole(content, [image])["annotations"]
        own.sort(key=lambda one: -one["area"])
        kept += own[: (len(own) + 1) // 2]
    return {**content, "images": images, "annotations": kept}


def train(asked: argparse.Namespace, stage: str, seed: int) -> str:
    """Train a round; gives its folder."""
    out = asked.out / "rounds" / f"{stage.replace(' ', '')}-{seed}"
    data = [f"--data={asked.out / f'{name}-{part}'}" for name in SETS for part in STAGES[stage]]
    engine("retrain", *data, f"--out={out}", "--config=configs/retrain/finetune.yaml",
           f"--iterations={asked.iterations}", f"--seed={seed}", "--set=validation=0", "--set=keep=last",
           "--set=calibrate_iou=false", f"--set=embeddings={asked.out / 'embeddings'}",
           f"--threads-per-worker={asked.threads}")  # fmt: skip
    return str(out)


def gains(models: list[dict[str, Any]], seeds: int) -> dict[str, list[dict[str, float]]]:
    """What each stage's models gain over the first, in the mean over data sets: value and interval, in pairs."""
    per_stage = [models[1 + i :: len(STAGES)] for i in range(len(STAGES))]
    assert all(len(some) == seeds for some in per_stage)
    return {
        name: [one["minus_first"]["mean"]["1"] for one in some]
        for name, some in zip(STAGES, per_stage, strict=True)
    }


def table(models: list[dict[str, Any]], seeds: int) -> None:
    """Print the figures."""
    print(f"vit_t           {models[0]['miou']['mean']['1']['value']:.3f}")
    for name, values in gains(models, seeds).items():
        each = ", ".join(
            f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]" for one in values
        )
        print(f"{name:15} mean {np.mean([one['value'] for one in values]):+.3f}   {each}")
    for first, second in combinations(range(len(STAGES)), 2):
        value, low, high = difference(models, first, second)
        names = list(STAGES)
        print(f"{names[second]} over {names[first]}: {value:+.3f} [{low:+.3f}, {high:+.3f}]")


def difference(
    models: list[dict[str, Any]], first: int, second: int, resamples: int = 2000
) -> tuple[float, float, float]:
    """How much better a stage's models are than another's, all seeds together: value and interval, in pairs."""
    rng = np.random.default_rng(0)
    value, drawn = 0.0, np.zeros(resamples)
    sets = models[0]["images"]
    for name, images in sets.items():
        masks = np.array([one["masks"] for one in images])
        ious = np.array(
            [[one["sum_iou"]["1"] for one in model["images"][name]] for model in models[1:]]
        )
        gain = (ious[second :: len(STAGES)] - ious[first :: len(STAGES)]).mean(0)
        chosen = rng.integers(len(masks), size=(resamples, len(masks)))
        value += gain.sum() / masks.sum() / len(sets)
        drawn += gain[chosen].sum(1) / masks[chosen].sum(1) / len(sets)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(value), float(low), float(high)


def draw(models: list[dict[str, Any]], seeds: int) -> bytes:
    """The figure as a PNG."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for place, values in enumerate(gains(models, seeds).values()):
        for offset, one in zip(np.linspace(-0.15, 0.15, len(values)), values, strict=True):
            error = [[one["value"] - one["low"]], [one["high"] - one["value"]]]
            axis.errorbar(
                place + offset, one["value"], yerr=error, fmt="o", color="tab:blue", capsize=3
            )
        mean = float(np.mean([one["value"] for one in values]))
        axis.hlines(mean, place - 0.3, place + 0.3, color="black")
        axis.annotate(f"{mean:+.3f}", (place + 0.32, mean), va="center", fontsize="small")
    axis.axhline(0, color="gray", linewidth=1)
    axis.set_xticks(range(len(STAGES)), list(STAGES))
    axis.set_xlim(-0.5, len(STAGES) - 0.3)
    start = models[0]["miou"]["mean"]["1"]["value"]
    axis.set_ylabel(f"mean IoU after one click, over {start:.3f}")
    axis.set_title(
        "Trained on simulated stages; points are seeds, 95 % intervals over photos",
        fontsize="medium",
    )
    axis.grid(axis="y", alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


if __name__ == "__main__":
    main()
