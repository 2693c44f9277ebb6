"""Neuron importance: how much the loss on some text depends on each neuron of a dense model.

A hook reads, at every token, a neuron's value v and the gradient of the loss with respect to it.
The score of a token is the gradient (`feature_grad`) or v times it (`feature_change`, the
first-order change of the loss when the neuron is removed; LLaMA-MoE, arXiv 2406.16554, equation 8).
The kernel (plain x, l1 |x|, l2 x*x) is applied to every token's score (`sample`) or to their sum
(`total`).

Notation: B rows, C tokens a row, L layers, F neurons, V vocabulary, K clusters of text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.construct.activations import text_sample
from moesaic.construct.balanced_kmeans import balanced_kmeans
from moesaic.construct.points import scale_to_unit
from moesaic.construct.scored import ScoredMethod
from moesaic.core.console import note, track
from moesaic.core.errors import UserError

__all__ = ["Scoring", "cluster_scores", "load_scores", "neuron_importance", "similar_rows"]

_COLUMNS = 1024  # of the word counts that rows of text are compared by


@dataclass(frozen=True)
class Scoring:
    """What is scored, and how scores of tokens are put together; see the module's docstring."""

    hook: Literal["up", "gate"] = "up"
    """`up`: the input of down_proj; `gate`: the output of gate_proj, before the activation."""
    kind: Literal["feature_change", "feature_grad"] = "feature_change"
    level: Literal["sample", "total"] = "sample"
    kernel: Literal["plain", "l1", "l2"] = "l1"
    counting: Literal["token", "original"] = "token"
    """`token`: gradients of the loss summed over tokens, divided by the number of predicted tokens;
    does not depend on the size of batches. `original`: LLaMA-MoE's gradients of each batch's mean
    loss, divided by the sum over batches of (tokens - 1); right up to a factor for batches of 1.
    """


def neuron_importance(
    model: Any, batches: Iterable[torch.Tensor], scoring: Scoring | None = None
) -> NDArray[np.float32]:
    """Score every neuron of a dense LLaMA on batches of token ids [B, C] without padding: [L, F].

    The model's weights are neither changed nor given gradients. Raises UserError when a row has
    fewer than two tokens, there is no batch, or a score is not finite.
    """
    scoring = scoring or Scoring()
    layers = model.get_decoder().layers
    width = layers[0].mlp.down_proj.in_features
    device = model.device
    totals_LF = torch.zeros(len(layers), width, dtype=torch.float64, device=device)
    handles = []
    for index, layer in enumerate(layers):
        watch = partial(_watch, totals_F=totals_LF[index], scoring=scoring)
        if scoring.hook == "up":
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(partial(_before, watch)))
        else:
            handles.append(layer.mlp.gate_proj.register_forward_hook(partial(_after, watch)))
    needed = [weight for weight in model.parameters() if weight.requires_grad]
    count = 0
    try:
        model.requires_grad_(False)
        for ids_BC in batches:
            rows, context = ids_BC.shape
            if context < 2:
                raise UserError("Importance needs rows of at least 2 tokens. Raise context.")
            predicted = rows * (context - 1)
            vectors = model.get_input_embeddings()(ids_BC.to(device))
            logits = model(inputs_embeds=vectors.detach().requires_grad_(), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(),
                ids_BC[:, 1:].flatten().to(device),
                reduction="sum" if scoring.counting == "token" else "mean",
            )
            loss.backward()
            count += predicted if scoring.counting == "token" else rows * context - 1
    finally:
        for handle in handles:
            handle.remove()
        for weight in needed:
            weight.requires_grad_(True)
    if not count:
        raise UserError("There is no text to score neurons on. Give more data or more tokens.")
    if scoring.level == "total":
        totals_LF = _kernel(totals_LF, scoring.kernel)
    scores_LF = (totals_LF / count).cpu()
    if not bool(torch.isfinite(scores_LF).all()):
        raise UserError(
            "Importance scores are not finite. Check the model's loss on this text; "
            "half precision may overflow."
        )
    return np.asarray(scores_LF.numpy(), np.float32)


def cluster_scores(
    model: Path, data: Any, method: ScoredMethod, count: int, *, seed: int
) -> NDArray[np.float32]:
    """Score every neuron once per cluster of text, with a method's settings: [L, count, F].

    Clusters are groups of similar rows of equal number (`similar_rows`), or the first domains
    of the data. Raises UserError when there is less text than asked for by the number of clusters.
    """
    from moesaic.models.load import load

    context, batch = method.context, method.batch
    if method.clusters == "domains":
        groups = _domain_rows(model, data, method, count)
    else:
        ids_NC = text_sample(model, data, tokens=method.tokens, context=context)
        each = len(ids_NC) // count
        if not each:
            raise UserError(
                f"The data holds {len(ids_NC)} rows of {context} tokens, too few for {count} "
                "clusters. Give more text, more tokens, or a shorter context."
            )
        ids_NC = ids_NC[: each * count]
        labels_N = similar_rows(ids_NC.numpy(), count, seed=seed)
        groups = [ids_NC[torch.from_numpy(labels_N == label)] for label in range(count)]
    note(
        f"scoring neurons on {count} clusters of text, "
        f"{min(map(len, groups))} to {max(map(len, groups))} rows of {context} tokens each"
    )
    network: Any = load(model)
    if torch.cuda.is_available():
        network = network.to("cuda")
    elif network.dtype == torch.float16:
        network = network.float()
    scoring = Scoring(method.hook, method.kind, method.level, method.kernel, method.counting)
    scores = [
        neuron_importance(network, ids_NC.split(batch), scoring)
        for ids_NC in track(groups, "scoring neurons")
    ]
    return np.stack(scores, axis=1)


