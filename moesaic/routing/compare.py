"""Analyses side by side: base against post-trained models, and model against model.

The first is the base of every difference. Models of one shape are compared layer by layer and
expert by expert; where their traces hold the same tokens, also choice by choice. The study's
published figures stand beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.core.errors import UserError
from moesaic.core.files import check_output, output_directory, write_text
from moesaic.core.lineage import write_lineage
from moesaic.routing.relations import correlation
from moesaic.routing.tabulate import number
from moesaic.routing.trace import FILE_NAME, Trace

if TYPE_CHECKING:
    from moesaic.report.analysis import Analysis

__all__ = ["compare"]

_AT_ONCE = 1 << 16  # rows


def compare(
    sources: Sequence[Analysis | Path | str],
    *,
    out: Path | str,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Compare analyses (of `moesaic.analyze`) or traces, the first being the base.

    A trace is analyzed first, with the default settings, into a folder of its own beside `out`.
    Writes comparison.json, tables, figures and report.html. `names` stand for the models.

    Raises:
        UserError: fewer than two, something that is neither an analysis nor a trace, names that
            are not as many or not different, analyses without a common segment length.
    """
    from moesaic.report.compare_page import draw_comparison

    if len(sources) < 2:
        raise UserError(f"{len(sources)} analysis was given. Give two or more to compare.")
    out = check_output(out, overwrite=overwrite)
    analyses = [_open(source, out) for source in sources]
    _name(analyses, names)
    segments = [m for m in analyses[0].segments if all(m in a.segments for a in analyses)]
    if not segments:
        lengths = "; ".join(f"{a.name}: {', '.join(map(str, a.segments))}" for a in analyses)
        raise UserError(
            f"the analyses have no segment length in common ({lengths}). Analyze the traces again "
            "with the same --segments."
        )
    base = analyses[0]
    found: dict[str, Any] = {
        "base": base.name,
        "models": [_figures(a, segments) for a in analyses],
        "differences": [_difference(base, other, segments) for other in analyses[1:]],
        "segments": segments,
        "notes": _notes(analyses),
    }
    with output_directory(out, overwrite=overwrite) as folder:
        write_text(folder / "comparison.json", json.dumps(found, indent=1) + "\n")
        draw_comparison(analyses, found, folder)
        write_lineage(
            folder,
            step="route compare",
            parent=base.directory,
            config={"analyses": [str(a.directory) for a in analyses]},
        )
    return out


def _open(source: Analysis | Path | str, out: Path) -> Analysis:
    from moesaic.report.analysis import Analysis
    from moesaic.routing.analyze import analyze

    if isinstance(source, Analysis):
        return source
    path = Path(source).expanduser()
    if (path / FILE_NAME).is_file():
        place = path.absolute()
        return analyze(path, out=out.parent / f"{out.name}-{place.parent.name}-{place.name}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder. Give an analysis or a trace.")
    return Analysis(path)


def _name(analyses: Sequence[Analysis], names: Sequence[str] | None) -> None:
    """Give every analysis a name of its own: the model's, or else its directory's."""
    if names is not None:
        if len(names) != len(analyses) or len(set(names)) != len(names):
            raise UserError(
                f"{len(names)} names for {len(analyses)} analyses: {', '.join(names)}. Give a "
                "different one for each."
            )
        chosen = list(names)
    else:
        own = [a.name for a in analyses]
        chosen = [
            name if own.count(name) == 1 else f"{name} ({a.directory.name})"
            for name, a in zip(own, analyses, strict=True)
        ]
        chosen = [
            name if chosen.count(name) == 1 else f"{name} {place + 1}"
            for place, name in enumerate(chosen)
        ]
    for analysis, name in zip(analyses, chosen, strict=True):
        analysis.label = name


def _figures(analysis: Analysis, segments: Sequence[int]) -> dict[str, Any]:
    metrics = analysis.metrics
    rates = metrics["hit_rates"]["model"]
    return {
        "name": analysis.name,
        "path": str(analysis.directory),
        "model": metrics["model"],
        "tokens": metrics["trace"]["rows"],
        "srp": {str(m): metrics["srp"][str(m)] for m in segments},
        "srp_by_domain": {
            name: {str(m): by_segment[str(m)]["srp"] for m in segments}
            for name, by_segment in metrics["srp_by_domain"].items()
        },
        "loss": metrics["loss"],
        "hit_rates": rates,
        "load": metrics["load"],
        "specialisation": metrics["specialisation"],
        "correlations": metrics["correlations"]["srp_with_specialisation"],
    }


