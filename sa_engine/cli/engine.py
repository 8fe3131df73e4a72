"""The whole loop from one file."""

import difflib
from pathlib import Path

import click

from sa_engine.cli.flags import HELP
from sa_engine.engine.file import EngineError, Known, read_loop

_OUT = "--out"
_NEVER = ("overwrite", "steal_lock", "dry_run")


@click.group()
def engine() -> None:
    """Run the whole loop, step by step, from one file."""


@engine.command("run")
@click.argument("file", metavar="FILE", type=Path)
@click.option("--dry-run", is_flag=True, help="Say what each step would do; write nothing.")
def run_loop(file: Path, dry_run: bool) -> None:
    """Run the steps of a loop in order.

    FILE lists them, see configs/engine.yaml. What is complete is skipped. Where people have to do something, the
    engine says so and ends; run it again to go on, as after an error or a signal.
    """
    loop = read_loop(file, _look)
    from stages import engine as stage

    if dry_run:
        click.echo(stage.describe(loop))
        return
    state = stage.run(loop, lambda line, wrong: click.echo(line, err=wrong))
    click.echo(f"\n{state}\nsummary: {loop.page}")
    for name, text in state.refusals(loop).items():
        click.echo(f"\nThe gate refused {name}: {text}")
    for step in state.steps:
        if step.status == "waiting":
            click.echo(f"\n{step.error}\nWhen that is there, the same command goes on.")


@engine.command("status")
@click.argument("file", metavar="FILE", type=Path)
def loop_status(file: Path) -> None:
    """Say how far a loop is, and write nothing."""
    from sa_engine.engine.state import read_state

    click.echo(read_state(read_loop(file, _look)))


def _look(words: list[str], out: str) -> Known:
    """What the command line says of a step's command."""
    command, name = _command(words)
    rest = words[len(name) :]
    option = next((param for param in command.params if _OUT in param.opts), None)
    if option is not None and not any(word == _OUT or word.startswith(f"{_OUT}=") for word in rest):
        rest = [*rest, _OUT, out]
    try:
        context = command.make_context(" ".join(name), list(rest), help_option_names=HELP)
    except click.exceptions.Exit:
        raise EngineError("asks for help only: expected a command that does something") from None
    except click.ClickException as error:
        raise EngineError(
            f"{error.format_message()} See `sa-engine {' '.join(name)} --help`"
        ) from None
    for given in _NEVER:
        if context.params.get(given):
            raise EngineError(
                f"--{given.replace('_', '-')} in a step: it would be given again whenever the loop goes on; type "
                "the command yourself, once"
            )
    place = context.params.get(option.name) if option is not None and option.name else None
    return Known(" ".join(name), (*name, *rest), None if place is None else str(place))


def _command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command at the start of a command line, and its name, which may be of two words."""
    command, count = click.get_current_context().find_root().command, 0
    while isinstance(command, click.Group):
        # As the command line does: `retrain detector` stands beside `retrain`.
        lengths = [n for n in (2, 1) if " ".join(words[count : count + n]) in command.commands]
        if not lengths:
            found = words[count] if len(words) > count else ""
            known = [name for name in command.commands if name != engine.name]
            close = difflib.get_close_matches(found, known, n=1)
            advice = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            after = f" after {' '.join(words[:count])}" if count else ""
            raise EngineError(f"there is no command {found!r} for a step{after}: {advice}")
        following = command.commands[" ".join(words[count : count + lengths[0]])]
        if following is engine:
            raise EngineError(
                "there is no command 'engine' for a step: a loop is none of its own steps"
            )
        command, count = following, count + min(lengths[0], len(words) - count)
    return command, words[:count]
