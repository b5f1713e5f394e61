"""Which tokens end an answer."""

from __future__ import annotations

from lpc_jax.data import chat
from lpc_jax.errors import UserError
from lpc_jax.runtime import fit
from lpc_jax.runtime.policy import Policy


def end_tokens(policy: Policy) -> tuple[int, ...]:
    """Ids of EOS, the generation config's ends and the template's end of an answer."""
    tokenizer = policy.tokenizer
    ends = fit.generation_ids(policy.source.path, "eos_token_id")
    named = [tokenizer.eos_token_id, *ends]
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