def _difference(base: Analysis, other: Analysis, segments: Sequence[int]) -> dict[str, Any]:
    """What `other` has more than the base: absolute, relative, and whether intervals overlap."""
    one, two = base.metrics, other.metrics
    found: dict[str, Any] = {"name": other.name, "srp": {}, "by_domain": {}}
    for m in map(str, segments):
        found["srp"][m] = _change(one["srp"][m], two["srp"][m])
    shared = [name for name in base.domains if name in other.domains]
    for name in shared:
        found["by_domain"][name] = {
            m: _change(one["srp_by_domain"][name][m], two["srp_by_domain"][name][m])
            for m in map(str, segments)
        }
    if one["loss"] is not None and two["loss"] is not None:
        found["loss"] = two["loss"] - one["loss"]
    if base.shape == other.shape:
        left, right = base.table("experts"), other.table("experts")
        found["experts"] = {
            key: number(correlation(left[key], right[key]))
            for key in ("load", "activation", "srp", "domain_specialisation")
        }
        found["same_choices"] = _same_choices(base, other)
    return found


def _change(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    a, b = one["srp"], two["srp"]
    if a is None or b is None:
        return {"absolute": None, "relative": None, "distinct": None}
    distinct = None
    if one.get("low") is not None and two.get("low") is not None:
        distinct = bool(one["high"] < two["low"] or two["high"] < one["low"])
    rho = None if one["rho"] is None or two["rho"] is None else two["rho"] - one["rho"]
    return {
        "absolute": b - a,
        "relative": (b - a) / a if a else None,
        "distinct": distinct,
        "rho": rho,
    }


def _same_choices(base: Analysis, other: Analysis) -> dict[str, Any] | None:
    """Share of choices that both make of the same tokens, by layer; None for other tokens."""
    places = [Path(a.metrics["trace"]["path"]) for a in (base, other)]
    try:
        one, two = (Trace(place) for place in places)
    except UserError:
        return None
    if one.rows != two.rows or one.shape.layers != two.shape.layers or one.rows == 0:
        return None
    shared_L = np.zeros(len(one.layers))
    asked_L = np.zeros(len(one.layers))
    for start in range(0, one.rows, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        if not np.array_equal(one.token_ids[part], two.token_ids[part]) or not np.array_equal(
            one.position[part], two.position[part]
        ):
            return None
        a_RLK, b_RLK = one.chosen(start, start + _AT_ONCE), two.chosen(start, start + _AT_ONCE)
        for k in range(a_RLK.shape[2]):
            mine_RL = a_RLK[:, :, k]
            both_RL = (mine_RL[:, :, None] == b_RLK).any(axis=2) & (mine_RL >= 0)
            shared_L += both_RL.sum(axis=0)
            asked_L += (mine_RL >= 0).sum(axis=0)
    share_L = np.where(asked_L > 0, shared_L / np.maximum(asked_L, 1), np.nan)
    return {
        "mean": number(shared_L.sum() / max(1.0, asked_L.sum())),
        "by_layer": dict(zip(map(str, one.layers), map(number, share_L), strict=True)),
    }


def _notes(analyses: Sequence[Analysis]) -> list[str]:
    """Say what makes the figures hard to compare."""
    base = analyses[0]
    notes = []
    for other in analyses[1:]:
        if base.shape != other.shape:
            notes.append(
                f"{other.name} has other layers or experts than {base.name}: only figures of whole "
                "models and domains are compared."
            )
        shared = [name for name in base.domains if name in other.domains]
        if not shared:
            notes.append(f"{other.name} and {base.name} have no domain in common.")
        elif base.metrics["trace"].get("data") != other.metrics["trace"].get("data"):
            notes.append(f"{other.name} was recorded on other text than {base.name}.")
    return notes
