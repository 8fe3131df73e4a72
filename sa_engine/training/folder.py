"""A round's folder: what may lie there, whether a training may go on with it, and what it leaves."""

from dataclasses import replace
from typing import Any

from sa_engine import __version__
from sa_engine.options import fingerprint, identity_values, to_dict
from sa_engine.rounds import INFO, WEIGHTS, RoundInfo, read_round
from sa_engine.run_dir import RunInfo, check_same, read_info
from sa_engine.storage import AnyPath, RunError, RunPaths, list_names, location, sweep
from sa_engine.training.report import Plan
from sa_engine.training.state import load_state, state_path
from sa_engine.training.worker import METRICS

CURVES = "curves.png"
_OURS = (WEIGHTS, INFO, METRICS, CURVES, "_run")
_DATA, _INIT = "data_fingerprint", "init_fingerprint"


def check_strangers(paths: RunPaths) -> None:
    """Raise RunError if there is anything but a round."""
    strangers = sorted(name for name in list_names(paths.out) if name not in _OURS)
    if strangers:
        raise RunError(
            f"output {paths.out} holds {strangers[0]}, which is no part of a round: --out takes a new "
            "or empty folder, or that of a round to go on with"
        )


def resumed(planned: Plan, overwrite: bool) -> Plan:
    """The plan, with what is done already. Raises RunError if another round is there."""
    paths = planned.paths
    there = (paths.out / INFO).exists()
    if overwrite or not (there or paths.info.exists()):
        return planned
    before, now = read_info(paths), _identity(planned)
    was = {"stage": before.stage, **before.identity}
    check_same(paths, was, {"stage": planned.stage, **identity_values(planned.config)})
    for what, key in (
        ("data (without what gates hold out)", _DATA),
        ("weights to start from", _INIT),
    ):
        if was.get(key) != now[key]:
            raise RunError(
                f"{paths.out} is of other {what}: {before.model.get(key, was.get(key))}; and now "
                f"{_told(planned)[key]}; put back what there was, use another --out, or start over with --overwrite"
            )
    if there:
        info = read_round(planned.out)
        _check_judged(planned, info)
        return replace(planned, done=info.iterations, finished=info)
    state = load_state(paths)
    return planned if state is None else replace(planned, done=state.iteration)


def _check_judged(planned: Plan, info: RoundInfo) -> None:
    """Raise RunError if a finished round was not judged on what the gate names now."""
    judged = {str(location(one)) for one in info.config.get("gate", ())}
    if late := [one for one in planned.config.gate if str(location(one)) not in judged]:
        raise RunError(
            f"{planned.paths.out} is finished, and was not judged on gate {late[0]}: train it again with "
            "--overwrite, or compare it with the model that it came from by `sa-engine evaluate`"
        )


def _identity(planned: Plan) -> dict[str, object]:
    """What decides a round's weights."""
    return {
        **identity_values(planned.config),
        _DATA: planned.data.fingerprint,
        _INIT: planned.fingerprint,
    }


def _told(planned: Plan) -> dict[str, str]:
    """The fingerprints of `_identity` as a person knows what they are of."""
    runs = (
        f"{one.out} ({one.images} images, {one.masks} masks, {one.fingerprint[:8]})"
        for one in planned.data.runs
    )
    return {_DATA: ", ".join(runs), _INIT: f"{planned.parent.name} ({planned.fingerprint[:12]})"}


def stated(planned: Plan) -> dict[str, Any]:
    """All options of a round, for its files; where its runs are is told so that it holds from any folder."""
    config = planned.config
    places = {
        name: [str(location(one)) for one in getattr(config, name)] for name in ("data", "gate")
    }
    return {**to_dict(config), **places, "out": str(planned.paths.out)}


def start(planned: Plan) -> None:
    """Write `run.json`, which makes the plan binding."""
    RunInfo(
        version=__version__,
        stage=planned.stage,
        config=stated(planned),
        identity=_identity(planned),
        model=_told(planned),
        fingerprint=fingerprint(planned.config),
        ignored={},
    ).write(planned.paths)


def leftovers(paths: RunPaths) -> tuple[AnyPath, ...]:
    """What a training needs and a finished round does not."""
    return paths.scratch, paths.run / "embeddings", state_path(paths)


def remove_leftovers(paths: RunPaths) -> None:
    """Remove it."""
    *folders, state = leftovers(paths)
    for folder in folders:
        sweep(folder)
    state.unlink(missing_ok=True)


def clear(paths: RunPaths) -> None:
    """Remove a round with all it has made, but for the lock that is held."""
    for name in (INFO, WEIGHTS, METRICS, CURVES):
        (paths.out / name).unlink(missing_ok=True)
    for name in ("run.json", "state.pt"):
        (paths.run / name).unlink(missing_ok=True)
    for folder in (paths.run / "embeddings", paths.run / "tensorboard"):
        sweep(folder)
