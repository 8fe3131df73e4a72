"""An output that is a tree of images alone: the same names and folders as the input's.

A run of such a stage keeps its own files elsewhere (`RunPaths.work`). While it works, files are
built in a hidden folder of the tree, so that each appears by one rename, whole.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sa_engine.storage import AnyPath, RunError, RunPaths, list_names, sweep

_SCRATCH = ".sa-engine-tmp"


def tree_scratch(paths: RunPaths) -> Path | None:
    """Where a run builds its tree's files, on their own file system; None for a store.

    The folder is named after the run's own folder, so that no other run's is taken for it.
    """
    if not isinstance(paths.out, Path):
        return None
    return paths.out / _SCRATCH / hashlib.sha256(str(paths.work).encode()).hexdigest()[:16]


@contextmanager
def building(paths: RunPaths) -> Iterator[None]:
    """Make room for files to be built in, without what a killed run has left there; remove it after.

    Raises RunError, before there is any work, if another run builds there, or the output cannot be
    written.
    """
    scratch = tree_scratch(paths)
    if paths.work is None or scratch is None:
        yield
        return
    others = [name for name in list_names(scratch.parent) if name != scratch.name]
    if others:
        raise RunError(
            f"output {paths.out} is being written by another run, which keeps its own files in "
            f"another --work; if that has ended for good, remove {scratch.parent}"
        )
    sweep(scratch)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"cannot write to the output {paths.out}: {error.strerror}") from None
    try:
        yield
    finally:
        sweep(scratch)
        with suppress(OSError):  # another run's is there
            scratch.parent.rmdir()


def is_unswept(paths: RunPaths) -> bool:
    """Whether a run that was killed, or that works now, has its scratch folder in the tree."""
    scratch = tree_scratch(paths)
    return paths.work is not None and scratch is not None and scratch.exists()


def withdraw(paths: RunPaths, key: str) -> None:
    """Remove the released image of a photo that has failed: an earlier attempt may have left one."""
    if paths.work is not None:
        (paths.out / key).unlink(missing_ok=True)


def check_apart(paths: RunPaths, images: AnyPath) -> None:
    """Raise RunError if any of a run's three folders lies in another: none may touch the originals."""
    if paths.work is None:
        return
    named = {"--images": images, "--out": paths.out, "--work": paths.work}
    for name, folder in named.items():
        for other, inner in named.items():
            if name != other and _contains(folder, inner):
                raise RunError(
                    f"{other} {inner} lies in {name} {folder}: the photos, the redacted images and "
                    "the audit need folders apart, so that no photo is ever overwritten or mixed "
                    "with what is released"
                )


def clear_tree(paths: RunPaths, keys: Iterable[str]) -> None:
    """Remove a run's images, and the folders that are empty then."""
    folders: set[AnyPath] = set()
    for key in keys:
        with suppress(IsADirectoryError):  # it is none of the run's
            (paths.out / key).unlink(missing_ok=True)
        folders.update((paths.out / key).parents if isinstance(paths.out, Path) else ())
    for folder in sorted(folders, key=lambda folder: -len(str(folder))):
        if isinstance(folder, Path) and isinstance(paths.out, Path) and paths.out in folder.parents:
            with suppress(OSError):  # there is something else in it
                folder.rmdir()


def strangers(paths: RunPaths, keys: Iterable[str], live: bool) -> list[str]:
    """Files in a tree that are none of a run's images: one at most, which is enough to know.

    `live`: the run may be at work, so that files are being built.
    """
    out, known = paths.out, set(keys)
    if not isinstance(out, Path):
        return [key for key, _, _ in out.find_files() if key not in known][:1]
    pending = [""]
    while pending:
        prefix = pending.pop()
        for name in sorted(list_names(out / prefix)):
            key = f"{prefix}{name}"
            if (out / key).is_dir() and not (out / key).is_symlink():
                pending += [] if live and key == _SCRATCH else [f"{key}/"]
            elif key not in known:
                return [key]
    return []


def _contains(folder: AnyPath, inner: AnyPath) -> bool:
    return f"{str(inner).rstrip('/')}/".startswith(f"{str(folder).rstrip('/')}/")
