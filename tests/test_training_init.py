"""Initial models: from other models, from MAE in the layout of its released files, and with a deeper decoder."""

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from sa_engine.modeling.sam import CheckpointError, Sam, build_sam, load_sam, model_fingerprint
from sa_engine.modeling.weights import WeightsError, resolve
from sa_engine.training.init import initial_model
from sa_engine.training.mae import (
    encoder_from_mae,
    mae_architecture,
    mae_state,
    resize_patches,
)


@pytest.fixture(scope="module")
def vit_t() -> Sam:
    return load_sam(resolve("vit_t"))


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    """ViT-B/16 as MAE trains it, its weights random but none of them zero or one."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=224, patch_size=16, num_classes=0, class_token=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.05 + (weight.ndim == 1))
    return model.eval()


@pytest.fixture(scope="module")
def mae_file(vit: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `mae_pretrain_vit_base.pth`: the state dict under "model"."""
    file = tmp_path_factory.mktemp("mae") / "mae_pretrain_vit_base.pth"
    torch.save({"model": vit.state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def from_mae(mae_file: Path) -> tuple[Sam, Any]:
    return initial_model("vit_t", encoder_init=str(mae_file))


def differing(some: Sam, other: Sam) -> set[str]:
    """Parts of two models of one architecture whose tensors differ, by the first two words of their names."""
    a, b = some.state_dict(), other.state_dict()
    keys = a.keys() | b.keys()
    unlike = {k for k in keys if k not in a or k not in b or not torch.equal(a[k], b[k])}
    return {".".join(key.split(".")[:2]) for key in unlike}


def test_without_options_all_weights_are_the_parents(vit_t: Sam) -> None:
    sam, parent = initial_model("vit_t", dropout=0.1, drop_path=0.4)
    assert model_fingerprint(sam) == model_fingerprint(vit_t) == parent.fingerprint
    assert parent.name == "vit_t" and parent.encoder is None and parent.notes == ()
    assert parent.sha256 == hashlib.sha256(resolve("vit_t").read_bytes()).hexdigest()
    assert sam.mask_decoder.transformer.dropout.p == 0.1 and not sam.training
    rates = [m.rate for m in sam.image_encoder.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.4)
    same, _ = initial_model("vit_t", architecture="vit_t", decoder_depth=2)
    assert not differing(same, vit_t)


def test_a_block_computes_what_maes_does(vit: VisionTransformer, from_mae: tuple[Sam, Any]) -> None:
    """Block 2 is global: with relative positions of zero it is timm's, token by token."""
    encoder, tokens = from_mae[0].image_encoder, torch.randn(1, 64, 64, 768)
    with torch.no_grad():
        expected = vit.blocks[2](tokens.reshape(1, -1, 768)).reshape(tokens.shape)
        assert torch.allclose(encoder.blocks[2](tokens), expected, atol=1e-4)
        # Windows of 14x14 tokens are MAE's whole image.
        window = tokens[:, :14, :14]
        expected = vit.blocks[0](window.reshape(1, -1, 768)).reshape(window.shape)
        assert torch.allclose(encoder.blocks[0](window), expected, atol=1e-4)
        assert (expected - window).abs().max() > 0.1


def test_patches_and_positions_are_maes(vit: VisionTransformer, from_mae: tuple[Sam, Any]) -> None:
    sam, parent = from_mae
    image = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        patches = sam.image_encoder.patch_embed(image)
        assert torch.allclose(patches, vit.patch_embed.proj(image).permute(0, 2, 3, 1), atol=1e-5)
    grid = vit.pos_embed[:, 1:].reshape(1, 14, 14, 768)
    assert sam.image_encoder.pos_embed.shape == (1, 64, 64, 768)
    # Corners and the mean of the whole are where they were.
    coarse = F.adaptive_avg_pool2d(sam.image_encoder.pos_embed.permute(0, 3, 1, 2), 14)
    assert F.cosine_similarity(coarse.permute(0, 2, 3, 1), grid, dim=-1).min() > 0.9
    assert parent.encoder is not None and parent.encoder.endswith("mae_pretrain_vit_base.pth")
    assert parent.encoder_sha256 == hashlib.sha256(Path(parent.encoder).read_bytes()).hexdigest()
    assert "(MAE)" in parent.notes[0] and "neck is fresh" in parent.notes[0]


def test_prompt_encoder_and_decoder_stay(vit_t: Sam, from_mae: tuple[Sam, Any]) -> None:
    sam, parent = from_mae
    assert {name.split(".")[0] for name in differing(sam, vit_t)} == {"image_encoder"}
    assert parent.fingerprint == model_fingerprint(vit_t)


def test_enlarged_patches_have_the_tokens_they_had() -> None:
    """ViT-H of MAE has patches of 14x14 pixels, SAM's of 16x16."""
    torch.manual_seed(0)
    kernel, patches = torch.randn(8, 3, 14, 14), torch.randn(4, 3, 14, 14)
    enlarged = F.interpolate(patches, (16, 16), mode="bicubic", align_corners=False)
    tokens = torch.einsum("bchw,dchw->bd", enlarged, resize_patches(kernel, 16))
    assert torch.allclose(tokens, torch.einsum("bchw,dchw->bd", patches, kernel), atol=1e-3)
    assert tokens.abs().max() > 10


def test_maes_layout_may_be_of_its_whole_model(
    vit: VisionTransformer, from_mae: tuple[Sam, Any]
) -> None:
    """With MAE's own decoder and without "model": the encoder is found."""
    content = {**vit.state_dict(), "mask_token": torch.zeros(1, 1, 512)}
    content["decoder_blocks.0.norm1.weight"] = torch.zeros(512)
    state = mae_state(content)
    assert state is not None and mae_architecture(state, Path("mae.pth")) == "vit_b"
    found = encoder_from_mae(state, "vit_b", Path("mae.pth"))
    encoder = from_mae[0].image_encoder.state_dict()
    assert all(torch.equal(value, encoder[key]) for key, value in found.items())
    left = {re.sub(r"\d+", "N", key) for key in encoder.keys() - found.keys()}
    assert left == {"blocks.N.attn.rel_pos_h", "blocks.N.attn.rel_pos_w", "neck.N.weight", "neck.N.bias"}  # fmt: skip
    assert len(found) == 12 * 12 + 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.3.attn.qkv.bias": None}, "has no blocks.3.attn.qkv.bias"),
        ({"blocks.0.gamma": torch.ones(1)}, "has an unknown blocks.0.gamma"),
        ({"patch_embed.proj.bias": torch.ones(7)}, "patch_embed.proj.bias is (7,), expected (768,)"),
        ({"pos_embed": torch.zeros(1, 196, 768)}, "expected a class token and a square grid"),
        ({"blocks.12.norm1.weight": torch.ones(768)}, "is a ViT of width 768 and 13 blocks, which no SAM has"),
    ],
)  # fmt: skip
def test_other_vits_are_refused(
    change: dict[str, Tensor | None],
    words: str,
    vit: VisionTransformer,
) -> None:
    state = {k: v for k, v in {**vit.state_dict(), **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=f"^mae.pth.*{re.escape(words)}"):
        encoder_from_mae(state, mae_architecture(state, Path("mae.pth")), Path("mae.pth"))


def test_a_fresh_encoder_is_told_and_depends_on_the_seed(vit_t: Sam) -> None:
    sam, parent = initial_model("vit_t", architecture="vit_b", seed=1)
    again, _ = initial_model("vit_t", architecture="vit_b", seed=1)
    assert not differing(sam, again)
    other, _ = initial_model("vit_t", architecture="vit_b", seed=2)
    assert "image_encoder.blocks" in differing(sam, other)
    assert {name.split(".")[0] for name in differing(sam, vit_t)} == {"image_encoder"}
    assert parent.encoder == "fresh" and parent.encoder_sha256 is None
    assert parent.notes == ("the image encoder vit_b is fresh: nothing of it has been trained",)
    qkv = sam.image_encoder.blocks[5].attn.qkv
    assert qkv.weight.std().item() == pytest.approx(0.02, rel=0.05) and not qkv.bias.any()
    assert sam.image_encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_encoder_of_another_sam(vit_t: Sam, tmp_path: Path) -> None:
    torch.manual_seed(3)
    donor = build_sam("vit_b", decoder_depth=3)
    torch.save(donor.state_dict(), tmp_path / "donor.pth")
    sam, parent = initial_model(
        "vit_t", architecture="vit_b", encoder_init=str(tmp_path / "donor.pth"), drop_path=0.6
    )
    assert {name.split(".")[0] for name in differing(sam, vit_t)} == {"image_encoder"}
    assert "image_encoder.blocks" not in differing(sam, donor)
    assert parent.notes == (f"the image encoder vit_b is that of {tmp_path / 'donor.pth'}",)
    assert sam.image_encoder.blocks[-1].drop_path.rate == pytest.approx(0.6)


def test_a_deeper_decoder_repeats_its_last_layer(vit_t: Sam) -> None:
    sam, parent = initial_model("vit_t", decoder_depth=4, dropout=0.1)
    assert differing(sam, vit_t) == {"mask_decoder.transformer"}
    *kept, third, fourth = sam.mask_decoder.transformer.blocks
    for layer, original in zip(kept, vit_t.mask_decoder.transformer.blocks, strict=True):
        assert all(torch.equal(v, original.state_dict()[k]) for k, v in layer.state_dict().items())
    for copy in (third, fourth):
        assert all(torch.equal(v, kept[1].state_dict()[k]) for k, v in copy.state_dict().items())
        assert not copy.first
    assert third.mlp.lin1.weight.data_ptr() != kept[1].mlp.lin1.weight.data_ptr()
    assert parent.notes == ("decoder layers 3 to 4 are copies of layer 2",)
    assert parent.fingerprint == model_fingerprint(vit_t)


def test_mistakes_are_told(mae_file: Path, tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "other.pth")
    torch.save({"weight": torch.ones(1)}, tmp_path / "linear.pth")
    for options, words in (
        ({"init": str(mae_file)}, "is an image encoder alone (MAE), expected a whole SAM"),
        ({"init": str(tmp_path / "linear.pth")}, "is not a SAM of a known architecture"),
        ({"init": "vit_t", "architecture": "vit_x"}, "vit_x: expected one of vit_t, vit_b"),
        ({"init": "vit_t", "architecture": "vit_l", "encoder_init": str(mae_file)},
         "has an image encoder vit_b, expected vit_l"),
        ({"init": "vit_t", "encoder_init": str(tmp_path / "other.pth")}, "holds dict, expected a flat"),
        ({"init": "vit_t", "encoder_init": str(tmp_path / "linear.pth")}, "found weight; expected"),
        ({"init": "vit_t", "decoder_depth": 1}, "has 2 decoder layers, expected at most the 1"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=re.escape(words)):
            initial_model(**options)
    with pytest.raises(WeightsError, match="missing.pth: there is no such file"):
        initial_model("vit_t", encoder_init="missing.pth")
