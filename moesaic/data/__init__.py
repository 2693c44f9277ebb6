"""Text in, blocks of token ids out: sources, tokens on disk, domain mixtures, tokenizers."""

from moesaic.data.batches import calibration_batches, document_rows
from moesaic.data.mixture import MixtureStream, open_mixture
from moesaic.data.packing import Block, EndOfData
from moesaic.data.portions import domain_weights
from moesaic.data.sources import Data, Source, open_domains, open_source
from moesaic.data.tokens import TokenDomain, open_tokens

__all__ = [
    "Block",
    "Data",
    "EndOfData",
    "MixtureStream",
    "Source",
    "TokenDomain",
    "calibration_batches",
    "document_rows",
    "domain_weights",
    "open_domains",
    "open_mixture",
    "open_source",
    "open_tokens",
]
