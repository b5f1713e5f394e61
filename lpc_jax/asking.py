"""A policy with its verbs: score pairs, answer prompts, save a folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lpc_jax import loss_table
from lpc_jax.data import chat, examples
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.pairs import Pairs
from lpc_jax.errors import UserError
from lpc_jax.export import folder as folders
from lpc_jax.generation import like as judgements
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import policy as policies
from lpc_jax.runtime import reading, steering

Z = Literal["mean", "sample", "argmax"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of pairs, in their order."""

    logp: Float[np.ndarray, "B 2"]  # summed over chosen and rejected tokens, nats
    # By the run's loss, over a reference if one was given; of no run, logp a token.
    rewards: Float[np.ndarray, "B 2"]
    prior: Float[np.ndarray, "B C"] | None  # over codes, from the prompt; or None
    posterior: Float[np.ndarray, "B C"] | None  # from the judged pair; or None

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer has the larger reward."""
        return float(np.mean(self.rewards[:, 0] > self.rewards[:, 1]))


class Policy(policies.Policy):
    """``runtime.policy.Policy`` with its verbs."""

    def score(
        self,
        pairs: Pairs,
        *,
        reference: policies.Policy | None = None,
        z: Z | None = None,
        code: int | None = None,
        mix: Mapping[int, float] | None = None,
        like: Pairs | None = None,
        seed: int = 0,
    ) -> Scores:
        """Log-probabilities, rewards, and prior and posterior over codes of pairs.

        Args:
            reference: Its decoder is what log-ratios compare with, as in ``train``.
            z: How z comes from the prior; None: as in the run's evaluation.
            code: Puts all weight on this code.
            mix: Weights by code, summing to 1.
            like: Judged pairs of one reader, whose posterior mix is used.

        Raises:
            UserError: No such code, a mix that is none, a reference of another
                vocabulary, or numbers that are not finite.
        """
        policy = self.merged()
        chosen = _steering(policy, z, code, mix, like)
        logp = reading.score(policy, pairs.tokens, steering=chosen, seed=seed)
        reward = loss_table.reward(None, self.run and self.run.loss)
        start_logp = None
        if reference is not None and reward.over_reference:
            self.require_vocabulary(reference, "Choose one of the same family.")
            start = reference.plain()
            if start.compute.base != "compute":
                start = start.merged()  # rounded as ``policy`` is
            start_logp = reading.score(start, pairs.tokens, steering=None)
        reward = dataclasses.replace(reward, over_reference=start_logp is not None)
        rewards = reward.of(logp, pair_data.lengths(pairs.tokens), start_logp)
        if policy.latent is None:
            return Scores(logp, rewards, None, None)
        beliefs = reading.believe(policy, pairs.tokens)
        both = np.stack([beliefs.prior, beliefs.posterior])
        return Scores(logp, rewards, *np.asarray(jax.nn.softmax(both, axis=-1)))

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        z: Z | None = None,
        code: int | None = None,
        mix: Mapping[int, float] | None = None,
        like: Pairs | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[str]:
        """An answer to each prompt, z chosen as in ``score``.

        Args:
            prompts: User messages, or whole conversations.
            temperature: 0 takes the likeliest token.
            stop: An answer ends before the first of these.

        Raises:
            UserError: As ``score``, or a prompt that leaves no room for an answer.
        """
        policy = self.merged()
        chosen = _steering(policy, z, code, mix, like) or Steering("mean")
        ids = []
        for prompt in [prompts] if isinstance(prompts, str) else prompts:
            if not isinstance(prompt, str):
                prompt = [dict(message) for message in prompt]
            messages = examples.parse_prompt({"prompt": prompt}, origin="prompts")
            ids.append(chat.encode_prompt(messages, policy.tokenizer))
        completions = Generator(policy, batch=min(len(ids), 16) or 1).generate(
            ids,
            sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature),
            steering=chosen,
            stop=stop,
            seed=seed,
        )
        return [completion.text for completion in completions]

    def save(
        self, folder: str | Path, *, dtype: str = "float32", plain: bool = False
    ) -> Path:
        """Writes a Hugging Face folder, new or empty, with the codes unless ``plain``.

        ``dtype`` is the decoder's: ``float32``, ``bfloat16`` or ``float16``.
        """
        output, shard_bytes = Path(folder), folders.SHARD_BYTES
        folders.require_output(output)
        merged = self.merged(jnp.dtype("float32"))
        folders.write(merged, output, dtype=dtype, shard_bytes=shard_bytes, plain=plain)
        return output


def _steering(
    policy: policies.Policy,
    z: Z | None,
    code: int | None,
    mix: Mapping[int, float] | None,
    like: Pairs | None,
) -> Steering | None:
    """How z is chosen, by at most one of the four; None without codes."""
    ways = {"z": z, "code": code, "mix": mix, "like": like}
    several = [name for name, value in ways.items() if value is not None]
    if len(several) > 1:
        raise UserError(
            f"z is chosen in one way, got {' and '.join(several)}. Leave out all but"
            " one."
        )
    if like is not None:
        count = policy.latent and policy.latent.num_codes
        steering.require_codes(count, "like", policy.name)
        return judgements.of_pairs(policy, like.tokens, "posterior")
    code_text = None if code is None else str(code)
    mix_text = None if mix is None else ",".join(f"{c}:{w}" for c, w in mix.items())
    return steering.choose(z, code_text, mix_text, policy.latent, policy.name)


def to_ask(policy: policies.Policy) -> Policy:
    """The same policy with its verbs."""
    return Policy(**vars(policy))
