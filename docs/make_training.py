"""Write docs/training.md: `python docs/make_training.py`. The table of keys comes from the config.

A test compares the file with this script's output, so it cannot fall behind.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from moesaic.recipes import recipes, summary
from moesaic.training.config import TrainConfig

PAGE = Path(__file__).parent / "training.md"
HEAD = """\
# Training

<!-- Made by docs/make_training.py: change that and moesaic/training/config.py, then run make docs. -->

`moesaic train FILE.yaml -o OUT --model DIR` continues the pre-training of a model, or trains one
that `moesaic init` made. In Python: `moesaic.train("file.yaml", model="runs/moe",
out="runs/cpt")`. `--set optimizer.lr=1e-4` overrides a key, `--dry-run` checks everything and
prints the resolved config, the sizes, and how often each domain will be read.

`OUT` becomes a Hugging Face directory with the model, its tokenizer, `moesaic.json` (lineage) and
`train.yaml` (the resolved config). Beside them: `log.jsonl`, one JSON object a line, and
`checkpoints/`.

## What is promised

- **Interruptions cost nothing.** The same command goes on from the newest saved state: weights,
  optimizer, schedule, random generators, the position in every domain, the domain weights and the
  log line that was under way. On a CPU in fp32 the losses are those of an uninterrupted run bit
  for bit. A state is whole or absent, also after `kill -9` in the middle of saving. Only
  safetensors and JSON are written. A changed setting that would change the losses is refused;
  `--no-resume` starts again.
- **The balance loss does not depend on accumulation.** Cross-entropy is weighted by tokens over
  the whole update; the balance loss is averaged over its forward passes. A setting that would have
  no effect on the model is an error.
- **Domains do not end the run.** A domain that has been read to its end is shuffled anew and read
  again; `epochs` in the log says how often. `data.max_epochs` makes it an error instead.
- **The schedule** is linear warm-up, then a cosine cut off at the floor; past the end it stays
  there.
- **A loss or gradient that is not finite stops the run**, naming the update; states saved before
  it are sound.

## Conversations

With `data.conversations: true` the data are .jsonl files (or datasets) of conversations, in either
form:

```
{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
```

The tokenizer's chat template writes them out, or Llama-3's where the tokenizer has none but the
tokens for it. Only what the assistant says is learned, with the token that ends its turn, and only
that is scored in `data.valid`. A sequence is whole conversations, none of which sees another; a
model that lets them is refused (Jamba, OpenMoE, Yuan 2.0). What is left of a sequence is filled
with the beginning of the next conversation, of which nothing is learned. Conversations longer than
`data.block_size` are left out, and a line says how many.

## What balances a model

A mixture that nothing balances soon sends its tokens to a few experts. One line at the start says
what is done about it, or why nothing is; `--dry-run` says it too.

| model | loss | bias |
| --- | --- | --- |
| its class computes a balance loss (Mixtral, Qwen-MoE, OLMoE, LLaMA-MoE, JetMoE, ...) | the model's own | |
| its class computes none (DeepSeek-V2, HunYuan, Cohere2-MoE, ...) | on observed scores, coefficient 1e-3 | |
| ... and its routers have a correction bias (DeepSeek-V3, GLM-4-MoE, Dots, Kimi-Linear, ...) | on observed scores, coefficient 1e-4 | moves by 1e-3 |
| both a loss and a bias (Ernie 4.5, MiniMax-M2) | the model's own | moves by 1e-3 |

- **On observed scores**: the routers are listened to, and for each sequence and layer of E experts
  the loss is E x sum of (share of the choices an expert got) x (its mean score), with the router's
  own scores (softmax, sigmoid) brought to sum 1; 1 is even. Layers are summed, sequences averaged
  (DeepSeek-V3, section 2.1.2). How a sequence meets others in a forward pass does not matter.
  `balance.coefficient` weighs it; a config that names one (`aux_loss_alpha`) sets the default. One
  pass over 16 tokens at the start tells the score function.
- **The bias** is added to the scores when experts are chosen and nowhere else. After each update
  it moves by `balance.bias_rate`, up where an expert got less than the mean of its layer in all
  passes of the update, else down. It is kept and saved in float32 whatever the weights are.

Set `balance.coefficient: 0` and `balance.bias_rate: 0` to train without.

## Distillation

A mixture made of a dense model can go on learning from that model. With

```yaml
distill:
  model: runs/dense
  weight: 0.5
```

