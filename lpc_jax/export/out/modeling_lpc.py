"""Latent Preference Coding for transformers: z of a prompt is added before the head.

A folder that scripts/export.py wrote holds a copy of this file, which

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

runs. ``generate`` reads z at the prompt's end and keeps it for the answer (Gong et al.
2025, arXiv 2505.04993, eqs. 9 and 10). Needs torch and transformers 4.57 or later,
not lpc_jax, which never imports this file.
"""

import itertools
import json
import math

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

# What a label is where there is nothing to predict.
IGNORED = -100
UNREAD = ("system", "system_prompt", "history")  # fields of a pair
HOW = ("mean", "sample", "argmax")
# A mix given by hand must sum to 1 within this.
TOLERANCE = 1e-3


class CodeMlp(nn.Module):
    """Logits over codes from standardised hidden states: two layers with SiLU."""

    def __init__(self, inputs, hidden, num_codes):
        super().__init__()
        self.input_mean = nn.Parameter(torch.zeros(inputs))
        self.input_spread = nn.Parameter(torch.ones(inputs))
        self.hidden_kernel = nn.Parameter(torch.zeros(inputs, hidden))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.output_kernel = nn.Parameter(torch.zeros(hidden, num_codes))
        self.output_bias = nn.Parameter(torch.zeros(num_codes))

    def forward(self, x):
        """Logits [..., C] of states [..., inputs]."""
        inputs, hidden_width = self.hidden_kernel.shape
        x = (x.float() - self.input_mean) / self.input_spread
        hidden = x @ self.hidden_kernel.float() / math.sqrt(inputs) + self.hidden_bias
        hidden = nn.functional.silu(hidden)
        logits = hidden @ self.output_kernel.float() / math.sqrt(hidden_width)
        return logits + self.output_bias


class LatentHead(nn.Module):
    """Codebook, prior and posterior; only pairs of answers have a posterior."""

    def __init__(self, width, lpc):
        super().__init__()
        sizes = lpc["hidden_width"], lpc["num_codes"]
        self.codebook = nn.Parameter(torch.zeros(lpc["num_codes"], width))
        self.prior_mlp = CodeMlp(width, *sizes)
        self.posterior_mlp = CodeMlp(lpc["posterior_inputs"], *sizes)


