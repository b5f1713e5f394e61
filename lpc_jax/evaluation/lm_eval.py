"""lm-evaluation-harness's benchmarks, answered by a policy.

Tokenization follows the harness's ``hf`` model, so that scores are comparable. The
harness is in the extra ``eval``: import this module only where tasks are asked for.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from rich import box
from rich.table import Table
from tqdm import tqdm

from lpc_jax.data.tokenizer import TEMPLATE_REMEDY
from lpc_jax.errors import UserError
from lpc_jax.evaluation import scoring
from lpc_jax.evaluation.scoring import Ids, Request
from lpc_jax.files import untrusted
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from lpc_jax.runtime.policy import Policy

try:
    from lm_eval import evaluator, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ModuleNotFoundError as error:
    if error.name != "lm_eval":  # it is there, but something that it needs is not
        raise
    raise UserError(
        "--tasks needs the package lm_eval, and that is not installed. Run: pip"
        " install 'lpc-jax[eval]'."
    ) from error

# Of an answer where the task sets none, as in the hf model.
MAX_NEW_TOKENS = 256
# Prompts answered at a time.
_GENERATED_AT_ONCE = 8
_GENERATION = {"max_gen_toks", "until", "do_sample", "temperature", "top_k", "top_p"}
# Keys of a task's results that are no metrics.
_NO_METRICS = ("alias", "name", "sample_len", "sample_count")
# Kept of a question beside its metrics.
_OF_SAMPLE = ("doc_id", "arguments", "resps", "filtered_resps", "filter", "target")


class LanguageModel(TemplateLM):
    """A policy as the harness's model; ``cut`` counts requests with a cut context.

    ``steering`` is not read without a latent; ``max_length`` None: the context length.

    Raises:
        UserError: ``max_length`` above the model's, or neither a BOS nor an EOS token.
    """

    # The harness reads these; the last one names its cache.
    tokenizer: Any
    eot_token_id: Any = None
    prefix_token_id: Any = None
    tokenizer_name: Any = ""

    def __init__(
        self,
        policy: Policy,
        *,
        steering: Steering,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policy, self.steering, self.seed = policy, steering, seed
        self.tokenizer, self.tokenizer_name = policy.tokenizer, policy.name
        self.cut = 0
        longest = policy.architecture.context_length
        self.max_length = longest if max_length is None else max_length
        if not 2 <= self.max_length <= longest:
            raise UserError(
                f"--max-length must be from 2 to the model's {longest} positions, got"
                f" {max_length}."
            )
        self.eot_token_id = self.tokenizer.eos_token_id
        # What stands before a text without context.
        self.prefix_token_id = self.tokenizer.bos_token_id
        if self.prefix_token_id is None:
            self.prefix_token_id = self.eot_token_id
        if self.prefix_token_id is None:
            raise UserError(
                f"{policy.name}: the tokenizer must have a BOS or EOS token to stand"
                " before a text, got neither. Set one in its tokenizer_config.json."
            )

    @functools.cached_property
    def _generator(self) -> Generator:
        # Made on first use: it copies the decoder's layers.
        return Generator(self.policy, batch=_GENERATED_AT_ONCE)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text's ids, without a second BOS before one that starts with it."""
        prefix = str(self.tokenizer.decode([self.prefix_token_id]))
        if add_special_tokens is None and string.startswith(prefix):
            add_special_tokens = False
        options: dict[str, Any] = {"verbose": False}  # what is too long is cut later
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        return list(self.tokenizer(string, **options)["input_ids"])

    def request(
        self, texts: tuple[str, str], context: list[int], scored: list[int]
    ) -> Request:
        """What is read and scored; the context is cut at its start to fit the model.

        ``context`` and ``scored`` are the ids of both ``texts``, as the harness splits
        them; ``UserError`` for no scored ids, or too many for the model.
        """
        # The harness scores white space at a context's end with the continuation, as it
        # may be part of its first token. Where it is not, as after a chat template's
        # header, it stays in the context, whose last token the prior reads in training.
        lead = 0
        if context and texts[0] != texts[0].rstrip():
            whole, full = [*context, *scored], self.tok_encode(texts[0])
            if len(context) < len(full) < len(whole) and whole[: len(full)] == full:
                lead = len(full) - len(context)
                context, scored = full, scored[lead:]
        if not scored or len(scored) + lead > self.max_length:
            raise UserError(
                f"a continuation must have 1 to {self.max_length} tokens, got"
                f" {len(scored) + lead}: {untrusted.shown(repr(texts[1]))}. Only a"
                " context can be cut: leave the task out, or raise --max-length."
            )
        # One more than max_length: the last scored id is predicted, never read.
        room = self.max_length + 1 - len(scored)
        return Request(self._cut(context, room), np.asarray(scored, np.int32), lead)

    def _cut(self, context: list[int], room: int) -> Ids:
        self.cut += len(context) > room
        return np.asarray((context or [self.prefix_token_id])[-room:], np.int32)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="Scoring", disable=None) as bar:
            scores = scoring.score(
                self.policy,
                [self.request(*request) for request in requests],
                steering=self.steering,
                seed=self.seed,
                done=bar.update,
            )
        return [*scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Each text's log-likelihood, over windows with a z each where it is long."""
        numbers, windows = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            ):
                numbers.append(number)
                windows.append((("", text), *utils.make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows)
        for number, (logp, _) in zip(numbers, scores, strict=True):
            totals[number] += logp
        return totals

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """An answer to each context, up to its first stop string."""
        groups: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self.sampling(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="Answering", disable=None)
        for (sampling, stop), numbers in groups.items():
            room = self.max_length - sampling.max_new_tokens
            prompts = {
                i: self._cut(self.tok_encode(requests[i].args[0]), room)
                for i in numbers
            }
            # Longest first, so that a batch pads little.
            numbers.sort(key=lambda i: -len(prompts[i]))
            for start in range(0, len(numbers), _GENERATED_AT_ONCE):
                part = numbers[start : start + _GENERATED_AT_ONCE]
                completions = self._generator.generate(
                    [prompts[i] for i in part],
                    sampling=sampling,
                    steering=self.steering,
                    stop=stop,
                    seed=self.seed + start,
                )
                for number, completion in zip(part, completions, strict=True):
                    texts[number] = completion.text
                bar.update(len(part))
        bar.close()
        return texts

    def sampling(self, settings: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        """A task's generation settings as ``Sampling``, and its stop strings.

        ``UserError`` for an unknown setting, or answers of ``max_length`` tokens.
        """
        known: Any = normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)
        if unknown := sorted(known.keys() - _GENERATION):
            raise UserError(
                f"a task's generation_kwargs may set {', '.join(sorted(_GENERATION))},"
                f" got also {', '.join(unknown)}. Leave the task out, or change it."
            )
        length = known["max_gen_toks"]
        if length >= self.max_length:
            raise UserError(
                f"a task asks for answers of {length} tokens, expected less than the"
                f" {self.max_length} that are read at a time. Raise --max-length, or"
                " leave the task out."
            )
        sampling = Sampling(
            max_new_tokens=length,
            temperature=float(known.get("temperature") or known["do_sample"]),
            top_k=known.get("top_k") or None,
            top_p=float(known.get("top_p") or 1.0),
        )
        return sampling, tuple(filter(None, known["until"]))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without the header its last message is continued."""
        try:
            text = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in chat_history)
            raise UserError(
                "--apply-chat-template: the model's chat template refuses a"
                f" conversation with the roles {roles} ({untrusted.shown(error)})."
                " Leave out --system-instruction if that is it, or name another"
                " template with model.chat_template."
            ) from error
        return str(text)


def evaluate(
    model: LanguageModel,
    tasks: Sequence[Any],
    *,
    num_fewshot: int | None = None,
    log_samples: bool = False,
    apply_chat_template: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """The harness's results, for JSON with ``default=float``.

    ``tasks`` are of ``tasks.load`` with this ``num_fewshot``; ``log_samples`` also
    gives each request and its log-likelihood; ``settings`` are more of the harness's
    ``simple_evaluate``. ``UserError`` for a template to apply where there is none.
    """
    start = time.monotonic()
    if apply_chat_template and not model.tokenizer.chat_template:
        raise UserError(
            f"--apply-chat-template needs a chat template, got {model.policy.name},"
            f" which has none. {TEMPLATE_REMEDY}"
        )
    for task in tasks:
        if task.config.output_type == "generate_until":
            model.sampling(task.config.generation_kwargs)
    settings["apply_chat_template"] = apply_chat_template
    output: Any = evaluator.simple_evaluate(
        model=model, tasks=list(tasks), num_fewshot=num_fewshot, **settings
    )
    results = {
        "system": model.policy.name,
        "z": None if model.policy.latent is None else model.steering.words(),
        "tasks": {
            name: {
                "questions": count["effective"],
                "examples": output["n-shot"][name],
                "version": output["versions"].get(name),
                "metrics": _metrics(output["results"][name]),
            }
            for name, count in output["n-samples"].items()
        },
        "settings": {**settings, "max_length": model.max_length, "seed": model.seed},
        "cut_requests": model.cut,
        "lm_eval": output["lm_eval_version"],
        "seconds": round(time.monotonic() - start, 1),
    }
    if log_samples:
        results["samples"] = {
            task: [{name: x[name] for name in (*_OF_SAMPLE, *x["metrics"])} for x in of]
            for task, of in output["samples"].items()
        }
    return results


def _metrics(results: Mapping[str, Any]) -> dict[str, float | None]:
    """A task's metrics; None where the harness has a text or no finite number."""
    return {
        name: float(x) if isinstance(x, int | float) and math.isfinite(x) else None
        for name, x in results.items()
        if name not in _NO_METRICS
    }


def table(results: Mapping[str, Any]) -> Table:
    """The results of ``evaluate``, a metric a line."""
    z = "" if results["z"] is None else f", z: {results['z']}"
    made = Table(title=f"{results['system']}{z}", box=box.SIMPLE_HEAD)
    for name in ("task", "n", "n-shot", "metric", "value", "±"):
        is_text = name in ("task", "metric")
        made.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for task, of_task in results["tasks"].items():
        first = (task, of_task["questions"], of_task["examples"])
        for name, value in of_task["metrics"].items():
            metric, _, extraction = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = of_task["metrics"].get(f"{metric}_stderr,{extraction}")
            label = metric if extraction == "none" else f"{metric} ({extraction})"
            numbers = ("" if x is None else f"{x:.4f}" for x in (value, error))
            made.add_row(*map(str, first), label, *numbers)
            first = ("", "", "")
    return made
