"""The box detector, small ones trained from nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import MobileNet_V3_Large_Weights, mobilenet_v3_large
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou
from training import SIDE, small_sam, turned_run

from sa_engine.detection.config import DetectorConfig
from sa_engine.detection.detector import Detector, model_input
from sa_engine.detection.files import detector_facts, fresh_detector, load_detector
from sa_engine.detection.measure import Validation, embedder
from sa_engine.detection.model import BoxDetector
from sa_engine.detection.objectness import IouProposals, decoded_iou
from sa_engine.detection.trainer import DetectorTrainer
from sa_engine.evaluation.data import open_data
from sa_engine.options import ConfigError, to_dict
from sa_engine.rounds import FRESH, Parent, RoundError, RoundInfo, write_model
from sa_engine.storage import RunPaths
from sa_engine.training.data import TrainingData
from sa_engine.training.group import Group
from sa_engine.training.parallel import run_workers
from sa_engine.training.state import load_state, save_state
from sa_engine.training.validation import ValidationImages
from stages.retrain_detector import _first_detector, judge

SMALL: dict[str, Any] = {
    "data": ("-",),
    "out": "-",
    "iterations": 4,
    "batch_size": 4,
    "warmup": 2,
    "schedule": "constant",
    "log_every": 2,
    "validation": 0.0,
    "keep": "last",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Path:
    return turned_run(tmp_path_factory.mktemp("turned"), photos)


def make_trainer(
    run: Path, group: Group | None = None, state: Any = None, **options: Any
) -> DetectorTrainer:
    config = DetectorConfig(**{**SMALL, **options})
    sam = small_sam() if config.backbone == "sam" else None
    torch.manual_seed(config.seed)
    model = BoxDetector(config.backbone, SIDE, config.objectness)
    data = TrainingData.open([run], seed=config.seed)
    return DetectorTrainer(config, group or Group(), model, data, sam, state=state)


def train(
    run: Path, group: Group | None = None, **options: Any
) -> tuple[DetectorTrainer, list[Any]]:
    trainer, lines = make_trainer(run, group, **options), []
    assert trainer.run(lambda state: None, lines.append) == 0
    return trainer, lines


def weights(trainer: DetectorTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def train_as_worker(group: Group, run: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    trainer, _ = train(run, group, **options)
    return weights(trainer)


def test_a_detector_learns_where_the_objects_are(run: Path) -> None:
    """From nothing its anchors find some of the quarters of these eight pictures, afterwards it finds most."""
    trainer = make_trainer(run, iterations=30, batch_size=2, lr=1e-3)
    data = open_data(run, "quarters")
    validation = Validation(ValidationImages([data], 8, Group()), embedder(trainer.sam, "fp32"))
    before = validation.measure(trainer.detector)["mean"]
    assert not any(one.requires_grad for one in validation._features.values() if one is not None)
    lines: list[Any] = []
    trainer.run(lambda state: None, lines.append)
    after = validation.measure(trainer.detector)["mean"]
    assert lines[-1]["total"] < lines[0]["total"] / 1.5
    assert before < 0.4 < 0.6 < after
    assert set(lines[0]["ms_per_image"]) == set(trainer.parts)
    assert lines[-1]["images"] == 30 * 2


def test_a_training_that_was_stopped_ends_with_the_same_weights(run: Path, tmp_path: Path) -> None:
    whole, _ = train(run)
    paths = RunPaths(tmp_path)
    stopped = make_trainer(run, Group(heard=lambda: 15 if stopped.state.iteration == 2 else 0))
    assert stopped.run(lambda state: save_state(paths, state), lambda line: None) == 15
    state = load_state(paths)
    assert state is not None and state.iteration == 2
    resumed = make_trainer(run, state=state)
    resumed.run(lambda state: None, lambda line: None)
    found, expected = weights(resumed), weights(whole)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_workers_take_the_same_steps_as_one(run: Path) -> None:
    options = {"iterations": 2, "objectness": "iou"}
    alone = train_as_worker(Group(), run, options)
    shared = run_workers(train_as_worker, run, options, num_workers=2, threads=1)
    for name, value in alone.items():
        far = (shared[name] - value).abs() > 1e-5
        assert far.float().mean() < 0.001, name  # AdamW makes whole steps of a gradient's rounding


def test_the_iou_of_deltas_is_that_of_their_boxes() -> None:
    coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
    torch.manual_seed(0)
    corners = torch.rand(50, 2) * 100
    anchors = torch.cat([corners, corners + 5 + torch.rand(50, 2) * 80], dim=1)
    first, second = torch.randn(50, 4), torch.randn(50, 4)
    boxes = [coder.decode_single(deltas, anchors) for deltas in (first, second)]
    expected = box_iou(*boxes).diagonal()
    torch.testing.assert_close(decoded_iou(coder, first, second), expected)
    assert expected.max() > 0.5


@pytest.mark.parametrize("objectness", ["class", "iou"])
def test_only_class_objectness_takes_what_is_not_drawn_for_background(objectness: str) -> None:
    """One drawn object at the top left: may an anchor at the bottom right be taught a low score?"""
    torch.manual_seed(0)
    model = BoxDetector("sam", SIDE, objectness)
    assert isinstance(model.rpn, IouProposals) == (objectness == "iou")
    embedding = torch.randn(1, 256, SIDE // 16, SIDE // 16)
    scores: list[Tensor] = []

    def keep(module: Any, inputs: Any, outputs: Any) -> None:
        for level in outputs[0]:
            level.retain_grad()
        scores.extend(outputs[0])

    model.rpn.head.register_forward_hook(keep)
    losses = model.losses(embedding, [(SIDE, SIDE)], [torch.tensor([[2.0, 2.0, 40.0, 40.0]])])
    losses["loss_objectness"].backward()
    gradient = scores[0].grad
    assert gradient is not None and gradient[..., :6, :6].abs().sum() > 0
    assert bool(gradient[..., 10:, 10:].abs().sum() > 0) == (objectness == "class")


@pytest.mark.parametrize("backbone", ["mobilenet", "resnet50"])
def test_a_fresh_backbone_on_pixels_hands_its_signal_on(backbone: str) -> None:
    """Without norms that work, MobileNet's features fade to 1e-8 and ResNet's grow to 40."""
    torch.manual_seed(0)
    model = BoxDetector(backbone, SIDE)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for level in model.backbone(torch.randn(2, 3, SIDE, SIDE)).values():
        assert 0.05 < level.std() < 20


# The training of a backbone on pixels: one bright rectangle on noise.

Picture = tuple[np.ndarray, list[int]]  # (96, SIDE, 3) uint8 and its box XYXY


def rectangles(seed: int, count: int) -> list[Picture]:
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        image = rng.integers(0, 100, (96, SIDE, 3), dtype=np.uint8)
        height, width = rng.integers(36, 60, 2)
        y, x = rng.integers(0, 96 - height), rng.integers(0, SIDE - width)
        image[y : y + height, x : x + width] += 130
        pictures.append((image, [x, y, x + width, y + height]))
    return pictures


def ious(found: Tensor | np.ndarray, pictures: list[Picture]) -> Tensor:
    """IoU of each of N boxes with the rectangle of each picture: (N, pictures)."""
    return box_iou(
        torch.as_tensor(found).float(), torch.tensor([box for _, box in pictures]).float()
    )


def train_on(model: BoxDetector, pictures: list[Picture], iterations: int, lr: float) -> None:
    """Two pictures a step. A random layer that does not learn, and fewer samples, make it a matter of seconds."""
    model.train().roi_heads.box_head.fc6.requires_grad_(False)
    model.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    learning = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr)
    for step in range(iterations):
        batch = [pictures[(2 * step + i) % len(pictures)] for i in (0, 1)]
        inputs = torch.cat([model_input(image, SIDE) for image, _ in batch])
        boxes = [torch.tensor([box]).float() for _, box in batch]
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / 5, 1 - step / iterations)
        optimizer.zero_grad()
        torch.stack(list(model.losses(inputs, [(96, SIDE)] * 2, boxes).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()


def written(model: BoxDetector, out: Path) -> Path:
    config = DetectorConfig(**{**SMALL, "backbone": "mobilenet", "image_size": SIDE})
    info = RoundInfo(**detector_facts(model, config, None), data=(), config=to_dict(config), metrics={},
                     parent=Parent(name=FRESH, fingerprint="", sha256=""), iterations=0, seconds=0.0)  # fmt: skip
    write_model(out, model, info)
    return out


def test_a_backbone_on_pixels_learns_where_a_rectangle_is(tmp_path: Path) -> None:
    """The first box follows it on pictures not seen, which no box that looks at nothing can; so does what is loaded."""
    torch.manual_seed(0)
    model = BoxDetector("mobilenet", SIDE)
    train_on(model, rectangles(0, 32), 40, 1e-3)
    pictures = rectangles(1, 12)
    anywhere = torch.cartesian_prod(
        *(torch.arange(0, side + 1, 8) for side in (SIDE, 96, SIDE, 96))
    )
    blind = ious(anywhere, pictures).mean(1).nan_to_num().max()
    detector, found = Detector(model), []
    for image, _ in pictures:
        boxes, scores = detector.detect(image.repeat(2, axis=0).repeat(2, axis=1))
        found.append(boxes[0] / 2)  # a photo twice as large has boxes twice as large
        assert (np.diff(scores) <= 0).all()
    followed = ious(np.stack(found), pictures).diagonal().mean()
    assert followed > blind + 0.15
    loaded = Detector(load_detector(written(model, tmp_path / "01"))[0])
    for one, other in zip(detector.detect(image), loaded.detect(image), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("start", [FRESH, "DEFAULT", None])
def test_a_detector_is_loaded_with_the_layers_that_it_was_built_of(
    start: str | None, tmp_path: Path
) -> None:
    """Which norms it has, and which layers learn if training goes on; None: its file is older than that."""
    torch.manual_seed(0)
    model = BoxDetector("mobilenet", SIDE, start=start).eval()
    out = written(model, tmp_path / "01")
    info = json.loads((out / "model.json").read_bytes())
    assert info["detector"]["start"] == start
    if start is None:
        del info["detector"]["start"]
        (out / "model.json").write_text(json.dumps(info))
    loaded, _ = load_detector(out)
    described = [
        [
            str(one)
            for one in (each, *((name, p.requires_grad) for name, p in each.named_parameters()))
        ]
        for each in (model, loaded)
    ]
    assert described[0] == described[1]
    assert ("FrozenBatchNorm2d" in described[0][0]) == (start != FRESH)
    frozen = [name for name, one in loaded.named_parameters() if not one.requires_grad]
    assert any("body.0" in name for name in frozen) == (start == "DEFAULT")


def test_a_backbone_of_torchvisions_weights_keeps_its_first_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in what starts from it with --init."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / Path(MobileNet_V3_Large_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.save(mobilenet_v3_large().state_dict(), file)
    options = {**SMALL, "backbone": "mobilenet", "image_size": SIDE}
    model = fresh_detector(DetectorConfig(**options, backbone_weights="DEFAULT"))
    first = "backbone.body.0.0.weight"
    assert torch.equal(model.state_dict()[first], torch.load(file)["features.0.0.weight"])
    out = written(model, tmp_path / "01")
    config = DetectorConfig(**options, init=str(out))
    grown = _first_detector(config, None)
    assert not dict(grown.named_parameters())[first].requires_grad
    assert detector_facts(grown, config, None)["detector"].start == "DEFAULT"


def test_weights_that_cannot_be_had_are_told() -> None:
    config = DetectorConfig(**{**SMALL, "backbone": "mobilenet", "backbone_weights": "IMAGENET9"})
    with pytest.raises(RoundError, match="backbone_weights = IMAGENET9 of mobilenet"):
        fresh_detector(config)


def test_the_gate_refuses_a_detector_that_finds_less() -> None:
    assert not judge({"ar_100": 0.30}, {"ar_100": 0.28}, 0.01).promoted
    assert judge({"ar_100": 0.30}, {"ar_100": 0.295}, 0.01).promoted
    first = judge(None, {"ar_100": 0.28}, 0.01)
    assert first.promoted and "0.280" in first.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 640}, "SAM's embedding is of 1024 pixels"),
        ({"backbone_weights": "DEFAULT"}, "has none"),
        ({"backbone": "vgg"}, "expected sam or resnet50 or mobilenet"),
        ({"data": ()}, "data is empty"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DetectorConfig(**{**SMALL, **options})
