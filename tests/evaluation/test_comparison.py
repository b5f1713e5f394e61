"""Log-probs, rewards, accuracies and margins of pairs, each with a second source."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from lpc_jax import config as cfg
from lpc_jax import loss_table, sharding
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.report import Drops
from lpc_jax.evaluation import comparison, report
from lpc_jax.runtime import loading, reading, steering
from lpc_jax.runtime.policy import Policy
from scripts import evaluate
from tests import runs
from tests.data import tiny_tokenizers

RULES = pair_data.rules(cfg.Data(train="none", max_length=128, max_prompt_length=64))
LENGTHS: dict[str, Any] = {"max_length": 128, "max_prompt_length": 64}


def mesh(count: int = 1) -> Mesh:
    return sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:count])


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """LPC-DPO, evaluated by training itself at its end."""
    folder = tmp_path_factory.mktemp("pairs")
    made = runs.config(
        folder,
        latent={"final_temperature": 0.7, "temperature_schedule": "linear"},
        training={"steps": 2, "checkpoint_every": None},
    )
    return runs.train(made)


@pytest.fixture(scope="module")
def lpc(trained: runs.Run) -> Policy:
    return loading.load(str(trained.folder), mesh=mesh())


@pytest.fixture(scope="module")
def plain() -> Policy:
    return loading.load(str(runs.MODEL), mesh=mesh())


def tokenized(one: Policy, limit: int | None = 8) -> list[TokenizedPair]:
    some, drops = pair_data.read([str(runs.PAIRS)], split=None, limit=limit)
    return pair_data.tokenize(some, one.tokenizer, drops, **RULES)[0]


def score(one: Policy, some: list[TokenizedPair], how: Any, seed: int = 0) -> Any:
    return reading.score(one, some, steering=how, seed=seed)


# --- log-probabilities ----------------------------------------------------------------


def in_order(some: list[TokenizedPair]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(p.prompt, a) for p in some for a in (p.chosen, p.rejected)]


def hidden_states(one: Policy, some: list[TokenizedPair]) -> jax.Array:
    """Of one padded sequence per answer."""
    answers = in_order(some)
    width = max(len(prompt) + len(answer) for prompt, answer in answers)
    ids = np.zeros((len(answers), width), np.int32)
    for row, (prompt, answer) in zip(ids, answers, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    same = jnp.zeros_like(ids)
    positions = jnp.broadcast_to(jnp.arange(width), ids.shape)
    return one.network.decoder(jnp.asarray(ids), positions, same, same)


def unpacked(
    one: Policy, some: list[TokenizedPair], hidden: jax.Array, how: str | None
) -> np.ndarray:
    """Second source: sequence by sequence, in float64 NumPy.

    ``how`` is written out anew: the prior's mean, its largest code, code 3, a mix, or a
    Gumbel-softmax draw.
    """
    module = one.network
    head = np.asarray(module.decoder.head_weight, np.float64)
    found = []
    for number, (prompt, answer) in enumerate(in_order(some)):
        states = np.asarray(hidden[number], np.float64)
        last = len(prompt) - 1
        if how is not None:
            logits = module.latent.prior_mlp(hidden[number, last])
            weights = np.asarray(chosen_weights(logits, how, some[number // 2].id))
            states = states + weights @ np.asarray(module.latent.codebook, np.float64)
        scores = states[last : last + len(answer)] @ head.T
        top = scores.max(axis=1, keepdims=True)
        logp = scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))
        found.append(logp[np.arange(len(answer)), answer].sum())
    return np.asarray(found).reshape(-1, 2)


def chosen_weights(logits: Any, how: str, pair_id: int) -> Any:
    if how == "sample":  # tau of the last step is 0.7
        key = jax.random.fold_in(jax.random.key(0), pair_id)
        logits = (logits + jax.random.gumbel(key, logits.shape)) / 0.7
    exponentials = np.exp(np.asarray(logits, np.float64))
    return {
        "mean": exponentials / exponentials.sum(),
        "sample": exponentials / exponentials.sum(),
        "argmax": np.eye(8)[np.argmax(logits)],
        "code": np.eye(8)[3],
        "mix": 0.25 * np.eye(8)[1] + 0.75 * np.eye(8)[6],
    }[how]


def test_a_model_scores_packed_pairs_as_one_sequence_per_answer(plain):
    some = tokenized(plain)
    expected = unpacked(plain, some, hidden_states(plain, some), None)
    np.testing.assert_allclose(score(plain, some, None), expected, rtol=2e-5)


@pytest.fixture(scope="module")
def lpc_states(lpc: Policy) -> jax.Array:
    return hidden_states(lpc, tokenized(lpc))


@pytest.mark.parametrize("how", ["mean", "sample", "argmax", "code", "mix"])
def test_each_choice_of_z_enters_as_written_out(lpc, lpc_states, how):
    some = tokenized(lpc)
    assert lpc.latent is not None
    if how == "code":
        chosen = steering.code("3", 8)
    elif how == "mix":
        chosen = steering.mix("1:0.25,6:0.75", 8)
    else:
        chosen = steering.of_settings(lpc.latent, how)
    found = score(lpc, some, chosen)
    np.testing.assert_allclose(found, unpacked(lpc, some, lpc_states, how), rtol=2e-5)
    others = {"mean", "argmax", "code"} - {how}
    for other in others:  # and the choice matters
        assert np.abs(found - unpacked(lpc, some, lpc_states, other)).max() > 1e-3


def test_a_pairs_draw_depends_on_its_id_and_the_seed_alone(lpc):
    how = steering.of_settings(lpc.latent, "sample")
    some = tokenized(lpc)
    whole = score(lpc, some, how)
    some_of_them = score(lpc, some[:2:-1], how)
    np.testing.assert_allclose(some_of_them, whole[:2:-1], rtol=1e-5)
    assert np.abs(score(lpc, some, how, seed=1) - whole).min() > 1e-6


def test_scores_do_not_depend_on_the_number_of_devices(plain, monkeypatch):
    some = tokenized(plain)
    spread = loading.load(str(runs.MODEL), mesh=mesh(4))
    monkeypatch.setattr(reading, "GROUP", 3)  # nor on how many are packed together
    np.testing.assert_allclose(
        score(spread, some, None), score(plain, some, None), rtol=1e-5
    )


def test_weights_that_are_not_finite_are_refused(plain):
    decoder = dict(plain.params["decoder"])
    decoder["embedding"] = decoder["embedding"] * np.nan
    broken = dataclasses.replace(plain, params={"decoder": decoder})
    with pytest.raises(ValueError, match=r"finite log-probability, .* on 2 of 2 pairs"):
        score(broken, tokenized(plain, 2), None)


# --- rewards --------------------------------------------------------------------------


# --- a contest ------------------------------------------------------------------------


def compare(**options: Any) -> comparison.Comparison:
    flags = [options.pop("system"), "--pairs", str(runs.PAIRS)]
    arguments = evaluate._parser().parse_args(flags)
    vars(arguments).update(options)
    return comparison.compare(arguments, mesh(), on_progress=quiet)


def line(groups: list[report.Group], source: str | None, who: str) -> Any:
    (group,) = (g for g in groups if g.source == source)
    (found,) = (one for one in group.lines if one.who == who)
    return found


def test_a_run_has_the_numbers_that_training_logged(trained):
    files = (trained.config.data.eval,)
    held = compare(system=str(trained.folder), pairs=files)
    groups = report.summarize(held, resamples=10, seed=0)
    logged = trained.lines("eval")[-1]
    ours = line(groups, None, "system")
    assert ours.accuracy.mean == pytest.approx(logged["reward/accuracy"])
    assert ours.margin.mean == pytest.approx(logged["reward/margin"], rel=1e-4)
    of_sources = {
        name.removeprefix("reward/accuracy/"): value
        for name, value in logged.items()
        if name.startswith("reward/accuracy/")
    }
    assert len(of_sources) > 2
    assert of_sources == {
        group.source: pytest.approx(line(groups, group.source, "system").accuracy.mean)
        for group in groups[1:]
    }
    main, start = held.entries
    np.testing.assert_allclose(main.reference_logp, start.logp, rtol=1e-6)
    assert (start.role, start.reward.name) == ("start", "mean_logp")
    assert {one.who for one in groups[0].lines} == {
        "system",
        "start",
        "longer",
        "system - longer",
    }


def test_under_one_reward_the_start_is_compared_pair_by_pair(trained, plain):
    held = compare(system=str(trained.folder), reward="mean_logp", limit=8)
    main, start = held.entries
    np.testing.assert_allclose(
        start.logp, score(plain, tokenized(plain), None), rtol=1e-6
    )
    groups = report.summarize(held, resamples=10, seed=0)
    found = line(groups, None, "system - start")
    per_token = [one.logp / one.lengths for one in (main, start)]
    margins = [means[:, 0] - means[:, 1] for means in per_token]
    assert found.margin.mean == pytest.approx(np.mean(margins[0] - margins[1]))
    rights = [np.mean(margin > 0) for margin in margins]
    assert found.accuracy.mean == pytest.approx(rights[0] - rights[1])


@pytest.mark.parametrize(
    ("reward", "over_reference"), [("sppo_hard", True), ("orpo", False)]
)
def test_any_loss_s_reward_can_be_named(trained, reward, over_reference):
    main, _ = compare(system=str(trained.folder), reward=reward, limit=4).entries
    assert (main.reference is not None) == over_reference
    compared = main.logp.astype(np.float64)
    if over_reference:
        expected = 0.001 * (compared - main.reference_logp)
    else:
        expected = 0.1 * compared / main.lengths
    np.testing.assert_allclose(main.rewards, expected, rtol=1e-6)


def test_another_system_has_the_same_reward_and_reference(trained):
    held = compare(
        system=str(trained.folder),
        against=str(runs.MODEL),
        no_start=True,
        code="3",
        limit=4,
    )
    main, other = held.entries
    assert main.z == "codes 3: 1"
    assert other.z is None
    assert other.reward == main.reward
    np.testing.assert_array_equal(other.reference_logp, main.reference_logp)
    np.testing.assert_array_equal(other.rewards, 0)  # it is the reference


def test_pairs_that_another_tokenizer_drops_are_left_out_for_all(tmp_path, plain):
    copy = Path(shutil.copytree(runs.MODEL, tmp_path / "bytes"))
    tiny_tokenizers.chatml().save_pretrained(copy)
    held = compare(
        system=str(runs.MODEL), against=str(copy), truncation="drop", **LENGTHS
    )
    main, other = held.entries
    assert 0 < held.left_out < 40
    assert len(held.texts) == 40 - held.left_out == len(main.logp) == len(other.logp)
    assert np.all(other.lengths >= main.lengths)  # a token a byte
    kept = {text.index for text in held.texts}
    some = [pair for pair in tokenized(plain, None) if pair.id in kept]
    np.testing.assert_array_equal(main.lengths, pair_data.lengths(some))
    assert any("tokenizers differ" in said for said in report.header(held))


def test_a_reference_must_share_the_vocabulary(plain):
    known = plain.architecture.vocabulary
    other = dataclasses.replace(plain.architecture, vocabulary=known + 1)
    wide = dataclasses.replace(plain, architecture=other)
    with pytest.raises(ValueError, match=f"{known} tokens, got {known + 1}. Leave it"):
        plain.require_vocabulary(wide, "Leave it.")


# --- pairs as text --------------------------------------------------------------------


def test_files_are_read_one_after_the_other_and_a_prompt_is_known_again(tmp_path):
    rows = runs.pairs()[:3]
    again = [rows[1] | {"source": "elsewhere", "chosen": rows[0]["chosen"]}]
    files = [
        str(runs.write_pairs(tmp_path / "a.jsonl", rows)),
        str(runs.write_pairs(tmp_path / "b.jsonl", again)),
    ]
    some, drops = pair_data.read(files, split=None, limit=None)
    assert [one.index for one in some] == [0, 1, 2, 3]
    assert [one.origin for one in some][2:] == ["a.jsonl:3", "b.jsonl:1"]
    assert drops.total == 0
    keys = [pair_data.prompt_key(one) for one in some]
    assert keys[3] == keys[1]
    assert len(set(keys)) == 3
    limited, _ = pair_data.read(files, split=None, limit=1)
    assert [one.origin for one in limited] == ["a.jsonl:1", "b.jsonl:1"]


def test_no_pair_is_too_long_for_its_row(plain):
    some, drops = pair_data.read([str(runs.PAIRS)], split=None, limit=None)
    whole, _ = pair_data.tokenize(some, plain.tokenizer, drops, **RULES)
    longest = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in whole)
    assert max(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in whole) > longest
    rules = RULES | {"max_length": longest, "truncation": "drop"}
    assert len(pair_data.tokenize(some, plain.tokenizer, drops, **rules)[0]) == 40


# --- the report -----------------------------------------------------------------------


def made_up(**changes: Any) -> comparison.Entry:
    """Of six pairs on four prompts; margins 1, -1, 0, 2, 3, -4 by mean_logp."""
    return dataclasses.replace(
        comparison.Entry(
            role="system",
            name="made up",
            reference=None,
            z=None,
            reward=loss_table.reward("mean_logp", None),
            weights_digest="",
            tokenizer_digest="",
            logp=np.asarray(
                [[-2, -6], [-4, -2], [-4, -4], [-2, -6], [-2, -8], [-10, -2]],
                np.float32,
            ),
            lengths=np.asarray([[2, 3], [2, 2], [4, 4], [2, 2], [2, 2], [2, 2]]),
            reference_logp=None,
        ),
        **changes,
    )


@pytest.fixture
def by_hand() -> comparison.Comparison:
    some, _ = pair_data.read([str(runs.PAIRS)], split=None, limit=6)
    sources = ["a", "a", "b", "b", "b", "b"]
    some = [
        dataclasses.replace(one, source=source, prompt=some[prompt].prompt)
        for one, source, prompt in zip(some, sources, [0, 0, 1, 2, 3, 3], strict=True)
    ]
    flipped = made_up(role="against", logp=made_up().logp[:, ::-1])
    rules = pair_data.rules(cfg.Data(train="none"))
    _, said = pair_data.tokenize(some, tiny_tokenizers.chatml(), Drops([]), **rules)
    return comparison.Comparison((made_up(), flipped), tuple(some), RULES, said, 0)


def test_accuracy_margin_ties_and_length_by_hand(by_hand):
    groups = report.summarize(by_hand, resamples=50, seed=0)
    assert [(g.source, g.pairs, g.prompts) for g in groups] == [
        (None, 6, 4),
        ("a", 2, 1),
        ("b", 4, 3),
    ]
    ours = line(groups, None, "system")
    # Right: 1, 2, 3 of six; 0 is a tie, and wrong.
    assert ours.accuracy.mean == pytest.approx(3 / 6)
    assert ours.margin.mean == pytest.approx((1 - 1 + 0 + 2 + 3 - 4) / 6)
    assert ours.ties == 1
    # The rejected one is longer once, else a tie counts a half.
    longer = line(groups, None, "longer")
    assert longer.accuracy.mean == pytest.approx(5 * 0.5 / 6)
    assert longer.ties == 5
    assert longer.margin is None
    assert line(groups, "b", "system").accuracy.mean == pytest.approx(2 / 4)
    alone = line(groups, "a", "system").accuracy
    assert (alone.low, alone.high) == (None, None)


def test_a_difference_is_of_the_same_draws(by_hand):
    groups = report.summarize(by_hand, resamples=2000, seed=0)
    ours, theirs, difference = (
        line(groups, "b", who) for who in ("system", "against", "system - against")
    )
    # Of three prompts: margins 0 | 2 | 3, -4, and of the other the opposite but for
    # lengths: all are of 2 tokens or 4 and 4.
    assert difference.margin.mean == pytest.approx(2 * ours.margin.mean)
    assert theirs.margin.mean == pytest.approx(-ours.margin.mean)
    assert difference.margin.low == pytest.approx(2 * ours.margin.low)
    assert difference.margin.high == pytest.approx(2 * ours.margin.high)


def test_the_record_holds_every_pair_and_its_margins_are_the_tables(by_hand):
    groups = report.summarize(by_hand, resamples=50, seed=0)
    record = json.loads(
        json.dumps(
            report.as_json(by_hand, groups, command=["evaluate"], resamples=50, seed=0)
        )
    )
    margins = [pair["said"]["system"]["margin"] for pair in record["pairs"]]
    assert margins == pytest.approx([1, -1, 0, 2, 3, -4])
    first = record["pairs"][0]
    assert first["said"]["system"]["logp"] == [-2, -6]
    assert first["said"]["system"]["lengths"] == [2, 3]
    assert (first["origin"], first["source"]) == ("pairs.jsonl:1", "a")
    assert len({pair["prompt"] for pair in record["pairs"]}) == 4
    assert record["groups"][0]["lines"][0]["margin"]["mean"] == pytest.approx(1 / 6)
    assert record["contestants"]["system"]["reward"]["formula"] == "log pi(y|x)/|y|"
