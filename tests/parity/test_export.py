"""Exported folders in transformers: log-probs, and greedy answers under z, are ours."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax import sharding
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.export import bias
from lpc_jax.export import folder as export
from lpc_jax.generation import like
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import loading
from tests import exports

pytestmark = pytest.mark.parity

MEAN = Steering("mean")
NEW_TOKENS = 12
# Of several lengths, for padding; longer than tiny_mistral's window.
LENGTHS = (3, 9, 17, 1)
IGNORED = -100


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, 480, length).tolist() for length in LENGTHS]


def loaded(torch, folder: Path, **options):
    """The model, if not a tensor was missing, unexpected or of another shape."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=options.pop("dtype", torch.float32),
        attn_implementation="eager",
        output_loading_info=True,
        **options,
    )
    assert not any(told.values()), told
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each golden model under LPC, and its exported folder; made once."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("exported") / name
            made[name] = exports.with_codes(name), folder
            write(*made[name], plain=False)
        return made[name]

    return of


def write(of, folder, *, plain, dtype="float32"):
    # Shards so small that there are several.
    export.write(of, folder, dtype=dtype, shard_bytes=40_000, plain=plain)
    assert len(list(folder.glob("*.safetensors"))) > 1


@pytest.fixture
def lpc(torch, folders):
    """The system and transformers' model of its folder, by name."""

    def of(name="tiny_llama", **options):
        ours, folder = folders(name)
        return ours, loaded(torch, folder, trust_remote_code=True, **options)

    return of


def left_padded(torch, rows, pad):
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def answers(generated, width, eos):
    """Each row's tokens after the prompt, with its end and without padding."""
    found = []
    for row in generated[:, width:].tolist():
        cut = row.index(eos) + 1 if eos in row else len(row)
        found.append(row[:cut])
    return found


_EXPECTED = {}


def expected(ours, steering=MEAN):
    """Our greedy answers; z changes every one of them."""
    if (ours.name, steering) not in _EXPECTED:
        found = []
        for prompt in prompts():
            z = exports.vector(ours, prompt, steering)
            found.append(exports.greedy(ours, prompt, z, NEW_TOKENS))
            assert found[-1] != exports.greedy(ours, prompt, 0 * z, NEW_TOKENS)
        _EXPECTED[ours.name, steering] = found
    return _EXPECTED[ours.name, steering]


def generate(torch, ours, model, rows, **options):
    pad = ours.tokenizer.pad_token_id
    inputs = left_padded(torch, rows, pad)
    generated = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **options)
    width = inputs["input_ids"].shape[1]
    return answers(generated, width, ours.tokenizer.eos_token_id)


# --- without codes --------------------------------------------------------------------


@pytest.mark.parametrize("name", exports.MODELS)
def test_log_probs_of_a_plain_folder_are_ours(name, torch, tmp_path, record_property):
    ours = exports.plain(name)
    write(ours, tmp_path / "plain", plain=True)
    model = loaded(torch, tmp_path / "plain")
    tokens = prompts()[2]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    wanted = exports.logp(ours, tokens, np.zeros(ours.architecture.width))
    found = logits.log_softmax(-1).numpy()
    record_property("largest difference", float(np.abs(found - wanted).max()))
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    assert model.generation_config.eos_token_id == ours.tokenizer.eos_token_id


@pytest.mark.smollm2
def test_log_probs_of_smollm2_exported_are_ours(torch, smollm2, tmp_path):
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:1])
    ours = loading.load(str(smollm2), mesh=mesh, dtype=jnp.dtype("float32"))
    folder = tmp_path / "plain"
    export.write(ours, folder, dtype="float32", shard_bytes=1 << 28, plain=True)
    assert tokenizers.digest(
        tokenizers.load(folder, chat_template=None)
    ) == tokenizers.digest(ours.tokenizer)
    tokens = ours.tokenizer("Three ships, s'il vous plaît.")["input_ids"]
    with torch.no_grad():
        logits = loaded(torch, folder)(torch.tensor([tokens])).logits[0]
    wanted = exports.logp(ours, tokens, np.zeros(ours.architecture.width))
    found = logits.log_softmax(-1).numpy()
    difference = np.abs(found - wanted)
    of_text = difference[np.arange(len(tokens) - 1), tokens[1:]].max()
    print(f"smollm2: {of_text:.1e} apart, {difference.max():.1e} over all tokens")
    assert of_text < 1e-4
    np.testing.assert_allclose(found, wanted, atol=5e-4, rtol=0)


