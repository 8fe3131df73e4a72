"""Our mask generator against the reference's: same weights, same photo, alternating, each in a new process.

    python benchmarks/speed.py PHOTO --case grid [--runs 2] [--out results.jsonl]

Cases: ``grid`` (vit_t, 32x32 points, no crops), ``paper`` (vit_t, 21 crops, clean-up), ``vit_b`` (random weights,
32x32, thresholds lowered); with ``-bf16``, our bf16 run against our fp32 one. Prints wall time, CPU time, peak memory
and matched masks; the ratio is the result. Then where our time went, and how far the decoder is from its floor.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from parts import Stopwatch, arithmetic, matrix_rate, table  # noqa: E402

from sa_engine.config import AutoConfig  # noqa: E402
from sa_engine.generator import MaskGenerator  # noqa: E402
from sa_engine.images import decode_image  # noqa: E402
from sa_engine.modeling.sam import load_sam  # noqa: E402
from sa_engine.modeling.weights import resolve  # noqa: E402
from sa_engine.options import load_config  # noqa: E402
from sa_engine.predictor import Predictor  # noqa: E402

# The reference's packages are imported only by its own process: they would count as our memory.
PARITY = ROOT / "configs" / "parity.yaml"
REFERENCE = load_config(AutoConfig, PARITY, [], {"images": "unused", "out": "unused"})
CASES = {
    "grid": REFERENCE,
    "paper": replace(
        REFERENCE,
        crop_n_layers=2,
        crop_n_points_downscale_factor=2,
        min_mask_region_area=100,
    ),
    "vit_b": replace(
        REFERENCE, pred_iou_thresh=0.05, stability_score_thresh=0.3, box_nms_thresh=1.0
    ),
}


def measure(side: str, case: str, photo: str) -> dict[str, Any]:
    """Generate one photo's masks in this process and say what it cost; the model is loaded beforehand."""
    image = decode_image(Path(photo).read_bytes())
    config = CASES[case]
    stopwatch = Stopwatch()
    predictor = None
    if case == "vit_b":
        from test_parity import random_vit_b
    if side == "reference":
        import segment_anything
        from parity.reference import load_reference, reference_masks
        from test_parity import reference_options

        options = reference_options(config)
        if case == "vit_b":
            generator = segment_anything.SamAutomaticMaskGenerator(
                random_vit_b()[1], output_mode="coco_rle", **options
            )
            run = lambda: generator.generate(image)  # noqa: E731
        else:
            model = load_reference("vit_t")[0]
            run = lambda: reference_masks(model, image, **options)  # noqa: E731
    else:
        sam = random_vit_b()[0] if case == "vit_b" else load_sam(resolve("vit_t"))
        predictor = Predictor(sam, "bf16" if side == "bf16" else "fp32")
        ours = MaskGenerator(predictor, config)
        run = lambda: [asdict(m) for m in ours.generate(image)]  # noqa: E731
    wall, cpu = time.perf_counter(), time.process_time()
    with stopwatch.watching():
        masks = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"side": side, "wall": wall, "cpu": cpu, "peak_mb": peak, "masks": masks}
    if predictor is not None:
        gflop = arithmetic(predictor)
        result |= {"seconds": stopwatch.seconds, "units": stopwatch.units, "gflop": gflop}
    return result


def compare(
    case: str, sides: tuple[str, str], photo: str, runs: int, threads: int, rates: dict[str, float]
) -> dict[str, Any]:
    """Alternate the two sides; medians, ratios, matched masks, and the parts of the last run of ours."""
    from parity.matching import match

    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(runs):
        for side in sides:
            command = [sys.executable, __file__, photo, "--case", case, "--child", side]
            output = subprocess.run(
                [*command, "--threads", str(threads)], check=True, stdout=subprocess.PIPE, text=True
            )
            one = json.loads(output.stdout.splitlines()[-1])
            found[side].append(one)
            print(
                f"{case:6} {side:9} {one['wall']:7.1f} s wall {one['cpu']:7.1f} s CPU "
                f"{one['peak_mb']:6.0f} MB {len(one['masks']):5} masks",
                flush=True,
            )
    config = CASES[case]
    limits = {"nms": config.box_nms_thresh, "pred_iou": config.pred_iou_thresh}
    limits["stability"] = config.stability_score_thresh
    base, new = (found[side] for side in sides)
    matched = match(case, new[0]["masks"], base[0]["masks"], limits)
    medians = {
        key: [statistics.median(one[key] for one in side) for side in (base, new)]
        for key in ("wall", "cpu", "peak_mb")
    }
    ratios = {key: before / after for key, (before, after) in medians.items()}
    print(
        f"{case}: {sides[1]} is {ratios['wall']:.1f} times as fast as {sides[0]}, "
        f"{ratios['cpu']:.1f} times less CPU, {ratios['peak_mb']:.1f} times less memory; {matched}",
        flush=True,
    )
    last = new[-1]
    print(table(last, rates["bf16" if sides[1] == "bf16" else "fp32"]), flush=True)
    parts = {key: last[key] for key in ("seconds", "units", "gflop")}
    return {"case": case, "sides": sides, "medians": medians, "ratios": ratios, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo")
    parser.add_argument("--case", choices=[*CASES, *(f"{c}-bf16" for c in CASES)], default="grid")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the result as a line of JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not Path(args.photo).is_file():
        parser.error(f"{args.photo} is not a file: expected a photo")
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(measure(args.child, args.case, args.photo)))
        return
    rates = {"fp32": matrix_rate(torch.float32), "bf16": matrix_rate(torch.bfloat16)}
    print(f"{args.threads} threads, " + ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in rates.items()))
    case, bf16 = args.case.removesuffix("-bf16"), args.case.endswith("-bf16")
    sides = ("ours", "bf16") if bf16 else ("reference", "ours")
    result = compare(case, sides, args.photo, args.runs, args.threads, rates)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps({**result, "rates": rates}) + "\n")


if __name__ == "__main__":
    main()
