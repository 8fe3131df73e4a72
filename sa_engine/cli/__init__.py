"""The command line: each command reads its options, calls one function, and prints its report."""

from typing import Any

import click

from sa_engine import __version__
from sa_engine.cli import models, runs, stages
from sa_engine.cli.engine import engine
from sa_engine.cli.flags import HELP
from sa_engine.errors import SaEngineError

_INTERRUPTED = 130


class _Group(click.Group):
    """Tells a user's mistake in one sentence; anything else is a crash, with its traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of work, not of the alphabet

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Names of two words come first: `retrain detector` stands beside `retrain`."""
        two = self.commands.get(" ".join(args[:2]))
        return (two.name, two, args[2:]) if two is not None else super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SaEngineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)


@click.group(cls=_Group, context_settings={"help_option_names": HELP})
@click.version_option(__version__, prog_name="sa-engine")
def main() -> None:
    """Photos in, SA-1B-style segmentation data out."""


for command in (
    stages.ingest,
    stages.prefill,
    stages.retrain,
    stages.retrain_detector,
    stages.auto,
    stages.blur,
    stages.blur_eval,
    engine,
    runs.status,
    runs.errors,
    runs.verify,
    runs.show,
    runs.report,
    runs.audit,
    runs.split,
    runs.export,
    models.evaluate,
    models.recall,
    models.list_rounds,
    models.weights,
):
    main.add_command(command)
