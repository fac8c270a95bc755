"""How a command answers: its result or its error, to a person or, with --json, as one object on stdout."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import click
from rich.console import Console

from edgelocal.commands.console import error_console
from edgelocal.errors import BudgetError, EdgelocalError, InterruptedRunError, StorageError

_MEMORY_ADVICE = "what was committed before stands; free memory, raise the limit, or use a smaller --batch"

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")


class Commands(click.Group):
    """Turns our errors into one line on stderr and their exit code; with --json also into an object."""

    def invoke(self, context: click.Context) -> Any:
        """As click's."""
        try:
            return super().invoke(context)
        except click.ClickException as error:
            _emit_error(error.format_message(), error)
            raise  # click knows how to show it
        except (KeyboardInterrupt, click.Abort):
            _fail(InterruptedRunError("interrupted; what was committed before stands"))
        except EdgelocalError as error:
            _fail(error)
        except MemoryError as error:
            error.__traceback__ = None  # frees what the command held, so that there is memory to say it
            _fail(BudgetError(f"out of memory{f' ({error})' if str(error) else ''}; {_MEMORY_ADVICE}"))


def emit(result: dict[str, Any], as_json: bool, *shown: Any) -> None:
    """The result as JSON, or what a person reads of it.

    Raises:
        StorageError: stdout takes no more.
    """
    try:
        if as_json:
            click.echo(json.dumps(result, sort_keys=True))
            return
        console = Console(highlight=False, markup=False)
        for part in shown:
            console.print(part, soft_wrap=isinstance(part, str))
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # whoever reads has seen enough; click ends the command quietly
    except OSError as error:
        found = f"the result cannot be written to stdout ({error.strerror})"
        raise StorageError(f"{found}; the work itself is done") from None


def say_to(as_json: bool) -> Callable[[str], None]:
    """Where commands tell what they are doing: stderr, or nowhere with --json."""
    console = error_console()
    return (lambda text: None) if as_json else partial(console.print, soft_wrap=True)


def _fail(error: EdgelocalError) -> NoReturn:
    """One line on stderr, and the exit code."""
    _emit_error(str(error), error)
    try:
        error_console().print(f"edgelocal: {error}", soft_wrap=True)
    except MemoryError:  # rich imports more of itself when it first prints
        click.echo(f"edgelocal: {error}", err=True)
    sys.exit(error.exit_code)


def _emit_error(message: str, error: EdgelocalError | click.ClickException) -> None:
    """With --json, the object that stands in for the result."""
    if "--json" in sys.argv:
        with contextlib.suppress(OSError):  # the exit code still says it
            click.echo(json.dumps({"error": message, "kind": type(error).__name__, "exit_code": error.exit_code}))
