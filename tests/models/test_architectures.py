"""Architectures from config.json; transformers' own classes are the second source."""

from __future__ import annotations

import dataclasses
import json

import pytest
import transformers

from lpc_jax import config as cfg
from lpc_jax.models import architectures, hf_config, leaves, weights
from lpc_jax.models.architectures import FAMILIES, Architecture, RopeScaling

# Llama-3.1-8B's config.json, less what no decoder reads.
LLAMA31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
# Mistral-7B-v0.1's.
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


# Of each kind of refusal, names as published config.json files have them.
_MOE, _HYBRID = (
    "Mixtures of experts",
    "Hybrids, with layers that are recurrent or of a state space,",
)
_GEMMA = "Gemma's norms, its scaled embedding and its capped logits"
REFUSED = {
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForConditionalGeneration": _GEMMA,
    "MixtralForCausalLM": _MOE,
    "Qwen2MoeForCausalLM": _MOE,
    "Qwen3MoeForCausalLM": _MOE,
    "DeepseekV3ForCausalLM": _MOE,
    "GptOssForCausalLM": _MOE,
    "OlmoeForCausalLM": _MOE,
    "Llama4ForConditionalGeneration": _MOE,
    "Qwen3NextForCausalLM": _HYBRID,
    "GraniteMoeHybridForCausalLM": _HYBRID,
    "MambaForCausalLM": _HYBRID,
    "FalconH1ForCausalLM": _HYBRID,
    "Lfm2ForCausalLM": _HYBRID,
    "Qwen2_5_VLForConditionalGeneration": "Models that read images",
    "LlamaForSequenceClassification": "Models without an LM head",
    "Qwen2ForRewardModel": "Models without an LM head",
    "MistralModel": "Models without an LM head",
    "GPTNeoXForCausalLM": "Other families",
    "Olmo3ForCausalLM": "Other families",
}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "rope_scaling": None}
MIXED = ["full_attention"] * 16 + ["sliding_attention"] * 16
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


def test_llama31_is_read_field_by_field():
    assert hf_config.read(LLAMA31, "config.json") == Architecture(
        family="llama",
        vocabulary=128256,
        width=4096,
        layers=32,
        query_heads=32,
        kv_heads=8,
        head_width=128,
        mlp_width=14336,
        norm_epsilon=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_length=8192,
        ),
        sliding_window=None,
        tied=False,
        context_length=131072,
    )


@pytest.mark.parametrize(
    ("config", "published"),
    # The model cards: 8.03 and 7.24 billion parameters.
    [(LLAMA31, 8_030_261_248), (MISTRAL, 7_241_732_096)],
)
def test_parameter_count_is_the_published_one(config, published):
    read = hf_config.read(config, "config.json")
    assert leaves.count(read) == published


def test_mistral_reads_its_window_and_llama_ignores_one():
    assert hf_config.read(MISTRAL, "").sliding_window == 4096
    none = hf_config.read({**MISTRAL, "sliding_window": None}, "")
    assert none.sliding_window is None
    llama = hf_config.read({**LLAMA31, "sliding_window": 4096}, "")
    assert llama.sliding_window is None


@pytest.mark.parametrize(
    ("config", "theirs"),
    [(LLAMA31, transformers.LlamaConfig), (MISTRAL, transformers.MistralConfig)],
)
def test_fields_left_out_take_transformers_defaults(config, theirs):
    optional = ["num_key_value_heads", "max_position_embeddings", "sliding_window"]
    optional += ["rope_theta", "rope_scaling", "tie_word_embeddings", "hidden_act"]
    bare = {name: value for name, value in config.items() if name not in optional}
    read = hf_config.read(bare, "config.json")
    expected = theirs(**bare)
    assert read.kv_heads == expected.num_key_value_heads
    assert read.context_length == expected.max_position_embeddings
    assert read.sliding_window == getattr(expected, "sliding_window", None)
    assert read.tied == expected.tie_word_embeddings
    assert read.rope_theta == expected.rope_parameters["rope_theta"]
    assert read.head_width == expected.head_dim
    assert read.rope_scaling is None


@pytest.mark.parametrize(
    ("config", "theirs"),
    [(LLAMA31, transformers.LlamaConfig), (MISTRAL, transformers.MistralConfig)],
)
def test_both_spellings_of_rope_read_the_same(config, theirs):
    spelt = json.loads(theirs(**config).to_json_string(use_diff=False))
    assert "rope_parameters" in spelt  # transformers 5
    assert "rope_scaling" not in spelt
    assert hf_config.read(spelt, "") == hf_config.read(config, "")


@pytest.mark.parametrize("config", [LLAMA31, MISTRAL])
def test_hf_config_reads_back_as_the_same_architecture(config):
    read = hf_config.read(config, "")
    written = json.loads(json.dumps(hf_config.fields(read)))
    assert hf_config.read(written, "") == read


