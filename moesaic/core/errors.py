"""The two kinds of failure that a user sees, and the nearest-name hint.

A message says what was given, what is allowed and what to do, on one line:
``top_k=9 but the model has 8 experts. Lower top_k or split into more experts.``
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoesaicError(Exception):
    """Something failed that the user did not cause (no space, a killed worker). Exit code 1."""

    exit_code = 1


class UserError(MoesaicError, ValueError):
    """What the user gave is wrong: an argument, a config, an input file. Exit code 2."""

    exit_code = 2


def check_seed(seed: int) -> int:
    """Return `seed`. Raises UserError unless every random generator in use takes it."""
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} was given. Use a whole number from 0 to 2^63 - 1.")
    return seed


def nearest(name: str, options: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the option closest to `name`, or an empty string."""
    lowered = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f" Did you mean '{lowered[found[0]]}'?" if found else ""


def unknown(kind: str, name: str, options: Iterable[str]) -> UserError:
    """Build the error for a name that is not among `options`: the nearest, and all of them."""
    available = sorted(options)
    return UserError(
        f"Unknown {kind} '{name}'.{nearest(name, available)}"
        f" Available: {', '.join(available) or 'none'}."
    )
