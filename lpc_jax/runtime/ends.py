"""Which tokens end an answer."""

from __future__ import annotations

from lpc_jax.data import chat
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted
from lpc_jax.runtime.policy import Policy

GENERATION_CONFIG = "generation_config.json"
_LARGEST_CONFIG = 1 << 20


def end_tokens(policy: Policy) -> tuple[int, ...]:
    """Ids of EOS, the generation config's ends and the template's end of an answer."""
    tokenizer, folder = policy.tokenizer, policy.source.path
    named = [tokenizer.eos_token_id]
    file = untrusted.own_file(folder, GENERATION_CONFIG) if folder.is_dir() else None
    if file is not None:
        of_config = untrusted.read_object(file, most=_LARGEST_CONFIG)
        ends = of_config.get("eos_token_id")
        named += ends if isinstance(ends, list) else [ends]
    if tokenizer.chat_template:
        named.append(chat.end_of_answer(tokenizer))
    vocabulary = policy.architecture.vocabulary
    ids = {n for n in named if type(n) is int and 0 <= n < vocabulary}
    if not ids:
        raise UserError(
            f"{policy.name} must have a token that ends an answer, got none. Set"
            " eos_token in its tokenizer_config.json."
        )
    return tuple(sorted(ids))
