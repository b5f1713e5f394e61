"""What one version of transformers reads in exported folders, as JSON on stdout.

python tests/parity/older.py FOLDER ... ; knows nothing of lpc_jax, which is not there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

TEXTS = (
    " Three ships,\n\n  s'il vous plaît: 12? \U0001f60a",
    "<|im_start|> a<|im_end|>",
)
CONVERSATION = [{"role": "user", "content": "Why is the sky blue?"}]
NEW_TOKENS = 12


def read(folder: str) -> dict[str, Any]:
    """Ids of texts and of a conversation, its logits and its greedy answer."""
    import torch
    import transformers

    options: dict[str, Any] = {"trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True, **options
    )
    text = tokenizer.apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt = torch.tensor([ids])
    with torch.no_grad():
        logits = model.eval()(prompt).logits[0]
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )[0]
    return {
        "told": {name: len(names) for name, names in told.items()},
        "texts": [tokenizer(text)["input_ids"] for text in TEXTS],
        "decoded": tokenizer.decode(ids),
        "ids": ids,
        "logits": logits.tolist(),
        "answer": answer.tolist(),
    }


if __name__ == "__main__":
    import transformers

    print(json.dumps([transformers.__version__, *map(read, sys.argv[1:])]))
