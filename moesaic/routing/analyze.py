"""Everything about a trace in one pass: tables, figures and a report. `moesaic.analyze`.

    metrics.json       the headline figures
    tables/*.parquet   every figure: segments, positions, hits, load, pairs, words, experts, ...
    cases.json         a short sample of each domain, word by word, with its experts
    figures/           PNG and SVG
    report.html        all of it on one page that needs no network
    encoder/           the same of a sequence-to-sequence model's encoder

The pass reads a block of samples at a time. Its state is written about once a minute to `.work`, so
that the same call goes on after a kill and gives the same figures bit for bit (on as many threads:
replicates are summed by BLAS).
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moesaic.core.console import note, progress
from moesaic.core.errors import UserError
from moesaic.core.files import check_folder, write_text
from moesaic.core.lineage import FILE_NAME as LINEAGE
from moesaic.core.lineage import write_lineage
from moesaic.routing.cases import consistency
from moesaic.routing.compiled import ahead
from moesaic.routing.reading import Borders, blocks, borders_of, read_block
from moesaic.routing.study import Arrays, Settings, Study, save_arrays
from moesaic.routing.summary import summarise
from moesaic.routing.tabulate import tables_of
from moesaic.routing.trace import ENCODER, FILE_NAME, Trace
from moesaic.routing.words import decoder_of, open_tokenizer, pieces

if TYPE_CHECKING:
    from moesaic.report.analysis import Analysis

__all__ = ["analyze"]

SAVE_SECONDS = 60.0
"""Time after which the state is written: what a kill can cost."""
_FORMAT = 1
_WORK = ".work"


def analyze(
    trace: Trace | Path | str,
    *,
    out: Path | str,
    segments: tuple[int, ...] = (4, 16, 64, 256),
    bootstrap: int = 1000,
    confidence: float = 0.95,
    intervals: Literal["model", "layer"] = "layer",
    cache_samples: int | None = None,
    min_count: int = 20,
    case_tokens: int = 256,
    seed: int = 0,
    tokenizer: Any = None,
    report: bool = True,
    overwrite: bool = False,
) -> Analysis:
    """Measure everything about a trace and write it, with figures and a page, to `out`.

    `segments` are the segment lengths of SRP and the windows of SCH, in tokens; `bootstrap` the
    replicates of the intervals, 0 for none; `intervals` the finest level of SRP that gets them.
    `cache_samples` lets cache simulations take only so many samples of each domain. Words with
    fewer than `min_count` occurrences are left out. `tokenizer`, or where one lies, turns ids into
    words; by default that of the recorded model. `report=False` leaves figures and page out;
    `moesaic route report` draws them later. Memory: see `moesaic.routing.study`.

    An unfinished analysis in `out` by the same call is continued, a finished one returned as it is.

    Raises:
        UserError: no trace, an empty or damaged one, numbers out of range, or a directory that
            holds something else (an analysis with other settings is replaced with `overwrite`).
    """
    from moesaic.report.analysis import Analysis
    from moesaic.report.routing_page import draw

    trace = trace if isinstance(trace, Trace) else Trace(trace)
    settings = Settings(
        segments=tuple(segments),
        bootstrap=bootstrap,
        confidence=confidence,
        intervals=intervals,
        cache_samples=cache_samples,
        min_count=min_count,
        case_tokens=case_tokens,
        seed=seed,
    )
    directory = check_folder(out).absolute()
    plan = {"format": _FORMAT, "trace": _fingerprint(trace), **settings.to_dict()}
    if _finished(directory, plan, overwrite=overwrite):
        note(f"{directory} holds this analysis already.")
        return Analysis(directory)
    borders = borders_of(trace)
    words = open_tokenizer(tokenizer, trace.info.get("model"))
    work = directory / _WORK
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / "plan.json", json.dumps(plan) + "\n")

    began = time.monotonic()
    study = Study(trace, borders, settings)
    _read(study, work)
    parts = [_load(work / f"domain-{place}.npz") for place in range(len(study.domains))]
    tables = tables_of(study, parts, decoder_of(words))
    for name, table in tables.items():
        _write_table(directory / "tables" / f"{name}.parquet", table)
    write_text(directory / "cases.json", json.dumps(_cases(trace, borders, settings, words)))
    metrics = {**summarise(study, tables), "settings": plan}
    if trace.encoder is not None:
        inner = analyze(
            trace.encoder,
            out=directory / ENCODER,
            tokenizer=words,
            report=report,
            overwrite=overwrite,
            **_arguments(settings),
        )
        metrics["encoder"] = inner.metrics
    metrics["seconds"] = round(time.monotonic() - began, 1)
    write_text(directory / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    analysis = Analysis(directory)
    if report:
        draw(analysis)
    write_lineage(
        directory, step="route analyze", parent=trace.directory, config=plan, seed=settings.seed
    )
    shutil.rmtree(work)
    return analysis


def _arguments(settings: Settings) -> dict[str, Any]:
    return {**settings.to_dict(), "segments": settings.segments}


def _fingerprint(trace: Trace) -> str:
    """Of what the trace says about itself: settings of its recording, shapes, rows."""
    text = (trace.directory / FILE_NAME).read_bytes()
    return hashlib.sha256(text).hexdigest()[:16]


def _finished(directory: Path, plan: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether `plan` is done there; what may be replaced is removed. Raises UserError."""
    if not directory.exists() or not any(directory.iterdir()):
        return False
    wanted = json.loads(json.dumps(plan))
    done = (directory / LINEAGE).is_file()
    found: Any = None
    place = directory / "metrics.json" if done else directory / _WORK / "plan.json"
    if place.is_file():
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{place} is damaged ({error}). Remove {directory}.") from None
        found = found.get("settings") if done else found
    if found is None:
        raise UserError(
            f"{directory} is not empty, and holds no analysis. Choose another -o, or remove it."
        )
    if overwrite:
        shutil.rmtree(directory)
        return False
    if found != wanted:
        different = [key for key in wanted if found.get(key) != wanted[key]]
        raise UserError(
            f"{directory} holds the analysis of another trace or with other settings "
            f"({', '.join(different)}). Choose another -o, or give --overwrite."
        )
    if done:
        shutil.rmtree(directory / _WORK, ignore_errors=True)
    return done


