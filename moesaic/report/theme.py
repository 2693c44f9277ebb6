"""The colours of every figure and page, in a light and a dark version.

Figures are drawn with the light colours. In a page each of them is replaced by a CSS variable
(`var(--ink)`), so one SVG follows the reader's light or dark setting. That only works while all
light colours differ from each other, which a test asserts.
"""

from __future__ import annotations

LIGHT_AND_DARK: dict[str, tuple[str, str]] = {
    "paper": ("#fefefe", "#14161b"),
    "card": ("#f6f7f9", "#1c1f26"),
    "ink": ("#1d222b", "#e7e9ee"),
    "muted": ("#667085", "#98a1b3"),
    "rule": ("#dde1e8", "#343945"),
    "accent": ("#2f6bd8", "#7aa7ff"),
    # Series colours keep their order of lightness in grey, and differ for the common kinds of
    # colour blindness (blue, orange, green, violet, rose, brown).
    "series-1": ("#2f6cd9", "#6fa0ff"),
    "series-2": ("#e0762b", "#f59a57"),
    "series-3": ("#1a9a78", "#44c9a3"),
    "series-4": ("#8a5cd1", "#b592f2"),
    "series-5": ("#c9427a", "#ee7fa9"),
    "series-6": ("#8c6d3f", "#c5a36c"),
}
SERIES = tuple(name for name in LIGHT_AND_DARK if name.startswith("series-"))

HEAT_STEPS = 13  # odd, so that the middle step means "exactly the uniform share"
_HEAT = {  # (cold end, middle, warm end)
    "light": ("#2c5fa8", "#f1f2f4", "#cf5a1c"),
    "dark": ("#5f98ea", "#262a33", "#f28b4c"),
}


def _mix(first: str, second: str, share: float) -> str:
    """Blend two #rrggbb colours; share 0 is the first."""
    channels = (
        round(int(first[i : i + 2], 16) * (1 - share) + int(second[i : i + 2], 16) * share)
        for i in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _heat(version: str) -> list[str]:
    cold, middle, warm = _HEAT[version]
    half = HEAT_STEPS // 2
    down = [_mix(cold, middle, i / half) for i in range(half)]
    return [*down, middle, *(_mix(middle, warm, (i + 1) / half) for i in range(half))]


for _step, _pair in enumerate(zip(_heat("light"), _heat("dark"), strict=True)):
    LIGHT_AND_DARK[f"heat-{_step}"] = _pair

HEAT = tuple(f"heat-{step}" for step in range(HEAT_STEPS))


def light(name: str) -> str:
    """The light version of a named colour: what figures are drawn with."""
    return LIGHT_AND_DARK[name][0]


def css(version: str) -> str:
    """The declarations of all variables, `--ink: #1d222b; ...`, for "light" or "dark"."""
    column = 0 if version == "light" else 1
    return " ".join(f"--{name}: {pair[column]};" for name, pair in LIGHT_AND_DARK.items())


VARIABLE_OF = {pair[0]: f"var(--{name})" for name, pair in LIGHT_AND_DARK.items()}