both read the same sequences, and the loss of a token is
(1 - weight) x cross-entropy + weight x KL(teacher || student), plus the balance loss. The teacher
tells how likely every token of the vocabulary is, the text only which one came. At 4 of 8 experts,
held-out loss after 16 M tokens is 2.878 with a weight of 0.6, 2.910 without a teacher, and 2.885 of
the dense model trained as long (three seeds, each at the best of its rates;
benchmarks/construction.md, "Distillation").

- Any causal language model with the same vocabulary teaches. Another number of logits, or another
  tokenizer in its directory, is refused before anything is written; `--dry-run` refuses it too.
- The teacher is never trained and never saved. `train.yaml` and the lineage name its directory,
  and a run goes on with the same `distill` section only.
- Unless the run is in fp32, the teacher is a bf16 model. In `mixed`, the student's weights are fp32;
  the teacher's take half of that. Products would be in bf16 there anyway, and norms and softmax
  still compute in fp32; what is rounded more is embeddings, weights of norms and the sums between
  layers. On the benchmarks' dense model this moves its answers by 2.6e-4 nats (KL from fp32),
  fp32 weights under autocast by 1.6e-4 (8,192 held-out tokens, on a CPU).
- `loss` in the log and all held-out losses remain cross-entropy, so that runs with and without a
  teacher compare; `distill_loss` is the KL, unweighted. At weight 1 cross-entropy is only reported.
- It costs the teacher's weights, its logits of one forward pass and a gradient as large in memory,
  and its forward pass in time (a fifth of the speed in that benchmark); `moesaic plan` counts them. Of
  conversations, answers alone are distilled.

## What the log says

| field of `log.jsonl` | meaning |
| --- | --- |
| `loss` | mean cross-entropy of the updates since the last line, nats a token, without the balance loss |
| `distill_loss` | with a teacher: mean KL(teacher \\|\\| student), nats a token, whatever its weight |
| `balance_loss` | mean balance loss as it enters the gradient |
| `grad_norm`, `lr` | mean norm before clipping; rate of the last update |
| `tokens_per_second` | of this process, while training: evaluating and saving are left out |
| `mfu` | 6 x active parameters x tokens/s over the device's bf16 peak, a teacher's work not counted; null on a CPU |
| `load_cv`, `load_max` | spread of routed rows over experts: deviation over mean, averaged over layers; the fullest expert over the mean (1 is even), worst layer |
| `importance_cv`, `importance_max` | the same for sums of routing weights |
| `weights`, `epochs` | share of the blocks each domain gets now; how often each has been read |

Lines with `"event": "evaluate"` hold the held-out loss of each domain and its mean.

With a section `routing`, `"event": "routing"` tells of every update how its tokens really went:
`entropy` of the load over its maximum (mean of the layers, 1 is even), `load_cv`, `load_max`,
experts that got nothing (`dead`, worst layer), and the same by layer. Every `routing.every`
updates `"event": "routing_sample"` gives segment routing best performance (`srp`, `rho`) and
cache hit rates on `routing.sequences` of its sequences. The course of the run does not change; a
compiled model cannot be listened to.

## Recipes that ship

"""  # noqa: E501 - table rows


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, "| recipe | |\n| --- | --- |\n"]
    for name, path in recipes("train").items():
        parts.append(f"| `{name}` | {summary(path)} |\n")
    parts.append("\n## Keys\n\n`moesaic recipe show cpt-tiny` prints a whole file.\n\n")
    parts.append("| key | type | default | |\n| --- | --- | --- | --- |\n")
    for name, kind, default, text in rows(TrainConfig, ""):
        parts.append(f"| `{name}` | {kind} | {default} | {text} |\n")
    return "".join(parts)


def rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, type, default and sentence of every field, sections opened."""
    for name, field in model.model_fields.items():
        below = [t for t in options(field.annotation) if is_section(t)]
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        if below:
            if type(None) in options(field.annotation):
                yield prefix + name, "section", "none", text
            yield from rows(below[0], f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else shown(field.default)
            yield prefix + name, " or ".join(type_names(field.annotation)), default, text


def options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def type_names(annotation: Any) -> Iterator[str]:
    for option in options(annotation):
        if typing.get_origin(option) is Literal:
            yield from (f"`{value}`" for value in typing.get_args(option))
        elif typing.get_origin(option) is not None:
            several = typing.get_args(option)[-1] is ...
            kinds = {dict: "mapping", tuple: "list" if several else "pair", list: "list"}
            yield kinds[typing.get_origin(option)]
        elif option is not type(None):
            name = option.__name__
            yield {"str": "text", "float": "number", "int": "integer", "Path": "path"}.get(
                name, name
            )


def shown(default: Any) -> str:
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
