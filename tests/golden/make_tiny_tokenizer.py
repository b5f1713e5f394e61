"""Trains the tiny byte-level BPE tokenizer with a chat template: tiny_tokenizer/.

    python tests/golden/make_tiny_tokenizer.py

Needs transformers and tokenizers, no torch. Trains on the messages of pairs.jsonl, so
that later pairs must come with a new tokenizer, new models and new trajectories.
Checks the prefix property and one round trip.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent
BOS, START, END = "<|begin|>", "<|im_start|>", "<|im_end|>"
# Room for the models' 512 rows with some rows no token uses, as published models have.
VOCABULARY = 480

# ChatML with BOS in front and the line feed between turns rather than after each:
# the conversation ends in END, so prompt + answer + END is the whole of it.
CHAT_TEMPLATE = """\
{{ bos_token }}\
{% for message in messages %}\
{% if not loop.first %}{{ '\\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"""


def read_pairs() -> list[dict]:
    """The rows of pairs.jsonl."""
    text = (FOLDER / "pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def train(texts: list[str]) -> Tokenizer:
    """Byte-level BPE that puts BOS before plain text, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def main() -> None:
    """Train, save, load again and check."""
    pairs = read_pairs()
    texts = [
        message["content"]
        for pair in pairs
        for key in ("prompt", "chosen", "rejected")
        for message in pair[key]
    ]
    PreTrainedTokenizerFast(
        tokenizer_object=train([*texts, "system", "user", "assistant"]),
        bos_token=BOS,
        eos_token=END,
        pad_token=END,  # as many published models have it: masks come from lengths
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    ).save_pretrained(FOLDER / "tiny_tokenizer", save_jinja_files=False)

    loaded = AutoTokenizer.from_pretrained(FOLDER / "tiny_tokenizer")
    assert loaded.bos_token_id != loaded.eos_token_id == loaded.pad_token_id
    assert len(loaded) <= VOCABULARY
    for pair in pairs:
        prompt = pair["prompt"]
        header = loaded.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        for key in ("chosen", "rejected"):
            whole = loaded.apply_chat_template(prompt + pair[key], tokenize=False)
            assert whole == header + pair[key][0]["content"] + loaded.eos_token
            ids = loaded(whole, add_special_tokens=False)["input_ids"]
            start = loaded(header, add_special_tokens=False)["input_ids"]
            assert ids[: len(start)] == start
            assert ids[-1] == loaded.eos_token_id
            assert ids.count(loaded.bos_token_id) == 1
            assert loaded.decode(ids) == whole
    print(f"{len(loaded)} tokens")


if __name__ == "__main__":
    main()
