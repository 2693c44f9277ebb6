"""The corpus and the tokenizer of the tests of `data`."""

from tests.data.conftest import corpus, tokenizer, tokenizer_dir

__all__ = ["corpus", "tokenizer", "tokenizer_dir"]