# --- with codes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", exports.MODELS)
def test_generate_gives_our_greedy_tokens_in_a_left_padded_batch(name, torch, lpc):
    ours, model = lpc(name)
    wanted = expected(ours)
    assert generate(torch, ours, model, prompts()) == wanted
    alone = [generate(torch, ours, model, [row])[0] for row in prompts()]
    assert alone == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_z_is_the_prompt_s_however_generate_goes_about_it(options, torch, lpc):
    ours, model = lpc()
    assert generate(torch, ours, model, prompts(), **options) == expected(ours)


@pytest.mark.parametrize(
    ("options", "steering"),
    [
        ({"lpc_how": "argmax"}, Steering("argmax")),
        ({"lpc_code": 4}, Steering("mix", ((4, 1.0),))),
        ({"lpc_mix": {1: 0.25, 5: 0.75}}, Steering("mix", ((1, 0.25), (5, 0.75)))),
    ],
    ids=["argmax", "code", "mix"],
)
def test_z_is_chosen_as_we_choose_it(options, steering, torch, lpc):
    ours, model = lpc()
    found = generate(torch, ours, model, prompts(), **options)
    assert found == expected(ours, steering)
    assert found != expected(ours)


def judged_pairs() -> list[dict]:
    lines = (exports.GOLDEN / "pairs.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:5]]


@pytest.mark.parametrize("posterior_input", ["concat", "both", "all"])
def test_a_mix_like_judged_pairs_is_ours(posterior_input, torch, tmp_path):
    from transformers import AutoTokenizer

    latent = dataclasses.replace(exports.LATENT, posterior_input=posterior_input)
    ours, folder = exports.with_codes("tiny_llama", latent), tmp_path / "model"
    write(ours, folder, plain=False)
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in judged_pairs()))
    expected = like.read(str(file), "posterior", latent, "ours")(ours)
    model = loaded(torch, folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for given in (file, judged_pairs()):
        mix = model.mix_like(given, tokenizer)
        np.testing.assert_allclose(
            list(mix.values()), [weight for _, weight in expected.mix], atol=1e-5
        )
    row = {"prompt": "x", "chosen": "y", "rejected": "z"}
    two = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    shared = [{"from": "human", "value": "x"}]
    for rows, message in (
        ([], "needs judged pairs, got none"),
        ([{"prompt": "x", "chosen": "y"}], "needs prompt, chosen and rejected"),
        ([row | {"system": "Be brief."}], r"and no \{'system'\}, got prompt 'x'"),
        ([row | {"history": [["a", "b"]]}], r"and no \{'history'\}, got prompt 'x'"),
        ([row | {"chosen": two, "rejected": two}], "an answer one of them, and no"),
        ([row | {"prompt": shared}], "messages with role and content, an answer"),
    ):
        with pytest.raises(ValueError, match=message):
            model.mix_like(rows, tokenizer)


def test_tools_of_a_judged_pair_reach_the_template(torch, tmp_path):
    from transformers import AutoTokenizer

    ours, folder = exports.with_codes("tiny_llama"), tmp_path / "model"
    written = "{% if tools %}{{ tools | tojson }}{% endif %}"
    template = ours.tokenizer.chat_template
    assert template.startswith("{{ bos_token }}")
    ours.tokenizer.chat_template = template.replace("}}", "}}" + written, 1)
    write(ours, folder, plain=False)
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    rows = [judged_pairs()[0] | {"tools": t} for t in (tools, json.dumps(tools))]
    file = tmp_path / "judged.jsonl"
    file.write_text(json.dumps(rows[0]))
    expected = like.read(str(file), "posterior", exports.LATENT, "ours")(ours)
    model = loaded(torch, folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in rows:
        mix = list(model.mix_like([row], tokenizer).values())
        np.testing.assert_allclose(mix, [w for _, w in expected.mix], atol=1e-5)


def test_a_beam_has_the_score_that_we_give_its_tokens_under_its_prompt_s_z(torch, lpc):
    ours, model = lpc()
    pad, rows = ours.tokenizer.pad_token_id, prompts()
    inputs = left_padded(torch, rows, pad)
    made = model.generate(
        **inputs,
        max_new_tokens=6,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    width, eos = inputs["input_ids"].shape[1], ours.tokenizer.eos_token_id
    found = answers(made.sequences, width, eos)
    for index, answer in enumerate(found):
        prompt = rows[index // 2]
        z = exports.vector(ours, prompt, MEAN)
        logp = exports.logp(ours, prompt + answer, z)[len(prompt) - 1 : -1]
        score = sum(step[token] for step, token in zip(logp, answer, strict=True))
        assert float(made.sequences_scores[index]) == pytest.approx(score, abs=1e-4)


def test_draws_follow_the_prior(torch, lpc):
    """20,000 hard draws of one prompt: a share's standard error is below 0.004."""
    ours, model = lpc()
    torch.manual_seed(0)
    prompt = prompts()[1]
    hidden = torch.tensor(exports.hidden_states(ours, prompt)[-1])
    drawn = model.code_weights(hidden.expand(20_000, -1), "sample", 1e-3)
    prior = model.code_weights(hidden[None])[0].detach().numpy()
    found = drawn.detach().mean(0).numpy()
    np.testing.assert_allclose(found, prior, atol=0.015)
    assert 0.1 < prior.max() < 0.95


def test_scoring_reads_z_where_the_prompt_ends(torch, lpc):
    """By its length, or where labels begin; padding on either side."""
    ours, model = lpc()
    rows = prompts()[:3]
    whole = [row + expected(ours)[i] for i, row in enumerate(rows)]
    width = max(map(len, whole))
    for side in ("left", "right"):

        def padded(values, filler, side=side):
            gap = [filler] * (width - len(values))
            return gap + values if side == "left" else values + gap

        ids = torch.tensor([padded(tokens, 2) for tokens in whole])
        mask = torch.tensor([padded([1] * len(tokens), 0) for tokens in whole])
        labels = torch.tensor(
            [
                padded([IGNORED] * len(row) + tokens[len(row) :], IGNORED)
                for row, tokens in zip(rows, whole, strict=True)
            ]
        )
        inputs = {"input_ids": ids, "attention_mask": mask}
        # Positions are counted from the first token, as generate does.
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        lengths = torch.tensor([len(row) for row in rows])
        with torch.no_grad():
            by_length = model(**inputs, prompt_lengths=lengths)
            by_labels = model(**inputs, labels=labels)
        torch.testing.assert_close(by_length.logits, by_labels.logits)
        for index, (row, tokens) in enumerate(zip(rows, whole, strict=True)):
            z = exports.vector(ours, row, MEAN)
            wanted = exports.logp(ours, tokens, z)[len(row) - 1 :]
            at = mask[index].bool()
            found = by_length.logits[index][at].log_softmax(-1)[len(row) - 1 :]
            np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4, rtol=0)
        scored = labels != IGNORED
        logp = by_labels.logits[:, :-1].log_softmax(-1)
        picked = logp.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
        assert float(by_labels.loss) == pytest.approx(
            float(-picked[scored[:, 1:]].mean()), rel=1e-5
        )


def test_decoding_by_hand_hands_z_on_and_is_refused_without_it(torch, lpc):
    ours, model = lpc()
    prompt = prompts()[1]
    tokens = list(prompt)
    with torch.no_grad():
        output = model(torch.tensor([prompt]), use_cache=True)
        for _ in range(4):
            tokens.append(int(output.logits[0, -1].argmax()))
            last = torch.tensor([tokens[-1:]])
            with pytest.raises(ValueError, match="code_vector must be given"):
                model(last, cache=output.cache)
            z = output.code_vector
            output = model(last, cache=output.cache, code_vector=z)
    assert tokens[len(prompt) :] == expected(ours)[1][:4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lpc_code": 6}, "codes from 0 to 5"),
        ({"lpc_mix": {0: 0.5, 1: 0.6}}, "sum to 1, got 1.1"),
        ({"lpc_how": "median"}, "lpc_how must be one of"),
        ({"lpc_how": "sample", "lpc_temperature": 0.0}, "lpc_temperature above 0"),
        ({"prompt_lengths": [0]}, "a prompt of at least one token"),
        ({"prompt_lengths": [99]}, "a prompt of at least one token"),
        ({"labels": [[5, 6, 7]]}, "Give prompt_lengths, or mask the prompt"),
    ],
)
def test_what_makes_no_z_is_refused(options, message, torch, lpc):
    _, model = lpc()
    given = {
        name: torch.tensor(value) if isinstance(value, list) else value
        for name, value in options.items()
    }
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[5, 6, 7]]), **given)


