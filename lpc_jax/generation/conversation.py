"""A conversation in the terminal, with commands that choose z."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from lpc_jax import config as cfg
from lpc_jax.data import chat
from lpc_jax.data.examples import Message
from lpc_jax.errors import UserError
from lpc_jax.generation import answers, like
from lpc_jax.generation.answering import Completion, Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import steering

# Codes shown of a prior.
_SHOWN = 8
_NO_PROMPT = "{} needs a prompt, got none yet. Ask something."
HELP = """\
/code 7            answer under this code alone
/mix 3:0.7,12:0.3  answer under a mix of codes
/like FILE         answer as the reader would want it who judged these pairs
/mean  /sample  /argmax   choose z from the prior again
/codes             the prior's mix for the last prompt, and z of the last answer
/again             another answer to the last prompt
/reset             forget the conversation
/seed 5            of sampling from here on
/help  /quit"""


@dataclasses.dataclass
class Conversation:
    """A chat with one policy; commands change its fields."""

    generator: Generator
    sampling: Sampling
    steering: Steering
    stop: tuple[str, ...]
    seed: int  # of the next answer; each takes the one after
    first: list[Message]  # the system message, or none
    console: Console
    history: list[Message] = dataclasses.field(default_factory=list)
    last: Completion | None = None

    def talk(self, read: Callable[[], str]) -> None:
        """Answers lines until ``read`` raises ``EOFError`` or Ctrl-C interrupts it."""
        while True:
            try:
                line = read().strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self._answer([*self.history, {"role": "user", "content": line}])
            except UserError as error:
                self._print(f"error: {error}")

    def _print(self, text: str, end: str = "\n") -> None:
        self.console.print(text, end=end, markup=False, highlight=False, soft_wrap=True)

    def _answer(self, messages: list[Message]) -> None:
        """Answers and keeps the turn; after an error the history is as before."""
        tokenizer = self.generator.policy.tokenizer
        ids = chat.encode_prompt([*self.first, *messages], tokenizer)
        text = ""
        growing = self.generator.stream(
            ids,
            sampling=self.sampling,
            steering=self.steering,
            stop=self.stop,
            seed=self.seed,
        )
        try:
            for completion in growing:
                self._print(completion.text[len(text) :], end="")
                text, self.last = completion.text, completion
        except KeyboardInterrupt:
            self._print(" [interrupted]", end="")
        self.console.print()
        if self.last is not None and self.last.reason in ("length", "context"):
            self._print(f"[cut: {self.last.reason}]")
        self.seed += 1
        self.history = [*messages, {"role": "assistant", "content": text}]

    def _obey(self, line: str) -> None:
        name, _, value = line.removeprefix("/").partition(" ")
        value = value.strip()
        match name:
            case "help":
                self._print(HELP)
            case "reset":
                self.history, self.last = [], None
                self._print("the conversation is forgotten")
            case "again":
                if not self.history:
                    raise UserError(_NO_PROMPT.format("/again"))
                self._answer(self.history[:-1])
            case "seed":
                if not value.isdecimal():
                    raise UserError(f"/seed must be a whole number, got {value!r}.")
                self.seed = int(value)
            case "codes":
                self._latent(line)
                self._show_codes()
            case "code":
                self._steer(steering.code(value, self._latent(line).num_codes))
            case "mix":
                self._steer(steering.mix(value, self._latent(line).num_codes))
            case "mean" | "sample" | "argmax":
                self._steer(steering.of_settings(self._latent(line), name))
            case "like":
                policy, latent = self.generator.policy, self._latent(line)
                z_of = like.read(value, like.BY[0], latent, policy.name)
                self._steer(z_of(policy))
            case _:
                raise UserError(f"/{name} is no command. /help lists them.")

    def _latent(self, line: str) -> cfg.Latent:
        policy = self.generator.policy
        codes = None if policy.latent is None else policy.latent.num_codes
        steering.require_codes(codes, line, policy.name)
        assert policy.latent is not None
        return policy.latent

    def _steer(self, chosen: Steering) -> None:
        self.steering = chosen
        self._print(f"z from here on: {chosen.words()}")

    def _show_codes(self) -> None:
        if self.last is None:
            raise UserError(_NO_PROMPT.format("/codes"))
        prior, weights = self.last.prior, self.last.weights
        assert prior is not None
        assert weights is not None
        table = Table("code", "prior", "in z")
        for code in answers.largest(prior, _SHOWN):
            table.add_row(code, f"{prior[int(code)]:.3f}", f"{weights[int(code)]:.3f}")
        self.console.print(table)
        in_z = answers.largest(weights, _SHOWN)
        shares = ", ".join(f"{code}: {share:.3f}" for code, share in in_z.items())
        self._print(f"z of the last answer: {shares}")
