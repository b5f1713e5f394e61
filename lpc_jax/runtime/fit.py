"""Whether a model fits what meets it: the ids that are written, the pairs' lengths."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpc_jax.data import packing
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.tokenizer import Tokenizer, written_by_template
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted
from lpc_jax.models.architectures import Architecture

GENERATION_CONFIG = "generation_config.json"
_LARGEST_CONFIG = 1 << 20
_SHOWN = 5
_LOG = logging.getLogger(__name__)


def _generation_config(path: Path) -> Path | None:
    """The file that transformers makes its generation config of."""
    names = (GENERATION_CONFIG, "config.json") if path.is_dir() else ()
    files = (untrusted.own_file(path, name) for name in names)
    return next(filter(None, files), None)


def generation_ids(path: Path, field: str) -> list[int]:
    """Ids in a field of a model folder's generation config, else of its config."""
    file = _generation_config(path)
    if file is None:
        return []
    value = untrusted.read_object(file, most=_LARGEST_CONFIG).get(field)
    ids = value if isinstance(value, list) else [value]
    return [token for token in ids if type(token) is int]


def require_rows(tokenizer: Tokenizer, architecture: Architecture, path: Path) -> None:
    """Refuses ids without a row of the embedding, where a look-up reads another's.

    Fewer tokens than rows are fine: many models pad their embedding.

    Raises:
        UserError: The tokenizer or the generation config has such ids.
    """
    rows, vocabulary = architecture.vocabulary, tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= rows)
    if beyond:
        of_template = written_by_template(tokenizer, [token for _, token in beyond])
        # Those of the template first: they are in every row.
        beyond.sort(key=lambda pair: pair[1] not in of_template)
        words = [
            f"{i} {untrusted.shown(token, most=40)}"
            f"{' of the chat template' * (token in of_template)}"
            for i, token in beyond[:_SHOWN]
        ]
        more = ", ..." * (len(beyond) > _SHOWN)
        raise UserError(
            f"{path}: the tokenizer has {len(vocabulary)} tokens, the embedding {rows}"
            f" rows: none for {', '.join(words)}{more}. Resize the embedding (in"
            " transformers, model.resize_token_embeddings), or set model.tokenizer to"
            " the model's own."
        )
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for token in generation_ids(path, field):
            if token >= rows:
                raise UserError(
                    f"{_generation_config(path)}: {field} must be below the embedding's"
                    f" {rows} rows, got {token}. Correct the file."
                )


def warn_of_length(
    pairs: Sequence[TokenizedPair], context: int, *, max_length: int = 0
) -> None:
    """Warns once where pairs, or ``data.max_length``, exceed the model's context."""
    lengths = packing.pair_lengths(pairs)
    longer = int(np.sum(lengths[:, 0] + lengths[:, 1:].max(axis=1) > context))
    counted = f"none of {len(pairs)} pairs is longer"
    if longer:
        counted = (
            f"{longer} of {len(pairs)} pairs are longer, and read positions that it was"
            " not made for"
        )
    if max_length > context:
        _warn(
            f"data.max_length {max_length} is above the model's context of {context}:"
            f" {counted}. Set data.max_length to {context} or less."
        )
    elif longer:
        _warn(f"the model's context is {context} tokens: {counted}.")


@functools.cache  # several policies score the same pairs
def _warn(message: str) -> None:
    _LOG.warning(message)