class LpcMixin:
    """What a causal language model of transformers becomes under LPC.

    ``forward`` and ``generate`` take, beside what they always take:

    prompt_lengths: Tokens, without padding, of each row's prompt [rows]. z is read at
        the last of them, and logits are those of an answer from there on. None: where
        ``labels`` begin to be scored, or, without labels, all that was given.
    code_vector: z itself [rows, width], as an earlier call returned it. Whoever
        decodes with a cache, but without ``generate``, hands it on.
    lpc_how: ``mean``, ``sample`` or ``argmax`` of the prior; None: as the config says.
        Each row draws its own ``sample``, so beam search needs one of the others.
    lpc_temperature: Of ``sample``.
    lpc_code: One code, instead of the prior.
    lpc_mix: Weights by code that sum to 1, such as {3: 0.7, 12: 0.3}, instead of it.

    The output has ``code_vector``.
    """

    # The latent is computed in fp32 whatever the decoder's precision.
    _keep_in_fp32_modules_strict = ("latent",)

    def post_init(self):
        """Adds the latent before transformers looks for what stays in fp32."""
        if not hasattr(self, "latent"):
            self.latent = LatentHead(self.config.hidden_size, self.config.lpc)
        super().post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        prompt_lengths=None,
        code_vector=None,
        lpc_how=None,
        lpc_temperature=None,
        lpc_code=None,
        lpc_mix=None,
        lpc_continues_prompt=False,
        return_dict=True,
        **kwargs,
    ):
        """Logits under z; see the class."""
        past = kwargs.get("cache", kwargs.get("past_key_values"))
        unread = code_vector is None and not lpc_continues_prompt
        if unread and past is not None and int(past.get_seq_length()):
            raise ValueError(
                "code_vector must be given with a cache that holds something: z is the"
                " prompt's, which is not read again. Hand on that of the output that"
                " came with the cache."
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if code_vector is None:
            end = prompt_end(hidden, attention_mask, prompt_lengths, labels)
            at_end = hidden[torch.arange(len(hidden), device=hidden.device), end]
            weights = self.code_weights(
                at_end, lpc_how, lpc_temperature, lpc_code, lpc_mix
            )
            code_vector = weights @ self.latent.codebook.float()
        hidden = hidden + code_vector[:, None].to(hidden.dtype)
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep or None, None)
        logits = self.lm_head(hidden[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        # The cache's name is not the same in all versions of transformers.
        for name, value in outputs.items():
            if name != "last_hidden_state":
                output[name] = value
        output["code_vector"] = code_vector
        return output if return_dict else output.to_tuple()

    def code_weights(self, hidden, how=None, temperature=None, code=None, mix=None):
        """Weights of the codes [rows, C] for hidden states at prompts' ends [rows, D].

        The other arguments are those of ``forward`` that begin with ``lpc_``.
        """
        lpc = self.config.lpc
        if code is not None or mix is not None:
            row = mix_weights({code: 1.0} if mix is None else mix, lpc["num_codes"])
            return row.to(hidden.device).expand(len(hidden), -1)
        how = lpc["how"] if how is None else how
        temperature = lpc["temperature"] if temperature is None else temperature
        if how not in HOW or not temperature > 0:
            raise ValueError(
                f"lpc_how must be one of {HOW} and lpc_temperature above 0, got"
                f" {how!r} and {temperature!r}."
            )
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.latent.prior_mlp(hidden)
        if how == "sample":
            gumbel = -torch.log(torch.empty_like(logits).exponential_())
            logits = (logits + gumbel) / temperature
        if how == "argmax" or (how == "sample" and lpc["one_code"]):
            return nn.functional.one_hot(logits.argmax(-1), lpc["num_codes"]).float()
        return logits.softmax(-1)

    @torch.no_grad()
    def mix_like(self, judged, tokenizer):
        """The mix of codes that one reader's judgements call for, as an ``lpc_mix``.

        The softmax of the mean of the pairs' posterior logits (eq. 8), which is what
        ``--like FILE`` of lpc_jax's scripts does. ``judged`` is a .jsonl file or its
        rows: ``prompt``, ``chosen`` and ``rejected``, each a text or messages.
        """
        if not isinstance(judged, list):
            with open(judged, encoding="utf-8") as file:
                judged = [json.loads(line) for line in file if line.strip()]
        if not judged:
            raise ValueError("mix_like needs judged pairs, got none.")
        states = [self._judged(*pair_ids(row, tokenizer)) for row in judged]
        logits = self.latent.posterior_mlp(torch.stack(states)).mean(0)
        return dict(enumerate(logits.softmax(-1).tolist()))

    def _judged(self, prompt, *answers):
        """What the posterior reads of a pair's token ids."""
        ends, means = [], []
        for answer in answers:
            ids = torch.tensor([prompt + answer], device=self.lm_head.weight.device)
            hidden = self.model(input_ids=ids).last_hidden_state[0].float()
            ends.append(hidden[-1])
            means.append(hidden[len(prompt) :].mean(0))
            at_prompt = hidden[len(prompt) - 1]
        of_end, of_mean = ends[0] - ends[1], means[0] - means[1]
        reads = {
            "concat": ends,
            "difference": [of_end],
            "mean_difference": [of_mean],
            "both": [of_end, of_mean],
            "all": [of_end, of_mean, at_prompt],
        }
        return torch.cat(reads[self.config.lpc["settings"]["posterior_input"]])

    def code_bias(self, code_weights):
        """What z adds to all logits of an answer: weights [rows, C] -> [rows, V]."""
        vector = code_weights @ self.latent.codebook.float()
        return vector @ self.lm_head.weight.float().T

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As ever; a step that has no z yet is one that reads the prompt."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["lpc_continues_prompt"] = inputs.get("code_vector") is None
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **more):
        """Called after each step; the next one is given z of the prompt's last."""
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **more
        )
        updated["code_vector"] = outputs["code_vector"]
        return updated