@pytest.mark.parametrize(
    ("config", "theirs"),
    [(LLAMA31, transformers.LlamaConfig), (MISTRAL, transformers.MistralConfig)],
)
def test_transformers_reads_hf_config_as_the_original(config, theirs):
    written = hf_config.fields(hf_config.read(config, ""))
    read, expected = theirs(**written).to_dict(), theirs(**config).to_dict()
    for tokens in ("bos_token_id", "eos_token_id"):
        del read[tokens], expected[tokens]
    assert read == expected


def test_a_type_alone_names_the_family(tmp_path):
    """AutoModelForCausalLM goes by it."""
    file = tmp_path / "config.json"
    for kind, names in {"qwen3": ["Qwen3ForCausalLM"], "bloom": []}.items():
        file.write_text(json.dumps({"model_type": kind, "architectures": None}))
        assert hf_config.open_folder(tmp_path)[0]["architectures"] == names


def test_linear_rope_scaling_is_read_and_written():
    config = {**LLAMA31, "rope_scaling": {"type": "linear", "factor": 2.0}}
    read = hf_config.read(config, "")
    assert read.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert hf_config.read(hf_config.fields(read), "") == read


# Where a field says nothing of a Mistral: a family whose config.json has it.
_OTHERWISE = {
    "output_bias": "llama",
    "mlp_bias": "llama",
    "rotary_width": "phi3",
    "unturned": "smollm3",
}
# Of a family, whatever its config.json says, or with ``output_bias``.
_OF_FAMILY = {"qk_norm", "norm_after", "qkv_bias"}


