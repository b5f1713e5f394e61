"""The front door: what the README shows, on the tiny golden model."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import lpc_jax as lpc
from lpc_jax import sharding
from lpc_jax.data import templates
from tests import runs
from tests.conftest import REPOSITORY

SHORT = {"max_length": 128, "max_prompt_length": 64}
PACKING = lpc.Packing(pairs_per_step=8, rows=2, row_length=256)


def load(path=runs.MODEL, **options):
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    return lpc.load(str(path), mesh=mesh, **options)


@pytest.fixture(scope="module")
def policy():
    return load(latent=lpc.Latent(num_codes=8, effect=1.0))


@pytest.fixture(scope="module")
def pairs(policy):
    return lpc.read_pairs(runs.PAIRS, policy, limit=16, **SHORT)


@pytest.fixture(scope="module")
def metrics():
    return []


@pytest.fixture(scope="module")
def run(policy, pairs, metrics):
    return lpc.train(
        policy,
        pairs,
        lpc.Simpo(beta=2.0, gamma=1.0),
        steps=3,
        held_out=pairs,
        callback=metrics.append,
        packing=PACKING,
    )


def test_importing_the_package_imports_no_jax():
    program = (
        "import sys, lpc_jax; assert 'jax' not in sys.modules;"
        "assert all(hasattr(lpc_jax, name) for name in dir(lpc_jax))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


def test_each_step_is_told(run, metrics):
    assert [one["step"] for one in metrics] == [1, 2, 3]
    assert metrics == run.history
    assert run.before["loss/preference"] != run.after["loss/preference"]


def test_the_policy_that_was_given_stays_as_it_is(policy, pairs, run):
    again = load(latent=lpc.Latent(num_codes=8, effect=1.0))
    np.testing.assert_array_equal(
        again.score(pairs, code=1).logp, policy.score(pairs, code=1).logp
    )
    assert policy.digest() != run.policy.digest()


def test_scores_are_what_training_logs(run, pairs):
    scores = run.policy.score(pairs)
    assert scores.accuracy == pytest.approx(run.after["reward/accuracy"])
    margin = scores.rewards[:, 0] - scores.rewards[:, 1]
    assert margin.mean() == pytest.approx(run.after["reward/margin"], abs=1e-5)
    for beliefs in (scores.prior, scores.posterior):
        np.testing.assert_allclose(beliefs.sum(axis=1), 1, atol=1e-5)


def test_an_iterated_run_is_the_same(policy, pairs, metrics, run):
    by_hand = lpc.start(
        policy, pairs, lpc.Simpo(beta=2.0, gamma=1.0), steps=3, packing=PACKING
    )
    first = next(iter(by_hand))  # a cell that is interrupted: the next goes on
    losses = [one["loss/total"] for one in (first, *by_hand)]
    assert losses == [one["loss/total"] for one in metrics]


def test_plain_text_is_read_trained_and_answered_as_it_stands(tmp_path):
    base = load(template=None)
    texts = [{"prompt": f"{n}:", "chosen": " a", "rejected": " b"} for n in range(8)]
    pairs = lpc.read_pairs(texts, base, **SHORT)
    assert base.tokenizer.decode(pairs.tokens[3].prompt) == "<|begin|>3:"
    packing = dataclasses.replace(PACKING, row_length=32)
    options = {"steps": 1, "folder": tmp_path / "run", "packing": packing}
    run = lpc.train(base, pairs, lpc.Simpo(gamma=1.0), **options)
    for again in (load(tmp_path / "run"), load(run.policy.save(tmp_path / "out"))):
        tokens = lpc.read_pairs(texts, again, **SHORT).tokens
        assert [pair.key() for pair in tokens] == [p.key() for p in pairs.tokens]
        assert len(again.generate("3:", max_new_tokens=2)) == 1
    with pytest.raises(lpc.UserError, match=r"data\.template=None reads texts"):
        lpc.read_pairs(runs.PAIRS, base, **SHORT)
    with pytest.raises(lpc.UserError, match="template goes with the policy"):
        lpc.read_pairs(texts, base, template=None)
    with pytest.raises(lpc.UserError, match="must read 'thinking'"):
        load(template_arguments={"thinking": False})
    with pytest.raises(lpc.UserError, match="template_arguments must be a dict"):
        load(template_arguments={"thinking": [False]})


def test_z_is_chosen_in_one_way(run, pairs):
    ask = {"prompts": ["Why?", [{"role": "user", "content": "And?"}]]}
    for how in ({"z": "mean"}, {"code": 7}, {"mix": {3: 0.7, 1: 0.3}}, {"like": pairs}):
        assert len(run.policy.generate(**ask, max_new_tokens=3, **how)) == 2
    with pytest.raises(lpc.UserError, match="in one way, got z and code"):
        run.policy.generate(**ask, z="mean", code=7)
    with pytest.raises(lpc.UserError, match="expected a code from 0 to 7, got '8'"):
        run.policy.generate(**ask, code=8)


def test_a_saved_policy_says_the_same(run, pairs, tmp_path):
    again = load(run.policy.save(tmp_path / "out"))
    np.testing.assert_allclose(
        again.score(pairs).logp, run.policy.score(pairs).logp, atol=1e-3
    )
    with pytest.raises(lpc.UserError, match="which has its own"):
        load(tmp_path / "out", latent=lpc.Latent())


def test_rewards_over_a_reference_are_those_of_the_run(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the reference is kept
    base = load(latent=lpc.Latent(num_codes=4))
    options = {"steps": 1, "held_out": pairs, "packing": PACKING}
    run = lpc.train(base, pairs, lpc.Dpo(beta=0.1), **options)
    scores = run.policy.score(pairs, reference=base)
    # Rafailov et al. 2023, after eq. 5: beta times the log-ratio to the start.
    ratio = scores.logp.astype(np.float64) - load().score(pairs).logp
    np.testing.assert_allclose(scores.rewards, 0.1 * ratio, atol=1e-6)
    margin = scores.rewards[:, 0] - scores.rewards[:, 1]
    assert margin.mean() == pytest.approx(run.after["reward/margin"], abs=1e-5)
    assert scores.accuracy == pytest.approx(run.after["reward/accuracy"])
    alone = run.policy.score(pairs).rewards
    np.testing.assert_allclose(alone, 0.1 * scores.logp, rtol=1e-6)
    fewer = dataclasses.replace(base.architecture, vocabulary=500)
    other = dataclasses.replace(base, architecture=fewer)
    refusal = "must share the vocabulary of .* 512 tokens, got 500"
    with pytest.raises(lpc.UserError, match=refusal):
        run.policy.score(pairs, reference=other)
    with pytest.raises(lpc.UserError, match=refusal):
        lpc.start(base, pairs, lpc.Dpo(beta=0.1), reference=other, **options)


@pytest.mark.parametrize(
    ("loss", "over_reference", "per_token"),
    [
        (lpc.Hinge(), True, False),
        (lpc.SigmoidNorm(), True, True),
        (lpc.Cpo(), False, False),
    ],
)
def test_rewards_are_of_the_run_s_loss(
    run, policy, pairs, loss, over_reference, per_token
):
    other = dataclasses.replace(run.work.config, loss=loss)
    trained = dataclasses.replace(run.policy, run=other)
    scores = trained.score(pairs, reference=policy)
    expected = scores.logp.astype(np.float64)
    if over_reference:
        expected -= load().score(pairs).logp
    if per_token:
        expected /= [[len(pair.chosen), len(pair.rejected)] for pair in pairs.tokens]
    np.testing.assert_allclose(scores.rewards, loss.beta * expected, atol=1e-6)


def test_a_run_with_a_folder_is_loaded_and_resumed(policy, pairs, run, tmp_path):
    unbroken = run.history[2]["loss/total"]
    folder, asked = tmp_path / "runs" / "mine", {"steps": 3, "packing": PACKING}
    asked["training"] = lpc.Training(log_every=1, samples=0, checkpoint_every=1)
    loss = lpc.Simpo(beta=2.0, gamma=1.0)
    begun = lpc.start(policy, pairs, loss, folder=folder, **asked)
    steps = iter(begun)
    assert [next(steps)["step"] for _ in range(2)] == [1, 2]
    with pytest.raises(lpc.UserError, match="must be new, got one that holds a run"):
        lpc.start(policy, pairs, loss, folder=folder, **asked)
    with pytest.raises(lpc.UserError, match="must be of no other live run"):
        lpc.start(policy, pairs, loss, folder=folder, resume=True, **asked)
    steps.close()  # as a notebook that is interrupted
    other = lpc.Simpo(beta=9.0, gamma=1.0)
    with pytest.raises(lpc.UserError, match=r"loss.beta: checkpoint 2.0, now 9.0"):
        lpc.train(policy, pairs, other, folder=folder, resume=True, **asked)
    said = []
    run = lpc.train(
        policy, pairs, loss, folder=folder, resume=True, say=said.append, **asked
    )
    (last,) = run.history  # as in the run that nothing interrupted
    assert (last["step"], last["loss/total"]) == (3, unbroken)
    assert "resumed after step 2" in said
    assert any(text.startswith("memory: predicted peak") for text in said)
    files = {"config.py", "manifest.json", "metrics.jsonl", "plot.png", "checkpoints"}
    assert {path.name for path in folder.iterdir()} == files
    assert not list(folder.parent.glob(".*.lock"))
    again = load(folder)
    assert again.digest() == run.policy.digest()
    assert again.config.loss == loss


def test_a_date_of_pairs_is_the_run_s_and_named_on_resume(tmp_path, monkeypatch):
    file, day = tmp_path / "template.jinja", datetime.date(2026, 11, 27)
    file.write_text(
        "{{ bos_token }}{{ strftime_now('%d %b') }}{% for m in messages %}"
        "[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(templates, "today", lambda: day)
    policy = load(chat_template=str(file), latent=None)

    def start(**of_pairs):
        pairs = lpc.read_pairs(runs.PAIRS, policy, limit=8, **SHORT, **of_pairs)
        how = {"folder": tmp_path / "run", "resume": True, "packing": PACKING}
        how["training"] = lpc.Training(log_every=1, samples=0, checkpoint_every=1)
        return iter(lpc.start(policy, pairs, lpc.Simpo(gamma=1.0), steps=2, **how))

    with contextlib.closing(start()) as steps:
        next(steps)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["data.date"] == "2026-11-27"
    day = datetime.date(2026, 11, 28)
    named = r"data.date: checkpoint '2026-11-27', now '2026-11-28'(.*\n)*.*"
    with pytest.raises(
        lpc.UserError, match=named + r"read_pairs\(\.\.\., date='2026-11-27'"
    ):
        next(start())
    assert [step["step"] for step in start(date="2026-11-27")] == [2]


@pytest.mark.parametrize("how", [{"adapters": lpc.Adapters(rank=2)}, {"frozen": True}])
def test_what_is_not_trained_stays(how, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where reference and states are kept
    base = load(latent=lpc.Latent(num_codes=4), **how)
    run = lpc.train(base, pairs, lpc.Dpo(beta=0.1), steps=1, packing=PACKING)
    trained, start = run.policy.whole["decoder"], base.whole["decoder"]
    for ours, theirs in zip(
        jax.tree.leaves(trained), jax.tree.leaves(start), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert run.policy.digest() != base.digest()


def test_a_plain_policy_has_no_codes(pairs):
    plain = load()
    assert plain.score(pairs).prior is None
    with pytest.raises(lpc.UserError, match="needs codes"):
        plain.generate("Why?", code=1)
