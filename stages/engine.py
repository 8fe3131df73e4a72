"""The data engine's loop (paper §4): blur, ingest, retrain, prefill, people, ingest, retrain, auto, report, in one go.

A file lists the steps, each a command as a user would type it. This stage runs them in order, each in a process of its
own: memory, threads, Ray and signals of one step then cannot touch another, and nothing happens here that does not
happen when the command is typed. Whether a step is complete its command knows best; a command is not even asked if
nothing that it reads, nor what it wrote, has changed since it was done.
"""

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from sa_engine.engine.file import EngineError, Loop, Step
from sa_engine.engine.process import Commands, Ended, Tell
from sa_engine.engine.state import (
    LoopState,
    StepState,
    is_there,
    read_state,
    refused,
    stamp,
    stamps,
)
from sa_engine.progress import Interrupted
from sa_engine.storage import write_results

_RESUME = "the same `sa-engine engine run {}` goes on with it"


class StepFailed(EngineError):
    """A step's command failed; the engine ends with its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def describe(loop: Loop) -> str:
    """What `run` would do, a line for each step; writes nothing."""
    state, lines, ahead = read_state(loop), [], False
    for step in loop.steps:
        if step.kind == "wait":
            there = is_there(str(step.out))
            does = "it is there" if there else "not there yet"
            ahead = ahead or not there
            lines += [f"{step.name}: wait for {step.out} ({does})", f"  {step.tell}"]
            continue
        complete = not ahead and state[step.name].complete(step, loop)
        ahead = ahead or not complete
        lines += [f"{step.name}: {'complete' if complete else 'run'}", f"  {step.command}"]
    return "\n".join([*lines, f"output: {loop.out}"])


def run(loop: Loop, tell: Tell) -> LoopState:
    """Run a loop's steps until it is finished or waits for people.

    Args:
        loop: from `sa_engine.engine.file.read_loop`.
        tell: takes every line that a person should see as it comes.

    Returns:
        The state, "finished" or "waiting".

    Raises:
        StepFailed: a command ended with an error.
        Interrupted: SIGINT or SIGTERM; the command that ran has had it, and ended.
        EngineError: another process runs this loop, or its folder cannot be written.
    """
    with _held(loop), Commands(tell) as commands:
        state = read_state(loop)
        state.state = "running"
        for step in loop.steps:
            known = state[step.name]
            if step.kind == "wait":
                if not _come(step, known):
                    return _end(loop, state, "waiting")
            elif known.complete(step, loop):
                tell(f"{step.name}: complete", False)
            else:
                _run_step(loop, state, step, commands, tell)
            known.refused = refused(step)
            state.save()
            if commands.signum:
                _end(loop, state, "stopped")
                raise Interrupted(
                    f"stopped after step {step.name}; {_resume(loop)}", commands.signum
                )
        return _end(loop, state, "finished")


def _come(step: Step, known: StepState) -> bool:
    """Whether what people do is there."""
    there = is_there(str(step.out))
    known.kind, known.command = step.kind, step.command
    known.status, known.error = ("done", "") if there else ("waiting", step.tell)
    known.report = f"{step.out} is there" if there else ""
    return there


def _run_step(loop: Loop, state: LoopState, step: Step, commands: Commands, tell: Tell) -> None:
    """Run a step's command, and keep what is to be known of it."""
    known, before = state[step.name], stamp(step.out)
    again = known.command == step.command
    as_it_was = known.status == "done" and again
    spent = known.seconds if again and not as_it_was else 0.0
    reads = stamps(step, loop)
    tell(f"\n[{step.name}] {step.command}", False)
    known.kind, known.command, known.status, known.error = step.kind, step.command, "running", ""
    state.save()
    _write_page(loop, state)
    started = time.monotonic()
    ended = commands.run(step.words, loop.own / f"{step.name.replace('/', '-')}.log")
    known.exit_code, known.reads, known.wrote = ended.exit_code, reads, stamp(step.out)
    done = ended.exit_code == 0
    if not (done and as_it_was and known.wrote == before):  # else it only said that it is complete
        known.seconds = spent + time.monotonic() - started
        known.report, known.ended = ended.report, time.time()
    if done:
        known.status = "done"
    elif commands.signum:
        known.status = "stopped"
        _end(loop, state, "stopped")
        raise Interrupted(f"stopped in step {step.name}; {_resume(loop)}", commands.signum)
    else:
        known.status, known.error = "failed", ended.error
        _end(loop, state, "failed")
        raise _failed(loop, step, ended)
    if step.out is None:  # such as split: it wrote into what it read
        known.reads = stamps(step, loop)
        for name, place in step.reads.items():
            state[name].wrote = stamp(place)


def _failed(loop: Loop, step: Step, ended: Ended) -> StepFailed:
    return StepFailed(
        f"step {step.name} failed with exit code {ended.exit_code}: `{step.command}` says why above, and in "
        f"{loop.own / step.name.replace('/', '-')}.log; when that is mended, {_resume(loop)}",
        ended.exit_code,
    )


def _resume(loop: Loop) -> str:
    return _RESUME.format(shlex.quote(str(loop.file)))


def _end(loop: Loop, state: LoopState, how: str) -> LoopState:
    """Write down how a session ended."""
    state.state = how
    state.save()
    _write_page(loop, state)
    return state


def _write_page(loop: Loop, state: LoopState) -> None:
    from sa_engine.engine.page import page

    write_results(loop.out, {loop.page.name: page(loop, state).encode()})


@contextmanager
def _held(loop: Loop) -> Iterator[None]:
    """Keep other processes from running the same loop."""
    lock = FileLock(loop.own / "lock", blocking=False)
    try:
        loop.own.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise EngineError(
            f"another process runs a loop in {loop.out}: wait for it, or give this one another `out:`"
        ) from None
    except OSError as error:
        raise EngineError(f"cannot write to {loop.out}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