def test_every_field_of_the_architecture_changes_the_written_config():
    read = hf_config.read({**MISTRAL, "head_dim": 64}, "")
    changed = {
        "family": "llama",
        "vocabulary": 1,
        "width": 2,
        "layers": 3,
        "query_heads": 64,
        "kv_heads": 4,
        "head_width": 5,
        "mlp_width": 6,
        "norm_epsilon": 1e-3,
        "rope_theta": 7.0,
        "rope_scaling": RopeScaling(kind="linear", factor=2.0),
        "sliding_window": None,
        "tied": True,
        "context_length": 8,
        "output_bias": True,
        "mlp_bias": True,
        "rotary_width": 48,
        "unturned": (1,),
    }
    names = {field.name for field in dataclasses.fields(Architecture)}
    assert set(changed) == names - _OF_FAMILY
    for field, value in changed.items():
        family = _OTHERWISE.get(field, "mistral")
        start = dataclasses.replace(read, family=family)
        other = dataclasses.replace(start, **{field: value})
        assert hf_config.fields(other) != hf_config.fields(start), field


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (
                {"architectures": [name]},
                f"c.json: architectures[0] must be one of {sorted(FAMILIES)}, got"
                f" '{name}'. {reason} are not implemented.",
            )
            for name, reason in REFUSED.items()
        ),
        (
            {"architectures": None},
            f"c.json: architectures[0] must be one of {sorted(FAMILIES)}, got None."
            " Other families are not implemented.",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "attention_bias": True},
            "c.json: attention_bias must be False, got True. The decoder does not"
            " compute this variant.",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "mlp_bias": True},
            "c.json: mlp_bias must be False, got True. The decoder does not compute"
            " this variant.",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": None},
            "c.json: partial_rotary_factor must be 1.0, got 0.5. The decoder does not"
            " compute this variant.",
        ),
        (
            QWEN2 | {"use_sliding_window": True, "max_window_layers": 20},
            "c.json: max_window_layers must be such that all layers have the sliding"
            " window or none, got 20. The decoder does not compute this variant.",
        ),
        (
            QWEN2 | {"use_sliding_window": True, "layer_types": MIXED},
            "c.json: layer_types must be such that all layers have the sliding window"
            f" or none, got {MIXED!r:.80}. The decoder does not compute this variant.",
        ),
        (
            {
                "architectures": ["SmolLM3ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "rope_scaling": None,
            },
            "c.json: use_sliding_window must be such that all layers have the sliding"
            " window or none, got True. The decoder does not compute this variant.",
        ),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]},
            "c.json: no_rope_layers must be a 0 or 1 for each layer, got [1, 0]."
            " Download it again.",
        ),
        (
            PHI3 | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "c.json: rope type 'longrope' takes ['attention_factor', 'factor',"
            " 'long_factor', 'original_max_position_embeddings', 'short_factor'], got"
            " ['original_max_position_embeddings', 'short_factor'].",
        ),
        (
            PHI3 | {"rope_scaling": LONGROPE | {"short_factor": [1.0]}},
            "c.json: short_factor must be a list of 64 numbers, one a plane that RoPE"
            " turns, got [1.0]. Download it again.",
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "c.json: the lesser of rope_theta and original_max_position_embeddings must"
            " be above 1, got 1.0. Download it again.",
        ),
        (
            PHI3 | {"partial_rotary_factor": 1.5},
            "c.json: partial_rotary_factor must be at most 1, of an even part of 128"
            " elements, got 1.5. The decoder does not compute this variant.",
        ),
        (
            PHI3 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "c.json: rope type must be one of ['default', 'longrope'], got 'linear'."
            " This scaling is not implemented.",
        ),
        (
            {"hidden_act": "gelu"},
            "c.json: hidden_act must be 'silu', got 'gelu'. The decoder does not"
            " compute this variant.",
        ),
        (
            {"partial_rotary_factor": 0.5},
            "c.json: partial_rotary_factor must be 1.0, got 0.5. The decoder does not"
            " compute this variant.",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "c.json: rope type must be one of ['default', 'linear', 'llama3', 'yarn'],"
            " got 'dynamic'. This scaling is not implemented.",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
            "c.json: rope type 'yarn' takes ['attention_factor', 'beta_fast',"
            " 'beta_slow', 'factor', 'original_max_position_embeddings'], got"
            " ['factor', 'original_max_position_embeddings', 'truncate'].",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "c.json: rope type 'llama3' takes ['factor', 'high_freq_factor',"
            " 'low_freq_factor', 'original_max_position_embeddings'], got ['factor'].",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "c.json: quantization_config must be absent, got {'bits': 4}. Use the"
            " model's unquantised safetensors, or a GGUF file.",
        ),
        (
            {"quantization": {"bits": 4}},
            "c.json: quantization must be absent, got {'bits': 4}. Use the model's"
            " unquantised safetensors, or a GGUF file.",
        ),
        (
            QWEN2 | {"use_sliding_window": "false", "rope_scaling": None},
            "c.json: use_sliding_window must be true or false, got 'false'. Download it"
            " again.",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "c.json: rope_scaling must be absent beside rope_parameters, got"
            f" {LLAMA31['rope_scaling']!r:.80}. Write all of it in rope_parameters.",
        ),
        (
            {"model_type": "mistral"},
            "c.json: model_type must be 'llama', got 'mistral'. Correct one of the"
            " two.",
        ),
        (
            {"num_key_value_heads": 5},
            "c.json: num_attention_heads = 32 must be a multiple of"
            " num_key_value_heads = 5. Download it again.",
        ),
        (
            {"vocab_size": None, "rms_norm_eps": None},
            "c.json: missing fields ['vocab_size', 'rms_norm_eps'].",
        ),
    ],
)
def test_what_the_decoder_does_not_compute_is_named(change, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message follows
        hf_config.read({**LLAMA31, **change}, "c.json")
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        # "Total parameters" of the safetensors published under each id.
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("princeton-nlp/Llama-3-Base-8B-SFT", 8_030_261_248),
        ("alignment-handbook/zephyr-7b-sft-full", 7_241_732_096),
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        # Its file has the tied head twice: 751,632,384.
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
        ("allenai/OLMo-2-0425-1B-Instruct", 1_484_916_736),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
    ],
)
def test_a_known_model_has_as_many_parameters_as_published(path, parameters):
    assert leaves.count(architectures.KNOWN[path]) == parameters


def test_a_known_model_is_what_its_config_json_says():
    known = architectures.KNOWN
    zephyr = known["alignment-handbook/zephyr-7b-sft-full"]
    assert zephyr == hf_config.read(MISTRAL, "config.json")
    # v0.2's differs in two fields.
    fields = MISTRAL | {"rope_theta": 1e6, "sliding_window": None}
    v02 = known["mistralai/Mistral-7B-Instruct-v0.2"]
    assert v02 == hf_config.read(fields, "config.json")
    # Llama 3's is 3.1's without the stretch.
    fields = LLAMA31 | {"rope_scaling": None, "max_position_embeddings": 8192}
    llama = known["meta-llama/Meta-Llama-3-8B-Instruct"]
    assert llama == hf_config.read(fields, "config.json")


@pytest.mark.smollm2
def test_the_known_smollm2_is_the_one_in_the_package(smollm2):
    known = architectures.KNOWN["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert weights.read_architecture(smollm2) == known


@pytest.mark.parametrize("model", ["mistral_7b", "llama3", "llama3_instruct"])
@pytest.mark.parametrize("loss", ["dpo", "simpo", "ipo"])
def test_the_papers_models_are_known(repository, model, loss):
    config = cfg.read(str(repository / "configs" / f"{model}_{loss}.py"))
    assert config.model.path in architectures.KNOWN
