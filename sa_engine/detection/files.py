"""Detectors in folders: a detector is a round, with `model.safetensors` and `model.json` (`sa_engine/rounds.py`)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sa_engine.detection.config import SAM_BACKBONE, DetectorConfig
from sa_engine.detection.model import BoxDetector
from sa_engine.modeling.sam import Sam, encoder_fingerprint, model_fingerprint
from sa_engine.rounds import (
    FRESH,
    INFO,
    DetectorFacts,
    RoundError,
    RoundInfo,
    read_detector,
    weights_of,
)

ARCHITECTURE = "detector"


def fresh_detector(config: DetectorConfig) -> BoxDetector:
    """A detector as an untrained round begins, the same in every process.

    Raises RoundError if the weights of its backbone are not there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return BoxDetector(
                config.backbone,
                config.image_size,
                config.objectness,
                start=config.backbone_weights or FRESH,
                fetch=True,
            )
        except (OSError, KeyError, ValueError) as error:
            raise RoundError(
                f"backbone_weights = {config.backbone_weights} of {config.backbone}: cannot be had: {error}; expected "
                "a name of torchvision's, as DEFAULT, and a network to fetch it, or its file in torch's cache"
            ) from None


def detector_facts(model: BoxDetector, config: DetectorConfig, sam: Sam | None) -> dict[str, Any]:
    """Of a detector, what `RoundInfo` wants to know."""
    encoder = None if sam is None else encoder_fingerprint(sam)
    return {
        "architecture": f"{ARCHITECTURE} ({config.backbone})",
        "decoder_depth": 0,
        "fingerprint": model_fingerprint(model),
        "detector": DetectorFacts(
            backbone=config.backbone,
            image_size=config.image_size,
            objectness=config.objectness,
            encoder=encoder,
            start=model.start,
        ),
    }


def sees_embedding(folder: Path) -> bool:
    """Whether a detector sees SAM's embedding, and not the pixels. Raises RoundError for what is no detector."""
    facts = read_detector(folder).detector
    return facts is not None and facts.backbone == SAM_BACKBONE


def load_detector(path: Path, sam: Sam | None = None) -> tuple[BoxDetector, RoundInfo]:
    """A trained detector, on the CPU in eval mode.

    Args:
        path: its folder.
        sam: whose embedding it is to see; a detector on pixels takes any.

    Raises:
        RoundError: no detector there, a damaged one, weights that are not those that `model.json` describes, or a
            detector for the embedding of another image encoder.
    """
    info = read_detector(path)
    facts, file = info.detector, weights_of(path, detector=True)
    assert facts is not None
    if facts.backbone == SAM_BACKBONE and sam is not None:
        found = encoder_fingerprint(sam)
        if found != facts.encoder:
            raise RoundError(
                f"the detector {path} was trained on the embeddings of another image encoder "
                f"({(facts.encoder or 'none')[:12]}) than the checkpoint has ({found[:12]}): name the checkpoint "
                f"{info.config.get('checkpoint')} or a round with its encoder, or train a detector for this one"
            )
    model = BoxDetector(facts.backbone, facts.image_size, facts.objectness, facts.start)
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise RoundError(
            f"{file} does not fit a {facts.backbone} detector: {detail}; it is of another version: train it again"
        ) from None
    if (found := model_fingerprint(model)) != info.fingerprint:
        raise RoundError(
            f"{file} is damaged: its weights have the fingerprint {found[:12]}, expected {info.fingerprint[:12]} by "
            f"{INFO} beside it; restore the file, or train the detector again"
        )
    return model.eval(), info