def _read(study: Study, work: Path) -> None:
    """Read all samples that are not in the sums yet."""
    state = work / "state.npz"
    if state.is_file():
        study.restore(state)
        note(f"going on in domain {study.domain + 1} of {len(study.domains)}.")
    left = sum(len(study.borders.of(d)) for d in study.domains[study.domain :]) - study.done
    saved = time.monotonic()
    with progress("analyzing", left) as bar:
        while study.domain < len(study.domains):
            coming = blocks(study.trace, study.borders, study.number, first=study.done)
            for done, samples in ahead(coming):
                study.update(samples, done)
                bar.advance(len(samples))
                if time.monotonic() - saved > SAVE_SECONDS:
                    study.save(state)
                    saved = time.monotonic()
            place = study.domain
            save_arrays(work / f"domain-{place}.npz", study.finish_domain())
            if time.monotonic() - saved > SAVE_SECONDS or study.domain == len(study.domains):
                study.save(state)
                saved = time.monotonic()


def _load(path: Path) -> Arrays:
    with np.load(path) as held:
        return dict(held.items())


def _write_table(path: Path, table: dict[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(table), path)


def _cases(
    trace: Trace, borders: Borders, settings: Settings, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return the beginning of each domain's first sample: words, experts, the best layer."""
    found = []
    for domain in np.unique(borders.domain).tolist():
        row = int(borders.of(domain)[0])
        start = int(borders.starts[row])
        stop = min(int(borders.ends[row]), start + settings.case_tokens)
        first = Borders(np.array([start]), np.array([stop]), np.array([domain]))
        samples = read_block(trace, first, np.array([0]))
        consistent_L = consistency(samples)
        dtype = trace.shape.experts_dtype
        raw = np.asarray(trace.experts[start:stop]).astype(dtype)
        found.append(
            {
                "domain": trace.domains[domain],
                "words": pieces(tokenizer, trace.token_ids[start:stop].tolist()),
                "ids": trace.token_ids[start:stop].tolist(),
                "bytes": dtype.itemsize,
                "experts": base64.b64encode(raw.tobytes()).decode(),  # [tokens, L, K]
                "consistency": [round(float(value), 6) for value in consistent_L],
                "best": int(consistent_L.argmax()),
            }
        )
    return found
