"""Words in the terminal, coloured by expert; with the expert's number where there is no colour."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from moesaic.core.errors import UserError

if TYPE_CHECKING:
    from moesaic.routing.show import Routed

# Backgrounds of the 256-colour terminals, light enough for black words.
COLOURS = (111, 216, 114, 183, 211, 222, 80, 155, 210, 105, 143, 180)
REST = 250
# The same for terminals of 16 colours.
NAMED = (
    "bright_blue", "yellow", "bright_green", "magenta", "bright_red", "bright_yellow", "cyan",
    "bright_magenta", "green", "red", "bright_cyan", "blue",
)  # fmt: skip


def places_of(routed: Routed, layer: str) -> list[int]:
    """Return the places of `best`, `all` or a layer's number. Raises UserError for others."""
    if layer == "best":
        return [routed.best]
    if layer == "all":
        return list(range(len(routed.layers)))
    if not layer.isdigit() or int(layer) not in routed.layers:
        names = ", ".join(map(str, routed.layers))
        raise UserError(f"--layer {layer}: routed layers are {names}. Use one, best or all.")
    return [routed.layers.index(int(layer))]


def print_routed(routed: Routed, places: list[int], *, console: Console | None = None) -> None:
    """Print the text once for each of the layers at `places`, with a legend.

    The twelve experts that most tokens chose first have a colour, the others are grey. What the
    model wrote is underlined.
    """
    console = console or Console(highlight=False)
    for number, place in enumerate(places):
        if number:
            console.print()
        most = ", the most consistent" if place == routed.best else ""
        title = f"layer {routed.layers[place]}{most}"
        title += f": consistency {routed.consistency_L[place]:.2f}"
        console.print(Text(title, style="bold"))
        first_T = [int(expert) for expert in routed.experts_TLK[:, place, 0]]
        counts = Counter(expert for expert in first_T if expert >= 0)
        ranked = sorted(counts, key=lambda expert: (-counts[expert], expert))
        few = console.color_system == "standard"
        palette = NAMED if few else tuple(f"color({number})" for number in COLOURS)
        colour = dict(zip(ranked, palette, strict=False))
        legend = Text()
        for expert in ranked[: len(COLOURS)]:
            legend.append(f" {expert}: {counts[expert]} ", _style(colour, expert, written=False))
            legend.append(" ")
        left = ranked[len(COLOURS) :]
        if left:
            legend.append(f"and {len(left)} more", "dim")
        console.print(legend)
        console.print(_words(routed, first_T, colour, plain=console.color_system is None))


def _words(routed: Routed, first_T: list[int], colour: dict[int, str], *, plain: bool) -> Text:
    text = Text()
    for token, (word, expert) in enumerate(zip(routed.words, first_T, strict=True)):
        written = token >= routed.prompt
        if plain:
            if token == routed.prompt and token:
                text.append(" || ")
            name = "-" if expert < 0 else str(expert)
            text.append(f"{word}[{name}]")
        else:
            text.append(word, _style(colour, expert, written=written))
    return text


def _style(colour: dict[int, str], expert: int, *, written: bool) -> str:
    underline = " underline" if written else ""
    if expert < 0:
        return f"strike{underline}"
    return f"color(16) on {colour.get(expert, f'color({REST})')}{underline}"
