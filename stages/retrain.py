"""Training between rounds (paper §4, §A): SAM learns from the masks just collected, and becomes the next round's model.

Each mask is prompted as an annotator would, with a point or a box and then with corrections, for eleven steps in the
paper; focal and dice loss of the best of three masks, and the error of the predicted IoU, train the model by AdamW.
``sa_engine/training/`` does that; this stage plans a round, runs the workers, and judges what they made.
"""

import numpy as np

from sa_engine.modeling.sam import Sam, load_sam, model_fingerprint, select_device
from sa_engine.modeling.weights import resolve
from sa_engine.rounds import MIOU, RoundInfo, Verdict, model_facts, write_model
from sa_engine.storage import atomic_write
from sa_engine.training import folder, gate, round
from sa_engine.training.calibrate import Calibration, calibrate
from sa_engine.training.config import RetrainConfig
from sa_engine.training.memory import estimate, free_memory
from sa_engine.training.modes import set_trainable
from sa_engine.training.plots import plot_curves
from sa_engine.training.report import Plan, RoundReport
from sa_engine.training.sam import masks_per_decode
from sa_engine.training.state import TrainingState
from sa_engine.training.validation import BOX, MEAN
from sa_engine.training.worker import Job, first_model, read_metrics, sam_trainer

CALIBRATION_IMAGES, CALIBRATION_MASKS = 24, 16
_NAMES = {MEAN: MIOU, BOX: "miou_box"}


def plan(config: RetrainConfig, overwrite: bool = False) -> Plan:
    """Look at everything that a round needs; writes nothing.

    Raises:
        SaEngineError: no such data, model, device or folder, or another round in it.
    """
    paths, data = round.open_round(config)
    device = select_device(config.device)
    sam, parent = first_model(config)
    set_trainable(sam, config)
    memory = estimate(
        sam,
        device,
        masks_per_image=config.max_masks,
        masks_per_decode=masks_per_decode(config, device),
        loss_size=config.loss_size,
        checkpointing=config.gradient_checkpointing,
        bf16=config.precision == "bf16",
    )
    sizes = [(p.requires_grad, p.numel()) for p in sam.parameters()]
    apart = config.num_workers > 1 or config.ray or config.ray_address
    planned = Plan(
        "retrain",
        config,
        paths,
        data,
        parent,
        model_fingerprint(sam),
        round.gate_sets(config, data),
        (sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)),
        memory,
        memory.shortage(free_memory(device), config.num_workers if apart else 0),
    )
    return folder.resumed(planned, overwrite)


def run(planned: Plan, overwrite: bool = False, steal_lock: bool = False) -> RoundReport:
    """Train a planned round, or go on with it; see `train_round`."""
    job = Job(sam_trainer, planned.config, planned.paths, planned.data, planned.fingerprint)
    finish = lambda state: _finish(planned, state)  # noqa: E731
    return round.train_round(planned, job, finish, overwrite, steal_lock)


def _finish(planned: Plan, state: TrainingState) -> RoundInfo:
    """Choose the weights, judge them, and write the round."""
    config = _config(planned)
    sam, parent = first_model(config)
    sam.load_state_dict(round.kept_weights(config, state))
    metrics = round.validation_metrics(
        config, state, lambda name: _NAMES.get(name, f"{MIOU} {name}")
    )
    if config.calibrate_iou:
        metrics["iou_calibration"] = _calibrate(planned, sam).to_dict()
    info = RoundInfo(
        **model_facts(sam),
        parent=parent,
        data=round.trained_on(planned.data),
        config=folder.stated(planned),
        iterations=state.iteration,
        seconds=state.seconds,
        metrics=metrics,
        gate=_judge(planned, sam) if planned.gate else None,
    )
    paths = planned.paths
    curves = plot_curves(read_metrics(paths))
    atomic_write(paths.out / folder.CURVES, curves, scratch=paths.scratch)
    write_model(planned.out, sam, info, paths.scratch)
    return info


def _calibrate(planned: Plan, sam: Sam) -> Calibration:
    """Put the new model's predicted IoUs on the scale of the one it started from, on images of the training."""
    config, data = _config(planned), planned.data
    device = select_device(config.device)
    rng = np.random.default_rng(config.seed)
    drawn = rng.permutation(len(data))[:CALIBRATION_IMAGES].tolist()
    samples = (data.load(index, rng, max_masks=CALIBRATION_MASKS) for index in drawn)
    used = (sample for sample in samples if sample is not None)
    parent = load_sam(resolve(config.init), device)
    done = calibrate(sam.to(device), parent, used, config.precision)
    sam.cpu()
    return done


def _judge(planned: Plan, sam: Sam) -> Verdict:
    """Measure the new model and the one it started from on the gate's images."""
    config = _config(planned)
    device = select_device(config.device)
    parent = load_sam(resolve(config.init), device)
    before, after = (
        gate.measure(
            model.to(device), planned.gate, images=config.gate_images, precision=config.precision
        )
        for model in (parent, sam)
    )
    sam.cpu()
    return gate.judge(before, after, config.gate_miou_margin, config.gate_masks_margin)


def _config(planned: Plan) -> RetrainConfig:
    """The options of a SAM's round."""
    assert isinstance(planned.config, RetrainConfig)
    return planned.config
