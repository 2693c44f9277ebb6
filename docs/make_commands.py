"""Write docs/commands.md from the help texts of the command line: `python docs/make_commands.py`.

The texts are read from the signatures of the command functions, which do not change with the
version of typer. A test compares the file with this script's output, so it cannot fall behind.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from typer.models import ArgumentInfo, OptionInfo

from moesaic.cli.main import PANELS, build

PAGE = Path(__file__).parent / "commands.md"
HEAD = """\
# Commands

<!-- Made by docs/make_commands.py from the help texts: change those, then run `make docs`. -->

`-o` is always the output directory, `--json` prints one JSON object on standard output and nothing
else there, and every command that writes something prints where as its last line. Exit codes: 0
success; 2 what was given is wrong (arguments, config, input files); 1 anything else that failed.
`moesaic --debug ...` shows tracebacks, `moesaic --version` the version.
"""
TYPES = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: ""}


def page() -> str:
    """The whole page as Markdown."""
    commands = sorted(_commands(build()), key=lambda c: (PANELS.index(c[0]), c[1]))
    lines = ["| command | |", "| --- | --- |"]
    for _, name, thing in commands:
        lines.append(f"| [`{name}`](#moesaic-{name}) | {_first_line(_help(thing))} |")
    parts = [HEAD, "\n".join(lines) + "\n"]
    for panel in PANELS:
        shown = [(name, thing) for p, name, thing in commands if p == panel]
        if shown:
            parts.append(f"## {panel}\n")
        parts += [_section(f"moesaic {name}", thing, level=3) for name, thing in shown]
    return "\n".join(parts).rstrip() + "\n"


def _commands(app: Any) -> Iterator[tuple[str, str, Any]]:
    """(panel, name, function or group) of everything that is listed."""
    for info in app.registered_commands:
        if not info.hidden:
            yield info.rich_help_panel, info.name, info.callback
    for info in app.registered_groups:
        if not info.hidden:
            yield info.rich_help_panel, info.name, info.typer_instance


def _help(thing: Any) -> str:
    if inspect.isfunction(thing):
        return inspect.getdoc(thing) or ""
    callback = thing.registered_callback
    text = thing.info.help or (callback and (callback.help or inspect.getdoc(callback.callback)))
    return inspect.cleandoc(text if isinstance(text, str) else "")


def _section(name: str, thing: Any, *, level: int) -> str:
    parts = [f"{'#' * level} `{name}`\n", _help(thing) + "\n"]
    if inspect.isfunction(thing):
        parts.append(_table(name, thing))
    else:
        for info in thing.registered_commands:
            if not info.hidden:
                child = info.name or info.callback.__name__.replace("_", "-")
                parts.append(_section(f"{name} {child}", info.callback, level=level + 1))
    return "\n".join(parts)


def _table(name: str, function: Callable[..., Any]) -> str:
    arguments, needed, rows = [], [], []
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        bare, info = _annotation(hints[parameter.name])
        if info.hidden:
            continue
        required = parameter.default is inspect.Parameter.empty
        metavar = info.metavar or _metavar(bare)
        if isinstance(info, ArgumentInfo):
            shown = info.metavar or parameter.name.upper()
            arguments.append(shown if required else f"[{shown}]")
            spelled = shown
        else:
            long = "--" + parameter.name.strip("_").replace("_", "-")
            names = list(info.param_decls or ()) or [long]
            if not any(name.startswith("--") for name in names):
                names.insert(0, long)
            spelled = ", ".join(names) + (f" {metavar}" if metavar else "")
            if required:
                longest = max(names, key=len).partition("/")[0]
                needed.append(f"{longest} {metavar}".rstrip())
        text = " ".join((info.help or "").split())
        rows.append(f"| `{spelled}` | {_default(parameter.default)} | {text} |")
    usage = " ".join([name, *arguments, *needed, "[OPTIONS]"])
    table = "\n".join(["| | default | |", "| --- | --- | --- |", *rows]) + "\n" if rows else ""
    return f"```\n{usage}\n```\n\n{table}"


def _annotation(hint: Any) -> tuple[Any, ArgumentInfo | OptionInfo]:
    """The plain type and typer's description out of `Annotated[type, typer.Option(...)]`."""
    bare, *extras = typing.get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    found = [extra for extra in extras if isinstance(extra, (ArgumentInfo, OptionInfo))]
    return bare, found[0] if found else OptionInfo()


def _metavar(bare: Any) -> str:
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"  # a bar would end the table's cell
    if origin in (types.UnionType, typing.Union):
        return _metavar(next(a for a in arguments if a is not type(None)))
    if origin in (list, tuple):
        return _metavar(arguments[0]) + "..."
    return TYPES.get(bare, getattr(bare, "__name__", str(bare)).upper())


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value is False or value in ((), []):
        return ""
    return "on" if value is True else f"`{value}`"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE, file=sys.stderr)