def similar_rows(ids_NC: NDArray[np.int64], count: int, *, seed: int) -> NDArray[np.int64]:
    """Divide rows of token ids into `count` clusters of equal size by the tokens they use: [N].

    Rows are compared by counts of their tokens, weighted by rarity (tf-idf) and folded into 1024
    columns of random sign; the clusters come from balanced k-means.
    """
    rng = np.random.default_rng(seed)
    highest = int(ids_NC.max()) + 1
    column_V = rng.integers(_COLUMNS, size=highest)
    sign_V = rng.choice(np.array([-1, 1], np.float32), size=highest)
    rows_with_V = np.zeros(highest, np.int64)
    counted = []
    for row_C in ids_NC:
        tokens, counts = np.unique(row_C, return_counts=True)
        rows_with_V[tokens] += 1
        counted.append((tokens, counts))
    rarity_V = np.log((1 + len(ids_NC)) / (1 + rows_with_V)).astype(np.float32)
    vectors_ND = np.zeros((len(ids_NC), _COLUMNS), np.float32)
    for vector_D, (tokens, counts) in zip(vectors_ND, counted, strict=True):
        weights = (1 + np.log(counts)).astype(np.float32) * rarity_V[tokens] * sign_V[tokens]
        np.add.at(vector_D, column_V[tokens], weights)
    scale_to_unit(vectors_ND)
    return balanced_kmeans(vectors_ND, count, seed=seed).labels


def load_scores(path: Path, *, layers: int, width: int, hook: str) -> NDArray[np.float32]:
    """Read scores made earlier: float32 [L, K, F].

    `path` is a scores.safetensors, a directory that holds one, a folder of LLaMA-MoE's with one
    sub-folder per cluster, or LLaMA-MoE-v2's importance_scores.pt. Raises
    UserError when it is none of these or made for another model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from moesaic.construct.legacy import read_score_folders
    from moesaic.construct.legacy_v2 import is_original, read_scores

    file = path / "scores.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.exists():
        scores = read_score_folders(path, layers=layers, hook=hook)
    elif is_original(file):
        scores = read_scores(file)
    else:
        try:
            scores = load_file(file)["scores"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{file} is not readable as scores ({error}). Give the scores.safetensors that "
                "`moesaic split` wrote."
            ) from error
    if scores.ndim != 3 or scores.shape[0] != layers or scores.shape[2] != width:
        raise UserError(
            f"{path} holds scores of shape {list(scores.shape)}, but the model has {layers} layers "
            f"of {width} neurons. Give scores [layers, clusters, neurons] of this model."
        )
    if not np.isfinite(scores).all():
        raise UserError(f"{path} holds scores that are not finite. Score the neurons again.")
    return scores.astype(np.float32)


def _domain_rows(model: Path, data: Any, method: ScoredMethod, count: int) -> list[torch.Tensor]:
    from moesaic.data import open_domains

    domains = open_domains(data)
    if len(domains) < count:
        raise UserError(
            f"clusters=domains needs {count} domains, but the data has {len(domains)}: "
            f"{', '.join(domains)}. Give more domains, or use clusters=text."
        )
    share = method.tokens // count
    return [
        text_sample(model, {name: source}, tokens=share, context=method.context)
        for name, source in list(domains.items())[:count]
    ]


def _before(watch: Any, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    watch(inputs[0])


def _after(watch: Any, module: Any, inputs: Any, output: torch.Tensor) -> None:
    watch(output)


def _watch(values_BCF: torch.Tensor, *, totals_F: torch.Tensor, scoring: Scoring) -> None:
    """Have the scores of these values added to the totals when their gradient is known."""
    kept = values_BCF.detach() if scoring.kind == "feature_change" else None

    def add(gradient_BCF: torch.Tensor) -> None:
        score_BCF = gradient_BCF.float() if kept is None else gradient_BCF.float() * kept.float()
        if scoring.level == "sample":
            score_BCF = _kernel(score_BCF, scoring.kernel)
        totals_F.add_(score_BCF.flatten(0, -2).sum(0).double())

    values_BCF.register_hook(add)


def _kernel(scores: torch.Tensor, kernel: Literal["plain", "l1", "l2"]) -> torch.Tensor:
    if kernel == "plain":
        return scores
    return scores.abs() if kernel == "l1" else scores.square()
