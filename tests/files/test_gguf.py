"""Blocks of GGUF files, decoded beside ggml's block layouts written out in float64."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from lpc_jax.files import gguf as gguf_file

SUPER = 256  # values of a K-quant's block


def _scales_and_minima(packed):
    """Eight 6-bit scales and minima of Q4_K and Q5_K in 12 bytes (ggml-quants.c)."""
    low, mid, high = packed.reshape(3, 4).astype(int)
    scales = [*(low & 63), *((high & 15) | (low >> 6 << 4))]
    minima = [*(mid & 63), *((high >> 4) | (mid >> 6 << 4))]
    return scales, minima


def _half(data):
    return float(data.view(np.float16)[0])


def q4_k(block):
    """d * scale * q - dmin * minimum; nibbles of 32 bytes make two groups of 32."""
    d, dmin = _half(block[:2]), _half(block[2:4])
    scales, minima = _scales_and_minima(block[4:16])
    nibbles = block[16:].reshape(4, 32).astype(int)
    values = []
    for group in range(8):
        q = (nibbles[group // 2] >> (4 * (group % 2))) & 15
        values += list(d * scales[group] * q - dmin * minima[group])
    return values


def q5_k(block):
    """As Q4_K, with a fifth bit: bit ``group`` of each of 32 bytes."""
    d, dmin = _half(block[:2]), _half(block[2:4])
    scales, minima = _scales_and_minima(block[4:16])
    fifth, nibbles = block[16:48].astype(int), block[48:].reshape(4, 32).astype(int)
    values = []
    for group in range(8):
        q = (nibbles[group // 2] >> (4 * (group % 2))) & 15
        q = q + 16 * ((fifth >> group) & 1)
        values += list(d * scales[group] * q - dmin * minima[group])
    return values


def q6_k(block):
    """d * scale * (q - 32): 4 low bits, 2 high ones, a signed scale each 16 values."""
    low, high = block[:128].reshape(2, 64).astype(int), block[128:192].reshape(2, 32)
    scales, d = block[192:208].view(np.int8).astype(int), _half(block[208:210])
    values = np.zeros(SUPER)
    for half in range(2):
        for quarter in range(4):
            nibble = low[half, 32 * (quarter % 2) :][:32] >> (4 * (quarter // 2)) & 15
            q = nibble | (high[half].astype(int) >> (2 * quarter) & 3) << 4
            at = 128 * half + 32 * quarter
            scale = np.repeat(scales[at // 16 : at // 16 + 2], 16)
            values[at : at + 32] = d * scale * (q - 32)
    return list(values)


# Block bytes, where its half-precision numbers lie, and the decoding above.
KINDS = {
    "Q4_K": (144, (0, 2), q4_k),
    "Q5_K": (176, (0, 2), q5_k),
    "Q6_K": (210, (208,), q6_k),
}


@pytest.mark.parametrize("name", KINDS)
def test_k_quants_are_decoded(name, tmp_path):
    size, halves, decode = KINDS[name]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2, size), dtype=np.uint8)
    for at in halves:  # random bytes, but numbers of a real file's size
        numbers = np.full((3, 2, 1), 0.01 * (1 + at), np.float16)
        blocks[..., at : at + 2] = numbers.view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    kind = gguf.GGMLQuantizationType[name]
    writer.add_tensor("x", blocks.reshape(3, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf_file.read(tmp_path / "m.gguf").tensors["x"]
    assert tensor.shape == (3, 2 * SUPER)
    found = tensor.read()
    expected = np.asarray([[v for b in row for v in decode(b)] for row in blocks])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)
