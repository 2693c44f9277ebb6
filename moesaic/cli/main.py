"""Assemble the commands found in `commands/` and run them with the project's exit codes.

A command file holds either a function ``command`` (its docstring is the help, ending with a
runnable example) or a ``typer.Typer`` called ``app`` (a group), and ``PANEL``, the heading it is
listed under. The command's name is the file's. Exit codes: 0 success, 2 what the user gave is
wrong, 1 anything else.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.core.console import reporting
from moesaic.core.errors import MoesaicError

PANELS = ("Make", "Train", "Run", "Study", "Share", "Help")


def build() -> typer.Typer:
    """Return the application with every command of `commands/`, panel by panel."""
    app = typer.Typer(
        name="moesaic",
        help="Make, train, run and study mixture-of-experts language models.",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    folder = Path(__file__).parent / "commands"
    modules = [
        importlib.import_module(f"moesaic.cli.commands.{file.stem}")
        for file in sorted(folder.glob("*.py"))
        if not file.stem.startswith("_")
    ]
    for module in sorted(modules, key=lambda m: PANELS.index(m.PANEL)):
        name = module.__name__.rpartition(".")[2].strip("_").replace("_", "-")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, rich_help_panel=module.PANEL)
        else:
            app.command(name, rich_help_panel=module.PANEL)(module.command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from moesaic import __version__

        print(f"moesaic {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or bool(os.environ.get("MOESAIC_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; ours say more
    from moesaic.cli.reporter import RichReporter

    try:
        with reporting(RichReporter(plain="--json" in arguments)):
            code = build()(arguments, prog_name="moesaic", standalone_mode=False)
            return code if isinstance(code, int) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return _fail("interrupted. Nothing half-written was left under the final name.", 1)
    except Exception as error:
        # typer's own errors; the class moved between its versions.
        if hasattr(error, "format_message"):
            return _misused(error)
        if type(error).__name__ == "Abort":
            return _fail("interrupted. Nothing half-written was left under the final name.", 1)
        if debug:
            raise
        return _fail(_describe(error), getattr(error, "exit_code", 1))


def _misused(error: Any) -> int:
    """Say on one line what is wrong with the arguments; help that was asked for is printed."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    message = " ".join(str(error.format_message()).split())
    command = error.ctx.command_path if getattr(error, "ctx", None) else "moesaic"
    stop = "" if message.endswith((".", "?", ")")) else "."
    return _fail(f"{message}{stop} See {command} --help.", 2)


def _describe(error: Exception) -> str:
    if isinstance(error, MoesaicError):
        return " ".join(str(error).split("\n"))
    full = os.strerror(errno.ENOSPC)  # safetensors has errors of its own, with the system's words
    if getattr(error, "errno", None) == errno.ENOSPC or full in str(error):
        return f"no space left{_file(error)}. Free some space; the partial output was removed."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {str(error).partition(chr(10))[0]}"
    detail = " ".join(str(error).split())
    return f"{type(error).__name__}: {detail} (run again with --debug for the traceback)"


def _file(error: Exception) -> str:
    name = getattr(error, "filename", None)
    return f" while writing {name}" if name else ""


def _fail(message: str, code: int) -> int:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