def test_without_trust_the_codes_are_not_dropped_in_silence(torch, folders):
    from transformers import AutoModelForCausalLM

    _, folder = folders("tiny_llama")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_a_plain_model_loads_beside_one_with_codes_as_what_it_is(torch, lpc):
    lpc()
    model = loaded(torch, exports.GOLDEN / "tiny_llama")
    assert type(model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["tiny_mistral", "tiny_llama_tied"])
def test_what_transformers_saves_again_comes_back(name, torch, lpc, tmp_path):
    ours, model = lpc(name)
    model.save_pretrained(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    again = loading.load(str(tmp_path), mesh=ours.mesh, dtype=jnp.dtype("float32"))
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    assert again.latent == ours.latent


def test_in_bfloat16_the_latent_stays_in_fp32(torch, lpc):
    ours, model = lpc(dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    codebook = model.latent.codebook
    np.testing.assert_array_equal(codebook.detach(), ours.params["latent"]["codebook"])
    assert all(map(len, generate(torch, ours, model, prompts())))


# --- as a bias ------------------------------------------------------------------------


def bias_file(ours, tmp_path):
    """The file of --bias, its prompts' ids, and what it holds."""
    from safetensors.numpy import load_file

    texts = ["Which bird sings?", "Say it in one word: how many ships?"]
    file = tmp_path / "codes.safetensors"
    ids = [
        ours.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for text in texts
    ]
    bias.write(ours, [np.asarray(row, np.int32) for row in ids], MEAN, file)
    return file, ids, load_file(file)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_llama_tied"])
def test_a_bias_on_the_plain_model_is_the_model_with_codes(name, torch, lpc, tmp_path):
    ours, model = lpc(name)
    write(ours, tmp_path / "plain", plain=True)
    decoder = loaded(torch, tmp_path / "plain")
    _, ids, held = bias_file(ours, tmp_path)
    for prompt, weights in zip(ids, held["weights"], strict=True):
        z = exports.vector(ours, prompt, MEAN)
        np.testing.assert_allclose(
            weights @ held["code_bias"],
            model.code_bias(torch.tensor(weights[None]))[0].detach(),
            atol=1e-5,
        )
        with torch.no_grad():
            logits = decoder(torch.tensor([prompt])).logits[0]
        biased = logits + torch.tensor(weights @ held["code_bias"])
        found = biased.log_softmax(-1).numpy()
        plain = logits.log_softmax(-1).numpy()
        wanted = exports.logp(ours, prompt, z)
        print(f"{name}: log-probs {np.abs(found - wanted).max():.1e} apart")
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
        assert np.abs(plain - wanted).max() > 1


@pytest.fixture
def vllm_module(torch, monkeypatch):
    """Our file beside a stand-in of the part of vLLM's V1 interface that it uses."""
    import importlib.util

    class AdapterLogitsProcessor:
        def __init__(self, vllm_config, device, is_pin_memory):
            self.requests = {}

        def add(self, row, params):
            processor = self.new_req_logits_processor(params)
            if processor is not None:
                self.requests[row] = processor

        def apply(self, logits):
            for row, processor in self.requests.items():
                logits[row] = processor([], logits[row])
            return logits

    names = "vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor"
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].AdapterLogitsProcessor = AdapterLogitsProcessor
    file = Path(export.__file__).parent / "out" / "lpc_vllm.py"
    spec = importlib.util.spec_from_file_location("lpc_vllm", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_processor_for_vllm_biases_the_requests_that_bring_weights(
    torch, folders, vllm_module, tmp_path, monkeypatch
):
    ours, _ = folders("tiny_llama")
    file, ids, held = bias_file(ours, tmp_path)
    monkeypatch.setenv("LPC_CODES", str(file))
    processor = vllm_module.LpcLogitsProcessor(None, torch.device("cpu"), False)
    weights = held["weights"][0].tolist()
    processor.add(1, types.SimpleNamespace(extra_args={"lpc_weights": weights}))
    processor.add(0, types.SimpleNamespace(extra_args=None))
    zero = np.zeros(ours.architecture.width)
    plain = torch.tensor(exports.logp(ours, ids[0], zero)[-1]).repeat(2, 1)
    found = processor.apply(plain.clone())
    torch.testing.assert_close(found[0], plain[0])
    z = exports.vector(ours, ids[0], MEAN)
    wanted = exports.logp(ours, ids[0], z)[-1]
    np.testing.assert_allclose(
        found[1].log_softmax(-1).numpy(), wanted, atol=1e-5, rtol=0
    )
    assert not processor.is_argmax_invariant()
    for wrong in ([1.0], [0.3] * 6):
        params = types.SimpleNamespace(extra_args={"lpc_weights": wrong})
        with pytest.raises(ValueError, match="lpc_weights must be 6 numbers that sum"):
            processor.add(2, params)
