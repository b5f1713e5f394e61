"""Which tokens end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpc_jax.data import chat
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted
from lpc_jax.runtime.policy import Policy

GENERATION_CONFIG = "generation_config.json"
_LARGEST_CONFIG = 1 << 20


def end_tokens(policy: Policy) -> tuple[int, ...]:
    """Ids of EOS, the generation config's ends and the template's end of an answer."""
    tokenizer, vocabulary = policy.tokenizer, policy.architecture.vocabulary
    named = [tokenizer.eos_token_id, *_of_config(policy.source.path)]
    if tokenizer.chat_template:
        named.append(chat.end_of_answer(tokenizer))
    ends = {n for n in named if type(n) is int and 0 <= n < vocabulary}
    if not ends:
        raise UserError(
            f"{policy.name} must have a token that ends an answer, got none. Set"
            " eos_token in its tokenizer_config.json."
        )
    return tuple(sorted(ends))


def _of_config(model: Path) -> list[Any]:
    file = untrusted.own_file(model, GENERATION_CONFIG) if model.is_dir() else None
    if file is None:
        return []
    try:
        config = untrusted.read_json(file, most=_LARGEST_CONFIG)
    except ValueError as error:
        raise UserError(
            f"{file}: broken JSON ({untrusted.shown(error)}). Download it again."
        ) from error
    ends = config.get("eos_token_id") if isinstance(config, dict) else None
    return ends if isinstance(ends, list) else [ends]
