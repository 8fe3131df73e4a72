"""Training the box detector between rounds (paper §4, "Semi-automatic stage"): it learns what objects are.

Boxes around the masks collected so far are its truth, all of one class, "object". Its default backbone is a pyramid
over the frozen SAM's embedding (``sa_engine/detection/``). A detector is a round: trained, resumed, judged as a SAM's.
"""

from collections.abc import Callable
from pathlib import Path

from sa_engine.detection.config import DetectorConfig
from sa_engine.detection.files import detector_facts, fresh_detector, load_detector
from sa_engine.detection.measure import Validation, embedder
from sa_engine.detection.model import BoxDetector
from sa_engine.detection.trainer import LOSSES, DetectorTrainer
from sa_engine.modeling.sam import (
    Sam,
    encoder_fingerprint,
    load_sam,
    model_fingerprint,
    select_device,
)
from sa_engine.modeling.weights import resolve
from sa_engine.rounds import FRESH, RECALL, Parent, RoundInfo, Verdict, weights_of, write_model
from sa_engine.storage import RunError, atomic_write, sha256_file
from sa_engine.training import folder, round
from sa_engine.training.group import Group
from sa_engine.training.plots import plot_curves
from sa_engine.training.report import Plan, RoundReport
from sa_engine.training.state import TrainingState
from sa_engine.training.validation import MEAN, ValidationImages
from sa_engine.training.worker import Job, open_cache, read_metrics


def plan(config: DetectorConfig, overwrite: bool = False) -> Plan:
    """Look at everything that a detector's round needs; writes nothing.

    Raises:
        SaEngineError: no such data, model, device or folder, or another round in it.
    """
    paths, data = round.open_round(config)
    sam = _sam(config)
    model = _first_detector(config, sam)
    planned = Plan(
        "retrain detector",
        config,
        paths,
        data,
        _parent(config, sam),
        _fingerprint(model, sam),
        round.gate_sets(config, data),
        (
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(p.numel() for part in (model, sam) if part is not None for p in part.parameters()),
        ),
    )
    return folder.resumed(planned, overwrite)


def run(planned: Plan, overwrite: bool = False, steal_lock: bool = False) -> RoundReport:
    """Train a planned detector, or go on with it; see `train_round`."""
    job = Job(detector_trainer, planned.config, planned.paths, planned.data, planned.fingerprint)
    finish = lambda state: _finish(planned, state)  # noqa: E731
    return round.train_round(planned, job, finish, overwrite, steal_lock)


def detector_trainer(group: Group, job: Job, state: TrainingState | None) -> DetectorTrainer:
    """The trainer of a detector. Raises RunError if a worker finds another model than the round was started with."""
    config = job.config
    assert isinstance(config, DetectorConfig)
    sam = _sam(config)
    model = _first_detector(config, sam)
    if _fingerprint(model, sam) != job.fingerprint:
        raise RunError(
            f"checkpoint {config.checkpoint} or init {config.init} has other weights on worker {group.rank} than "
            "where the round was started: give all machines the same files"
        )
    model.to(group.device)
    if sam is not None:
        sam.to(group.device)
    cache = None if sam is None else open_cache(group, job, sam)
    validation = None
    if config.validation:
        images = ValidationImages(job.data.validation_sets(), config.validation_images, group)
        validation = Validation(images, embedder(sam, config.precision))
    return DetectorTrainer(config, group, model, job.data, sam, cache, validation, state)


def _sam(config: DetectorConfig) -> Sam | None:
    """The SAM whose embedding the detector sees; None: it sees the pixels."""
    return load_sam(resolve(config.checkpoint)) if config.cached else None


def _first_detector(config: DetectorConfig, sam: Sam | None) -> BoxDetector:
    """The detector that training starts from, the same in every process."""
    if config.init is None:
        return fresh_detector(config)
    model, info = load_detector(Path(config.init).expanduser(), sam)
    facts = info.detector
    assert facts is not None
    for name in ("backbone", "image_size", "objectness"):
        if getattr(config, name) != getattr(facts, name):
            raise RunError(
                f"init {config.init} has {name} = {getattr(facts, name)}, expected {getattr(config, name)}: "
                f"set {name} to its value, or leave init out"
            )
    return model


