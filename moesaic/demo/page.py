"""The demo's report: results.json in, one HTML page out. Computes nothing, needs no model.

`results` is what `moesaic.demo.run.demo` returns and writes; its layout is described there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.report import plots
from moesaic.report.html import Fact, Page, Sample, Section
from moesaic.report.tables import Column, Table

Results = Mapping[str, Any]


def write(results: Results, path: Path) -> Path:
    """Write the report of a finished demo to `path`."""
    return page(results).write(path)


def page(results: Results) -> Page:
    """The report as a `Page`."""
    model = Path(results["dense"]["model"]).name
    made = Page(
        "From a dense LLaMA to a mixture of experts",
        subtitle=f"{model}, cut into {results['experts']} experts per layer of which each token "
        f"uses {results['top_k']}, then trained for {results['trained_tokens']:,} more tokens. "
        "Everything below was computed on this machine.",
        footer=_footer(results),
    )
    _summary(made.section("In short"), results)
    _construction(made.section("Cutting the dense model into experts"), results)
    _training(made.section("Training it on"), results)
    _load(made.section("Who does the work"), results)
    _samples(made.section("What they write"), results)
    _configs(made.section("How it was made"), results)
    return made


def loss_table(results: Results) -> Table:
    """Held-out loss per domain of the dense model and of every mixture, converted and trained."""
    domains = domains_of(results)
    columns = [
        Column("model", "Model"),
        Column("split", "Split"),
        Column("mean", "Mean", "fixed", best="min"),
        *(Column(f"in {name}", name, "fixed") for name in domains),
    ]
    return Table(
        columns,
        [
            {"model": row["model"], "split": row["split"], "mean": row["loss"]["mean"]}
            | {f"in {name}": row["loss"][name] for name in domains}
            for row in _loss_rows(results)
        ],
        caption="Held-out loss in nats a token (lower is better), on modules of the standard "
        "library that no training text comes from; every token counts the same, and the mean is "
        "over the domains.",
    )


def domains_of(results: Results) -> list[str]:
    """The domains in the order they were measured."""
    return [name for name in results["dense"]["loss"] if name != "mean"]


def best_method(results: Results) -> Mapping[str, Any]:
    """The method that was trained on."""
    return next(m for m in results["methods"] if m["loss_trained"] is not None)


def _loss_rows(results: Results) -> list[dict[str, Any]]:
    rows = [{"model": "dense", "split": None, "loss": results["dense"]["loss"]}]
    for method in results["methods"]:
        loss = method["domains"]["converted"]
        rows.append({"model": "MoE, just converted", "split": method["split"], "loss": loss})
    best = best_method(results)
    loss = best["domains"]["trained"]
    return [*rows, {"model": "MoE, trained", "split": best["split"], "loss": loss}]


def _summary(section: Section, results: Results) -> None:
    best, dense = best_method(results), results["dense"]["loss"]["mean"]
    gap, left = best["loss_converted"] - dense, best["loss_trained"] - dense
    sizes = results["parameters"]
    section.facts(
        [
            Fact("Dense model", f"{dense:.3f}", "held-out loss, nats a token"),
            Fact(
                f"MoE, just cut ({best['split']})", f"{best['loss_converted']:.3f}", f"{gap:+.3f}"
            ),
            Fact("MoE, trained", f"{best['loss_trained']:.3f}", f"{left:+.3f} against dense"),
            Fact(
                "Active parameters",
                f"{sizes['active'] / sizes['total']:.0%}",
                f"{_millions(sizes['active'])} of {_millions(sizes['total'])} per token",
            ),
            Fact("Time", f"{results['seconds']:.0f} s", results["machine"]),
        ]
    )
    section.table(loss_table(results))
    section.figure(losses_figure(results), caption=_recovered(gap, left, results))


def _recovered(gap: float, left: float, results: Results) -> str:
    text = "Mean held-out loss of each way to cut the model, before and after training."
    if gap > 0:
        share = (gap - left) / gap
        text += (
            f" Training on {results['trained_tokens']:,} tokens won back {share:.0%} of what "
            "cutting lost."
        )
    return text


def losses_figure(results: Results) -> Any:
    """Mean loss of every model as dots on one scale."""
    rows: dict[str, dict[str, float | None]] = {
        "dense": {"dense": results["dense"]["loss"]["mean"]}
    }
    for method in results["methods"]:
        rows[f"{method['split']} split"] = {
            "just converted": method["loss_converted"],
            "trained": method["loss_trained"],
        }
    return plots.dots(rows, x_label="mean held-out loss, nats a token", better="left is better")


def _construction(section: Section, results: Results) -> None:
    section.text(
        "A LLaMA feed-forward layer is a row of neurons. A split deals them out to experts, and "
        "a small router then picks the experts each token uses. Nothing is lost by that alone: "
        "with all experts on and the router's scores switched off, the mixture computes what the "
        "dense model computes. That is checked here for every split."
    )
    columns = [
        Column("split", "Split"),
        Column("why", "How neurons are grouped"),
        Column("exact", "Every neuron once"),
        Column(
            "dense_check",
            "Difference to dense",
            "scientific",
            1,
            note="largest difference of any logit from the dense model's, all experts on, float32.",
        ),
        Column("loss_converted", "Loss converted", "fixed", best="min"),
        Column("loss_trained", "Loss trained", "fixed"),
        Column("seconds", "Seconds", "fixed", 1, note="time to split and convert."),
    ]
    section.table(Table(columns, results["methods"]))


def _training(section: Section, results: Results) -> None:
    best = best_method(results)
    section.text(
        f"The mixture that lost least ({best['split']}) is trained on: only part of its "
        "parameters work on each token now, and its router begins from random weights or close "
        "to it. The balance loss keeps the router from sending every token to the same few experts."
    )
    section.figure(
        training_figure(results),
        caption="Loss while training, with noise on the router for the training text and without "
        "for the held-out text. A faint line is each step, the strong one a running mean.",
    )


def training_figure(results: Results) -> Any:
    """Loss over tokens: the training text's, the held-out text's, and the dense model's."""
    training = results["training"]
    every = [(line["tokens"], line["loss"]) for line in training["log"]]
    held_out = [(line["tokens"], line["loss"]["mean"]) for line in training["held_out"]]
    return plots.curves(
        {"training text": every, "held-out text": held_out},
        x_label="tokens trained on",
        y_label="loss, nats a token",
        levels={"dense model, held-out": results["dense"]["loss"]["mean"]},
        smooth=max(1, len(every) // 20),
    )


def _load(section: Section, results: Results) -> None:
    load = results["load"]
    section.text(
        "The share of tokens that each expert receives, layer by layer and domain by domain, on "
        "held-out text. 1 is an even share; columns that differ between the panels are experts "
        "that a kind of text prefers."
    )
    for stage, title in (("converted", "Before training."), ("trained", "After training.")):
        if stage in load:
            section.figure(load_figure(results, stage), caption=f"{title} {_spread(load[stage])}")


def load_figure(results: Results, stage: str) -> Any:
    """The load map of one stage, "converted" or "trained"."""
    return plots.load_map(results["load"][stage])


def _spread(load: Mapping[str, Sequence[Sequence[float]]]) -> str:
    rows = [row for table in load.values() for row in table]
    busiest = max(max(row) * len(row) for row in rows)
    idle = sum(share * len(row) < 0.1 for row in rows for share in row)
    text = f"The busiest expert of any layer gets {busiest:.1f} times an even share"
    return f"{text}; {idle} of {sum(map(len, rows))} get less than a tenth of one."


def _samples(section: Section, results: Results) -> None:
    section.text(
        "The same beginnings, continued by each model with the same settings and seed. These are "
        "very small models: look at the form of the text, not at what it says."
    )
    section.samples([Sample(s["prompt"], s["texts"]) for s in results["samples"]])


def _configs(section: Section, results: Results) -> None:
    section.text(
        "The exact settings. The checkpoint is an ordinary Hugging Face directory; moesaic.json "
        "inside it records the same, with the versions of everything involved."
    )
    for title, text in results["configs"].items():
        section.code(text, title=title)


def _footer(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"Made by moesaic demo in {results['seconds']:.0f} s with {versions}."


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
