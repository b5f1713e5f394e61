"""Byte-level tokenizers whose ids can be worked out by hand, as GGUF metadata."""

from transformers.convert_slow_tokenizer import bytes_to_unicode

from lpc_jax.data import gguf_tokenizer

ALPHABET = list(bytes_to_unicode().values())
START, END = "<|im_start|>", "<|im_end|>"
CONTROL, NORMAL, USER_DEFINED = 3, 1, 4

# As SmolLM2's, without the default system message.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Mistral's: BOS from the template, answers end in EOS, no assistant header.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)


def metadata(
    *,
    template=CHATML,
    control=(START, END, "<s>", "</s>"),
    words=(),
    user_defined=(),
    merges=(),
    pre="gpt-2",
    bos=START,
    eos=END,
    pad=END,
    **fields,
):
    """A GGUF file's tokenizer fields: control tokens, then bytes, then words."""
    tokens = [*control, *ALPHABET, *words, *user_defined]
    kinds = (
        [CONTROL] * len(control)
        + [NORMAL] * (len(ALPHABET) + len(words))
        + [USER_DEFINED] * len(user_defined)
    )
    named = {"bos": bos, "eos": eos, "padding": pad}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(merges),
        **{
            f"tokenizer.ggml.{name}_token_id": tokens.index(token)
            for name, token in named.items()
            if token is not None
        },
        **({} if template is None else {"tokenizer.chat_template": template}),
        **{f"tokenizer.ggml.{name}": value for name, value in fields.items()},
    }


def build(**options):
    return gguf_tokenizer.from_metadata(metadata(**options), file="tiny.gguf")


def chatml(**options):
    """Pad is EOS, on purpose; no BOS of its own."""
    return build(**options)


def inst(**options):
    """Adds BOS ``<s>``; ends answers with ``</s>``."""
    settings = {"template": INST, "bos": "<s>", "eos": "</s>", "pad": "</s>"}
    return build(**{**settings, "add_bos_token": True, **options})
