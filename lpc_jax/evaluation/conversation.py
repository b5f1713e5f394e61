"""A conversation in the terminal, and the hand on its codes.

Knows nothing of how an answer is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from lpc_jax.data import chat
from lpc_jax.data.examples import Message
from lpc_jax.errors import UserError
from lpc_jax.evaluation import answers, like, steering
from lpc_jax.evaluation.generate import Completion, Generator, Ids, Sampling
from lpc_jax.evaluation.steering import Steering

# Codes shown of a prior.
_SHOWN = 8

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
    """A chat with one system.

    Attributes:
        generator: Writes the answers.
        sampling: How tokens are chosen.
        steering: How z is chosen; commands change it.
        stop: Strings that end an answer.
        seed: Of the next answer; each takes the one after.
        first: A message of the system, or none.
        say: Where to print.
    """

    generator: Generator
    sampling: Sampling
    steering: Steering
    stop: tuple[str, ...]
    seed: int
    first: list[Message]
    say: Console
    history: list[Message] = dataclasses.field(default_factory=list)
    last: Completion | None = None

    def talk(self, read: Callable[[], str]) -> None:
        """Answers lines until there are no more.

        Args:
            read: The next line; ``EOFError`` or Ctrl-C where there is none.
        """
        while True:
            try:
                line = read().strip()
            except (EOFError, KeyboardInterrupt):
                self.say.print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self._ask([*self.history, {"role": "user", "content": line}])
            except UserError as error:
                self._print(f"error: {error}")

    def _print(self, text: str) -> None:
        self.say.print(text, markup=False, highlight=False, soft_wrap=True)

    def _ask(self, messages: list[Message]) -> None:
        """Answers; the turn is kept only where there was an answer."""
        tokenizer = self.generator.system.tokenizer
        ids = chat.encode_prompt([*self.first, *messages], tokenizer)
        said = ""
        for completion in self._stream(ids):
            self.say.print(
                completion.text[len(said) :],
                end="",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            said, self.last = completion.text, completion
        self.say.print()
        if self.last is not None and self.last.reason in ("length", "context"):
            self._print(f"[cut: {self.last.reason}]")
        self.seed += 1
        self.history = [*messages, {"role": "assistant", "content": said}]

    def _stream(self, ids: Ids) -> Iterator[Completion]:
        try:
            yield from self.generator.stream(
                ids,
                sampling=self.sampling,
                steering=self.steering,
                stop=self.stop,
                seed=self.seed,
            )
        except KeyboardInterrupt:
            self.say.print(" [interrupted]", end="", markup=False)

    def _obey(self, line: str) -> None:
        """A command.

        Raises:
            UserError: An unknown one, or codes of a system without any.
        """
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/help":
            self._print(HELP)
        elif name == "/reset":
            self.history, self.last = [], None
            self._print("the conversation is forgotten")
        elif name == "/again":
            if not self.history:
                raise UserError("/again needs a prompt, got none yet. Ask something.")
            self._ask(self.history[:-1])
        elif name == "/seed":
            if not value.isdecimal():
                raise UserError(f"/seed must be a whole number, got {value!r}.")
            self.seed = int(value)
        elif name in ("/code", "/mix", "/like", "/mean", "/sample", "/argmax"):
            self._steer(name, value, line)
        elif name == "/codes":
            self._show_codes(line)
        else:
            raise UserError(f"{name} is no command. /help lists them.")

    def _codes(self, line: str) -> int:
        asked = self.generator.system
        codes = None if asked.latent is None else asked.latent.num_codes
        return steering.require_codes(codes, line, asked.name)

    def _steer(self, name: str, value: str, line: str) -> None:
        codes = self._codes(line)
        if name == "/code":
            self.steering = steering.code(value, codes)
        elif name == "/mix":
            self.steering = steering.mix(value, codes)
        elif name == "/like":
            asked = self.generator.system
            examples = like.read(value, like.BY[0], asked.latent, asked.name)
            self.steering = like.steering(asked, examples)
        elif name == "/mean":
            self.steering = Steering("mean")
        elif name == "/argmax":
            self.steering = Steering("argmax")
        else:
            self.steering = Steering("sample", temperature=self.steering.temperature)
        self._print(f"z from here on: {self.steering.said()}")

    def _show_codes(self, line: str) -> None:
        self._codes(line)
        if self.last is None:
            raise UserError("/codes needs a prompt, got none yet. Ask something.")
        assert self.last.prior is not None
        assert self.last.weights is not None
        table = Table("code", "prior", "in z")
        for code in answers.largest(self.last.prior, _SHOWN):
            prior, weight = (x[int(code)] for x in (self.last.prior, self.last.weights))
            table.add_row(code, f"{prior:.3f}", f"{weight:.3f}")
        self.say.print(table)
        self._print(f"z of the last answer: {self._said_of_last()}")

    def _said_of_last(self) -> str:
        assert self.last is not None
        assert self.last.weights is not None
        shares = answers.largest(self.last.weights, _SHOWN)
        return ", ".join(f"{code}: {share:.3f}" for code, share in shares.items())
