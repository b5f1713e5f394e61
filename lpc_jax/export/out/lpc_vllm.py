"""Latent Preference Coding in vLLM: each request's mix of codes as a bias.

z of a prompt is one vector over its answer and enters before the linear head, so that
it is one bias over the vocabulary: weights of the codes times what each code alone
adds (Gong et al. 2025, arXiv 2505.04993, eq. 10). vLLM serves the decoder, and this
file, which needs torch, safetensors and vLLM but not lpc_jax, adds the bias:

    python scripts/export.py runs/mine plain --plain
    python scripts/export.py runs/mine codes.safetensors --bias prompts.jsonl
    LPC_CODES=codes.safetensors vllm serve plain \
        --logits-processors lpc_vllm:LpcLogitsProcessor

with this file on PYTHONPATH. A request brings the weights of its prompt's codes, a row
of ``weights`` in codes.safetensors or any other mix (a one for one code), as
``SamplingParams(extra_args={"lpc_weights": [0.7, 0.3, ...]})`` or, to the server, as
``"vllm_xargs": {"lpc_weights": [0.7, 0.3, ...]}``. A request without them is answered
by the decoder without z.

Written to the interface of vLLM's V1 engine, and run inside vLLM 0.32.0 on a CPU, where
``make vllm`` finds greedy answers equal to lpc_jax's token for token. Its newer model
runner has another interface; VLLM_USE_V2_MODEL_RUNNER=0 chooses this one. vLLM refuses
logits processors together with speculative decoding, and a folder with codes.
"""

import os

import torch
from safetensors.torch import load_file
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

CODES = "LPC_CODES"
WEIGHTS = "lpc_weights"
# Weights must sum to 1 within this.
TOLERANCE = 1e-3


class CodeMix:
    """Adds one request's bias to its logits at every token of the answer."""

    def __init__(self, code_bias, weights):
        """Mixes what each code alone adds [C, V], by C weights that sum to 1."""
        weights = torch.as_tensor(weights, dtype=code_bias.dtype)
        total = float(weights.sum())
        if weights.shape != code_bias.shape[:1] or not abs(total - 1) <= TOLERANCE:
            raise ValueError(
                f"{WEIGHTS} must be {len(code_bias)} numbers that sum to 1, got"
                f" {weights.numel()} that sum to {total:g}."
            )
        self.bias = weights.to(code_bias.device) @ code_bias

    def __call__(self, output_ids, logits):
        """The logits [V] under z; what was written so far does not matter."""
        # Where vLLM pads the vocabulary, nothing is added.
        logits[: len(self.bias)] += self.bias.to(logits.dtype)
        return logits


class LpcLogitsProcessor(AdapterLogitsProcessor):
    """Gives each request that brings weights its ``CodeMix``."""

    def __init__(self, vllm_config, device, is_pin_memory):
        """Reads the codes, once an engine."""
        super().__init__(vllm_config, device, is_pin_memory)
        file = os.environ.get(CODES)
        if not file:
            raise ValueError(
                f"{CODES} must name the file that scripts/export.py --bias wrote, got"
                " nothing. Set it in the environment of the engine."
            )
        self.code_bias = load_file(file)["code_bias"].to(device)

    def is_argmax_invariant(self):
        """No: another token may be the likeliest."""
        return False

    def new_req_logits_processor(self, params):
        """The request's ``CodeMix``, or None where it brings no weights."""
        weights = (params.extra_args or {}).get(WEIGHTS)
        return None if weights is None else CodeMix(self.code_bias, weights)
