"""An output that is a tree of images alone: the same names and folders as the input's.

A run of such a stage keeps its own files elsewhere (`RunPaths.work`). While it works, files are
built in a hidden folder of the tree, so that each appears by one rename, whole.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sa_engine.storage import AnyPath, RunError, RunPaths, list_names, sweep

_SCRATCH = ".sa-engine-tmp"


def tree_scratch(out: AnyPath) -> Path | None:
    """Where a tree's files are built, on its own file system; None for a store, which needs none."""
    return out / _SCRATCH if isinstance(out, Path) else None


@contextmanager
def building(paths: RunPaths) -> Iterator[None]:
    """Make room for files to be built in, without what a killed run has left there; remove it after.

    Raises RunError, before there is any work, if the output cannot be written.
    """
    scratch = tree_scratch(paths.out)
    if paths.work is None or scratch is None:
        yield
        return
    sweep(scratch)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise RunError(f"cannot write to the output {paths.out}: {error.strerror}") from None
    try:
        yield
    finally:
        sweep(scratch)


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
        (paths.out / key).unlink(missing_ok=True)
        folders.update((paths.out / key).parents if isinstance(paths.out, Path) else ())
    for folder in sorted(folders, key=lambda folder: -len(str(folder))):
        if isinstance(folder, Path) and isinstance(paths.out, Path) and paths.out in folder.parents:
            with suppress(OSError):  # there is something else in it
                folder.rmdir()


def strangers(out: AnyPath, keys: Iterable[str]) -> list[str]:
    """Files in a tree that are none of a run's images; one that is enough to know, at most."""
    known = set(keys)
    if not isinstance(out, Path):
        return [key for key, _, _ in out.find_files() if key not in known][:1]
    pending = [""]
    while pending:
        prefix = pending.pop()
        for name in sorted(list_names(out / prefix)):
            key = f"{prefix}{name}"
            if (out / key).is_dir() and not (out / key).is_symlink():
                pending += [f"{key}/"] if name != _SCRATCH else []
            elif key not in known:
                return [key]
    return []


def _contains(folder: AnyPath, inner: AnyPath) -> bool:
    return f"{inner}/".startswith(f"{folder}/".replace("//", "/"))