def _fingerprint(model: BoxDetector, sam: Sam | None) -> str:
    """Of the weights that training starts from, and of the encoder."""
    encoder = "" if sam is None else encoder_fingerprint(sam)
    return f"{model_fingerprint(model)}{encoder}"


def _parent(config: DetectorConfig, sam: Sam | None) -> Parent:
    """What the detector starts from."""
    facts = {"name": FRESH, "fingerprint": "", "sha256": ""}
    if config.init is not None:
        own = Path(config.init).expanduser()
        _, info = load_detector(own, sam)
        sha256 = sha256_file(weights_of(own, detector=True))
        facts = {"name": config.init, "fingerprint": info.fingerprint, "sha256": sha256}
    if sam is not None:
        path = resolve(config.checkpoint)
        facts |= {"encoder": config.checkpoint, "encoder_sha256": sha256_file(path)}
    return Parent(**facts)  # type: ignore[arg-type]


def _finish(planned: Plan, state: TrainingState) -> RoundInfo:
    """Choose the weights, judge them, and write the detector."""
    config, paths = planned.config, planned.paths
    assert isinstance(config, DetectorConfig)
    sam = _sam(config)
    model = _first_detector(config, sam)
    measure = _gate(planned, sam) if planned.gate else None
    before = measure(model) if measure is not None and config.init is not None else None
    model.load_state_dict(round.kept_weights(config, state))
    verdict = None
    if measure is not None:
        verdict = judge(before, measure(model), config.gate_recall_margin)
    info = RoundInfo(
        **detector_facts(model, config, sam),
        parent=planned.parent,
        data=round.trained_on(planned.data),
        config=folder.stated(planned),
        iterations=state.iteration,
        seconds=state.seconds,
        metrics=round.validation_metrics(config, state, _named),
        gate=verdict,
    )
    names = {"total": "all", **LOSSES}
    curves = plot_curves(read_metrics(paths), names, {}, "validation: AR@100 of boxes")
    atomic_write(paths.out / folder.CURVES, curves, scratch=paths.scratch)
    write_model(planned.out, model, info, paths.scratch)
    return info


def _named(name: str) -> str:
    """A validation's figure as `model.json` calls it."""
    return RECALL if name == MEAN else f"{RECALL} {name}"


def _gate(planned: Plan, sam: Sam | None) -> Callable[[BoxDetector], dict[str, float]]:
    """What measures AR@100 on the gate's images, which are read and embedded once for all detectors."""
    config = planned.config
    device = select_device(config.device)
    embed = embedder(None if sam is None else sam.to(device), config.precision)
    images = ValidationImages(planned.gate, config.gate_images, Group(device=device))
    validation = Validation(images, embed)

    def measure(model: BoxDetector) -> dict[str, float]:
        found = validation.measure(model.to(device))
        model.cpu()
        return {_named(name): value for name, value in found.items()}

    return measure


def judge(before: dict[str, float] | None, after: dict[str, float], margin: float) -> Verdict:
    """Whether a detector may take its parent's place; one that was fresh has none to be worse than.

    Args:
        before, after: AR@100 of the same images, `RECALL` their mean over data sets.
        margin: by which it may fall.
    """
    new = after[RECALL]
    if before is None:
        return Verdict(
            promoted=True,
            reason=f"AR@100 {new:.3f}; it started fresh, so there is no earlier one to compare with",
            before={},
            after=after,
            margins={"recall": margin},
        )
    old = before[RECALL]
    promoted = new >= old - margin
    return Verdict(
        promoted=promoted,
        reason=f"AR@100 {old:.3f} -> {new:.3f}"
        if promoted
        else f"AR@100 fell from {old:.3f} to {new:.3f}, by more than {margin:g}",
        before=before,
        after=after,
        margins={"recall": margin},
    )