def prompt_end(hidden, attention_mask=None, prompt_lengths=None, labels=None):
    """The column of each row's last prompt token in ``hidden`` [rows, columns, D].

    Of ``attention_mask`` (1: token, 0: padding on either side) the last columns are
    those of ``hidden``; None, or a mask of 4 axes: no padding at the end.
    """
    rows, columns = hidden.shape[:2]
    real = torch.ones(rows, columns, dtype=torch.long, device=hidden.device)
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -columns:].long().to(hidden.device)
    first = real.argmax(1)
    last = columns - 1 - real.flip(1).argmax(1)
    if prompt_lengths is not None:
        end = first + torch.as_tensor(prompt_lengths, device=hidden.device) - 1
    elif labels is not None:
        scored = (labels != IGNORED).long().to(hidden.device)
        end = torch.where(scored.any(1), scored.argmax(1) - 1, last)
    else:
        end = last
    if not bool(((first <= end) & (end <= last)).all()):
        raise ValueError(
            "each row must begin with a prompt of at least one token, got prompts that"
            f" end at columns {end.tolist()} of rows that have tokens from"
            f" {first.tolist()} to {last.tolist()}. Give prompt_lengths, or mask the"
            f" prompt in labels with {IGNORED}."
        )
    return end


def pair_ids(row, tokenizer):
    """Token ids of a judged pair: prompt, chosen and rejected, each answer with EOS."""
    tools = row.get("tools") or None
    tools = json.loads(tools) if isinstance(tools, str) else tools

    def messages(name, role):
        value, unread = row.get(name), {n for n in UNREAD if row.get(n)}
        listed = [{"role": role, "content": value}] if isinstance(value, str) else value
        read = listed and all({"role", "content"} <= m.keys() for m in listed)
        if unread or not read or (role == "assistant" and len(listed) > 1):
            raise ValueError(
                "a judged pair needs prompt, chosen and rejected, each a text or"
                " messages with role and content, an answer one of them, and no"
                f" {unread or UNREAD}, got {name} {value!r:.200}."
            )
        return listed

    def encoded(conversation, **options):
        options |= {"tools": tools, "tokenize": False}
        text = tokenizer.apply_chat_template(conversation, **options)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt = messages("prompt", "user")
    header = encoded(prompt, add_generation_prompt=True)
    sides = [messages(name, "assistant") for name in ("chosen", "rejected")]
    whole = [encoded(prompt + side) for side in sides]
    columns = zip(header, *whole)  # noqa: B905 - up to the shortest
    alike = itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)
    shared, eos, answers = len(list(alike)), tokenizer.eos_token_id, []
    for ids in whole:
        answer = ids[shared:]
        length = answer.index(eos) if eos in answer else len(answer)
        answers.append([*answer[:length], eos])
    return header[:shared], *answers


def mix_weights(mix, num_codes):
    """Weights of all codes [C], from a convex mix by code."""
    weights = torch.zeros(num_codes)
    for code, weight in mix.items():
        if not isinstance(code, int) or not 0 <= code < num_codes or not weight >= 0:
            raise ValueError(
                f"lpc_code and lpc_mix must be of codes from 0 to {num_codes - 1} with"
                f" weights of at least 0, got {code!r}: {weight!r}."
            )
        weights[code] = weight
    total = float(weights.sum())
    if abs(total - 1) > TOLERANCE:
        raise ValueError(f"lpc_mix must have weights that sum to 1, got {total:g}.")
    return weights / total


def _under_lpc(family):
    """A family's config with ``lpc`` (latent sizes, how z is chosen), and its model."""
    theirs = getattr(transformers, f"{family}Config")
    fields = {"model_type": f"lpc_{family.lower()}", "__module__": __name__}
    config = type(f"Lpc{family}Config", (theirs,), fields)
    bases = LpcMixin, getattr(transformers, f"{family}ForCausalLM")
    fields = {"config_class": config, "__module__": __name__}
    return config, type(f"Lpc{family}ForCausalLM", bases, fields)


for _family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Olmo2", "Phi3"):
    if hasattr(transformers, f"{_family}Config"):  # older ones lack the newer
        globals().update({made.__name__: made for made in _under_lpc(_family)})
