"""A tokenizer of one's own: byte-level BPE trained on any data, loadable with AutoTokenizer.

Every text can be encoded and decodes to itself (the alphabet is the 256 bytes). Digits are split
into threes at most, as in current models. Training is deterministic: the same text gives the same
file. BOS is put in front by default, as LLaMA's tokenizers do; EOS is left to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.core.console import track
from moesaic.core.errors import UserError
from moesaic.core.files import output_directory
from moesaic.core.lineage import write_lineage
from moesaic.data.sources import Data, open_domains

BOS, EOS, PAD = "<s>", "<|endoftext|>", "<pad>"
_SPECIAL = (EOS, BOS, PAD)
_ALPHABET = 256
# Words with their leading space, numbers in groups of up to three, punctuation, and white space
# kept apart from the word that follows it. Written for this project.
_PATTERN = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(
    data: Data,
    *,
    out: Path | str,
    vocabulary: int = 4096,
    max_bytes: int | None = None,
    context: int = 1_000_000,
) -> Path:
    """Train a byte-level BPE of `vocabulary` tokens on `data` and save it as the directory `out`.

    Writes tokenizer.json, tokenizer_config.json and moesaic.json. Ids: 0 EOS, 1 BOS, 2 PAD, then
    the 256 bytes, then merges. `max_bytes` reads only so much text of each domain, so that a large
    one does not fill the vocabulary; `context` is the longest text that does not draw a warning.
    Raises UserError for a vocabulary below 259, faults in the data, and an `out` that is not empty.
    """
    smallest = _ALPHABET + len(_SPECIAL)
    if vocabulary < smallest:
        raise UserError(
            f"vocabulary={vocabulary} but the 256 bytes and {len(_SPECIAL)} special tokens need "
            f"{smallest}. Give {smallest} or more."
        )
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max_bytes={max_bytes} was given. Give 1 or more, or leave it out.")
    domains = open_domains(data)
    with output_directory(Path(out)) as partial:
        tokenizer = _wrap(_train(_texts(domains, max_bytes), vocabulary), context)
        tokenizer.save_pretrained(partial)
        write_lineage(
            partial,
            step="tokenizer",
            parent=None,
            config={"data": _named(data), "vocabulary": vocabulary, "max_bytes": max_bytes},
            vocabulary=len(tokenizer),
        )
    return Path(out)


def _train(texts: Iterator[str], vocabulary: int) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        # Sorted: the library hands over a list without a fixed order, and ids follow it.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def _wrap(tokenizer: Any, context: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _texts(domains: dict[str, Any], max_bytes: int | None) -> Iterator[str]:
    for name, source in domains.items():
        left = max_bytes
        for text in track(source.documents(), f"reading {name}"):
            if left is None:
                yield text
                continue
            data = text.encode("utf-8", "surrogatepass")[:left]
            left -= len(data)
            yield data.decode("utf-8", "ignore")
            if left <= 0:
                break


def _named(data: Data) -> Any:
    return {k: str(v) for k, v in data.items()} if isinstance(data, dict) else str(data)
