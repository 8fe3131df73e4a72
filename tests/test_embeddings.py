"""Embeddings kept on the disk: the same numbers again, made once, and never from a damaged file."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training import make_run, quarter

from sa_engine.modeling.sam import Sam, build_sam, encoder_fingerprint, load_sam, model_fingerprint
from sa_engine.modeling.weights import resolve
from sa_engine.predictor import Predictor
from sa_engine.training.data import TrainingData
from sa_engine.training.embeddings import EmbeddingCache, EmbeddingCacheError

SHAPE = (1, 256, 64, 64)


@pytest.fixture
def data(photos: list[np.ndarray], tmp_path: Path) -> TrainingData:
    """Four photos, two of them the same."""
    (tmp_path / "photos").mkdir()
    for number in (0, 1, 2, 0):
        name = f"{len(list((tmp_path / 'photos').iterdir()))}.png"
        Image.fromarray(photos[number]).reduce(8).save(tmp_path / "photos" / name)
    return TrainingData.open([make_run(tmp_path / "photos", tmp_path / "out", quarter)])


@pytest.mark.parametrize(("dtype", "most"), [("float16", 2**-11), ("float32", 2**-24)])
def test_what_was_put_is_got(dtype: str, most: float, tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "e" * 64, dtype)
    values = torch.randn(SHAPE, generator=torch.manual_seed(0))
    assert cache.get("a" * 64) is None
    cache.put("a" * 64, values.double())
    found = cache.get("a" * 64)
    assert found is not None and found.dtype == torch.float32
    # Smaller than 2^-14 float16 has fewer digits.
    assert ((found - values).abs() <= most * values.abs().clip(min=2**-14)).all()
    assert (found != values).any() == (dtype == "float16")
    for folder, encoder in ((tmp_path, "f" * 64), (tmp_path / "b", "e" * 64)):
        assert EmbeddingCache(folder, encoder, dtype).get("a" * 64) is None
    size = cache.path("a" * 64).stat().st_size
    assert size == pytest.approx({"float16": 2**21, "float32": 2**22}[dtype], rel=0.001)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def unlabelled(path: Path) -> None:
    save_file(load_file(path), path)


def of_another_image(path: Path) -> None:
    other = next(one for one in path.parents[1].rglob("*.safetensors") if one != path)
    shutil.copyfile(other, path)


@pytest.mark.parametrize("damage", [cut, flip, empty, unlabelled, of_another_image])
def test_a_damaged_file_is_made_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "e" * 64)
    values = torch.randn(2, *SHAPE).half().float()
    keys = ("a" * 64, "b" * 64)
    for key, one in zip(keys, values, strict=True):
        cache.put(key, one)
    damage(cache.path(keys[0]))
    assert cache.get(keys[0]) is None
    cache.put(keys[0], values[0])
    for key, one in zip(keys, values, strict=True):
        assert torch.equal(cache.get(key), one)  # type: ignore[arg-type]


class Usage(NamedTuple):
    free: int


def test_too_little_space_is_told_before_there_is_work(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = EmbeddingCache(tmp_path / "cache", "e" * 64)
    keys = {data.content_key(index) for index in range(4)}
    assert len(keys) == 3, "copies of a photo have one embedding"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(6_200_000))
    with pytest.raises(EmbeddingCacheError, match=r"3 images need 0.0 GB in .*cache/e+-float16"):
        cache.check_space(keys)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(6_400_000))
    cache.check_space(keys)
    for key in keys:
        cache.put(key, torch.zeros(SHAPE))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0))
    cache.check_space(keys)


def test_what_cannot_be_kept_is_told(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, "e" * 64)
    for value in (float("nan"), 1e6):
        with pytest.raises(EmbeddingCacheError, match="not finite in torch.float16"):
            cache.put("a" * 64, torch.full(SHAPE, value))
    EmbeddingCache(tmp_path, "e" * 64, "float32").put("a" * 64, torch.full(SHAPE, 1e6))
    with pytest.raises(ValueError, match="expected"):
        cache.put("a" * 64, torch.zeros(SHAPE[1:]))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EmbeddingCacheError, match="cannot write to .*name another folder"):
        EmbeddingCache(tmp_path / "file", "e" * 64).put("a" * 64, torch.zeros(SHAPE))


def test_the_encoders_fingerprint_is_of_the_encoder_alone() -> None:
    sam = build_sam("vit_t")
    before, whole = encoder_fingerprint(sam), model_fingerprint(sam)
    change(sam, sam.mask_decoder)
    assert encoder_fingerprint(sam) == before and model_fingerprint(sam) != whole
    change(sam, sam.image_encoder)
    assert encoder_fingerprint(sam) != before


def change(sam: Sam, part: Any) -> None:
    with torch.no_grad():
        next(part.parameters()).view(-1)[0] += 1


def test_of_the_real_encoder_masks_stay_the_same(data: TrainingData, tmp_path: Path) -> None:
    sam = load_sam(resolve("vit_t"))
    predictor = Predictor(sam)
    cache = EmbeddingCache(tmp_path / "cache", encoder_fingerprint(sam))
    sample, key = data.load(1, np.random.default_rng(0)), data.content_key(1)
    assert sample is not None and sample.pixels is not None
    pixels = sample.pixels
    exact = predictor.embed_pixels([pixels], [pixels.shape[:2]])[0]
    cache.put(key, exact.features)
    kept = cache.get(key)
    assert kept is not None
    assert (kept - exact.features).abs().max() < 3e-4
    fresh = cache.rounded(exact.features)
    assert torch.equal(kept, fresh) and kept.stride() == fresh.stride() != exact.features.stride()
    height, width = exact.size
    points = np.random.default_rng(0).uniform(0, 1, (4, 1, 2)) * (width, height)
    shared = predictor.decoder.share(kept, predictor.no_mask)
    first, second = (
        predictor.predict(one, points, np.ones((4, 1))).logits
        for one in (exact, replace(exact, features=kept, shared=shared))
    )
    assert ((first > 0) != (second > 0)).float().mean() < 1e-3
    assert 0 < (first - second).abs().max() < 0.002 * first.abs().max()
