"""A look at the codes says what training's own evaluation says, and more."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from lpc_jax import sharding
from lpc_jax.data import pairs as pair_data
from lpc_jax.evaluation.codes import look as looks
from lpc_jax.evaluation.codes import map as maps
from lpc_jax.evaluation.codes import page as pages
from lpc_jax.evaluation.codes.look import Look
from lpc_jax.runtime import loading, reading
from lpc_jax.runtime.policy import Policy
from tests import runs
from tests.data import tiny_tokenizers


def mesh(count: int = 1) -> Mesh:
    return sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:count])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


@pytest.fixture(scope="module")
def trained(folder: Path) -> runs.Run:
    """LPC-DPO on 13 held-out pairs, each with a prompt of its own."""
    made = runs.config(folder, training={"steps": 4, "eval_every": 4})
    return runs.train(made)


@pytest.fixture(scope="module")
def loaded(trained: runs.Run) -> Policy:
    return loading.load(str(trained.folder), mesh=mesh())


def look(policy: Policy, file: Path) -> Look:
    return looks.look(policy, str(file), split=None, limit=None, seed=0)


@pytest.fixture(scope="module")
def looked(loaded: Policy, folder: Path) -> Look:
    return look(loaded, runs.held_out_file(folder))


def test_it_agrees_with_what_training_logged(looked, trained):
    after = trained.result.after
    assert after is not None
    assert looked.report.kept == len(looked.prompts) == len(after.margins)
    for source, usage in after.usage_by_source.items():
        ours = [code.usage_by_source[source] for code in looked.codes]
        np.testing.assert_allclose(ours, usage, rtol=1e-5)
    found = looked.measures
    ours = {
        "code/source_nmi": found.nmi.value,
        "code/perplexity": found.perplexity,
        "code/dead": len(found.dead),
        "code/agreement": found.agreement,
        "latent/kl": found.kl,
    }
    theirs = {name: after.metrics[name] for name in ours}
    assert ours == pytest.approx(theirs, rel=1e-4)
    entropy = after.metrics["latent/prior_entropy"]
    assert found.codes_per_prompt == pytest.approx(np.exp(entropy), rel=1e-4)
    usage = [code.usage for code in looked.codes]
    assert sum(usage) == pytest.approx(1)
    assert sum(code.largest_share for code in looked.codes) == pytest.approx(1)


def test_several_devices_believe_the_same(loaded, trained, folder):
    several = loading.load(str(trained.folder), mesh=mesh(4))
    texts, drops = pair_data.read(
        [str(runs.held_out_file(folder))], split=None, limit=None
    )
    rules = pair_data.rules(loaded.config.data)
    pairs, _ = pair_data.tokenize(texts, loaded.tokenizer, drops, **rules)
    one, four = (reading.believe(asked, pairs) for asked in (loaded, several))
    np.testing.assert_allclose(four.prior, one.prior, atol=1e-5)
    np.testing.assert_allclose(four.posterior, one.posterior, atol=1e-5)
    # z is the prior's mean of the codebook.
    codebook = np.asarray(loaded.params["latent"]["codebook"], np.float64)
    weights = np.exp(one.prior.astype(np.float64))
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(one.vector, weights @ codebook, atol=1e-6)


def test_a_prompt_counts_once_however_many_pairs_share_it(loaded, looked, folder):
    rows = [
        json.loads(line)
        for line in runs.held_out_file(folder).read_text("utf-8").splitlines()
    ]
    first = rows[0]
    more = [
        first | {"chosen": first["rejected"], "rejected": first["chosen"]}
        for _ in range(3)
    ]
    again = look(loaded, runs.write_pairs(folder / "repeated.jsonl", rows + more))
    assert [prompt.pairs for prompt in again.prompts] == [4, *[1] * 12]
    assert again.report.kept == 16
    for ours, theirs in zip(again.codes, looked.codes, strict=True):
        assert ours.usage == pytest.approx(theirs.usage, rel=1e-5)
    assert again.measures.nmi.value == pytest.approx(looked.measures.nmi.value)
    # The posterior reads pairs.
    assert again.measures.kl != pytest.approx(looked.measures.kl, rel=1e-5)


def test_the_prompts_of_a_code_are_those_of_the_largest_probability(looked):
    text = {p.text for p in looked.prompts}
    assert len(text) == len(looked.prompts)
    for code in looked.codes:
        probabilities = [p for _, p in code.prompts]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len({i for i, _ in code.prompts}) == looks.PROMPTS_SHOWN
    # The largest code of a prompt gives it at least a uniform share.
    best = looked.prompts[looked.codes[looked.prompts[0].code].prompts[0][0]]
    assert best.code == looked.prompts[0].code


def test_the_tokens_of_a_system_are_codebook_times_head(loaded, looked):
    codebook = np.asarray(loaded.params["latent"]["codebook"], np.float64)
    head = np.asarray(loaded.network.decoder.head_weight, np.float64)
    effects = codebook @ head.T
    effects -= effects.mean(axis=1, keepdims=True)
    effects = effects[:, : len(loaded.tokenizer)]
    average = np.asarray([code.usage for code in looked.codes]) @ effects
    for code, effect in zip(looked.codes, effects, strict=True):
        own = effect - average
        for found, wanted in ((code.effect, effect), (code.own_effect, own)):
            assert [t.id for t in found.raised] == np.argsort(-wanted)[:16].tolist()
            assert [t.id for t in found.lowered] == np.argsort(wanted)[:16].tolist()
            np.testing.assert_allclose(
                [t.logit for t in found.raised], np.sort(-wanted)[:16] * -1, atol=1e-5
            )
        lengths = np.linalg.norm(effect) * np.linalg.norm(average)
        assert code.likeness == pytest.approx(effect @ average / lengths, abs=1e-4)


def test_a_token_is_readable():
    tokenizer = tiny_tokenizers.chatml()
    effect = np.zeros(len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    space, byte = (tokenizer.convert_tokens_to_ids(c) for c in ("Ġ", "â"))
    effect[[end, space, byte]] = 3, 2, -1
    found = looks.extremes(effect, tokenizer)
    raised = [(t.id, t.text, t.logit) for t in found.raised[:2]]
    assert raised == [(end, "<|im_end|>", 3.0), (space, "␣", 2.0)]
    assert (found.lowered[0].id, found.lowered[0].text) == (byte, "⟨E2⟩")


def clusters() -> np.ndarray:
    """Two groups of 10, far from each other in 5 dimensions."""
    rng = np.random.default_rng(0)
    far = 100 * np.repeat(np.eye(2, 5), 10, axis=0)
    return (far + rng.normal(size=(20, 5))).astype(np.float32)


def test_the_map_keeps_neighbours_and_is_the_same_each_time():
    drawn = maps.draw(clusters(), seed=0)
    assert drawn is not None
    distance = np.linalg.norm(drawn[:, None] - drawn[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert np.all((np.argmin(distance, axis=1) < 10) == (np.arange(20) < 10))
    np.testing.assert_array_equal(maps.draw(clusters(), seed=0), drawn)


def test_the_map_does_not_depend_on_the_scale_of_z():
    # A power of two scales without rounding, which t-SNE would blow up.
    small = maps.draw(clusters() * np.float32(2**-70), seed=0)
    np.testing.assert_array_equal(small, maps.draw(clusters(), seed=0))


@pytest.mark.parametrize("few", [clusters()[:4], np.ones((9, 5), np.float32)])
def test_too_few_points_and_one_z_have_no_map(few):
    assert maps.draw(few, seed=0) is None


def test_five_points_have_a_map():
    drawn = maps.draw(clusters()[:5], seed=0)
    assert drawn is not None
    assert np.all(np.isfinite(drawn))


def test_of_very_many_prompts_a_part_is_mapped(monkeypatch):
    monkeypatch.setattr(maps, "MAPPED", 12)
    places = maps.places(clusters(), seed=0)
    assert sum(place is not None for place in places) == 12


def make(policy: Policy, pairs: Path, output: Path) -> Path:
    codes = None if policy.latent is None else policy.latent.num_codes
    pages.require(codes, policy.name, output)
    return pages.write(look(policy, pairs), output)


def test_the_report_of_a_run(loaded, looked, folder):
    page = make(loaded, runs.held_out_file(folder), folder / "new" / "report")
    assert page == folder / "new" / "report" / "codes.html"
    numbers = json.loads(page.with_name("codes.json").read_text("utf-8"))
    assert numbers["measures"]["kl"] == pytest.approx(looked.measures.kl)
    assert len(numbers["codes"]) == 8
    assert {file.name for file in page.parent.iterdir()} == {"codes.html", "codes.json"}


@pytest.fixture(scope="module")
def plain() -> Policy:
    return loading.load(str(runs.MODEL), mesh=mesh())


def refused(*arguments: object) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        make(*arguments)  # pyright: ignore[reportArgumentType] -- as given
    return str(error.value)


def test_a_system_without_codes_is_refused(plain, tmp_path):
    assert refused(plain, runs.PAIRS, tmp_path / "new") == (
        f"--codes needs codes, got {runs.MODEL}, which has none (latent=None or a plain"
        " model). Leave it out, or name an LPC run."
    )
    assert not (tmp_path / "new").exists()


def test_an_output_that_is_no_folder_is_refused_before_any_pair_is_read(
    loaded, tmp_path
):
    file = tmp_path / "file"
    file.write_text("mine")
    message = refused(loaded, tmp_path / "none.jsonl", file / "report")
    assert message == (
        f"--output = '{file}/report' must be a folder that can be written to, got"
        f" {file}: Not a directory. Name another."
    )
    assert file.read_text() == "mine"


def test_pairs_that_are_not_there_are_refused(loaded, tmp_path):
    missing = tmp_path / "none.jsonl"
    message = refused(loaded, missing, tmp_path)
    assert message.startswith(f"--pairs = {str(missing)!r}: no such file")


def test_a_file_without_pairs_is_refused(loaded, tmp_path):
    empty = runs.write_pairs(tmp_path / "empty.jsonl", [])
    message = refused(loaded, empty, tmp_path)
    assert "holds no preference pair, expected at least one: it has no rows" in message


def test_without_scikit_learn_the_extra_is_named(loaded, tmp_path, monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    assert refused(loaded, tmp_path / "none.jsonl", tmp_path) == (
        "--codes needs the package 'scikit-learn' for its map of z, which is not"
        " installed. Run: pip install 'lpc-jax[eval]'."
    )


def test_beliefs_that_are_not_finite_are_refused(loaded, folder, tmp_path):
    latent = loaded.params["latent"]
    mlp = latent["prior_mlp"]
    broken = mlp | {"output_bias": mlp["output_bias"] * np.nan}
    params = loaded.params | {"latent": latent | {"prior_mlp": broken}}
    asked = dataclasses.replace(loaded, params=params)
    message = refused(asked, runs.held_out_file(folder), tmp_path)
    assert "must have finite beliefs over its codes, got nan or inf on 13 of 13" in (
        message
    )
