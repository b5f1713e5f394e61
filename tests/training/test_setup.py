"""Every setting that claims an effect has it: from the config to a run's first step."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lpc_jax import config as cfg
from lpc_jax import metrics, objective
from lpc_jax.data import pairs, templates
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.pairs import Pairs
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.runtime import compute, loading
from lpc_jax.training import run_folder, setup, start
from lpc_jax.training.run import Run
from tests import runs, tiny
from tests.harness import logits

# Where the effect of each setting is tested: a test of this file, or another file that
# speaks of the field.
TESTED_IN = {
    "model.path": "tests/scripts/test_train.py",
    "model.revision": "tests/test_sources.py",
    "model.tokenizer": "test_a_tokenizer_may_lie_elsewhere",
    "model.chat_template": "test_a_chat_template_file_replaces_the_model_s",
    "model.compute_dtype": "test_bfloat16_computes_otherwise_on_the_same_masters",
    "model.attention": "tests/models/test_attention.py",
    "model.remat": "test_remat_recomputes_blocks",
    "model.states_cache": "tests/training/test_frozen.py",
    "model.score_chunk": "test_score_chunks_change_no_number",
    "adapters.rank": "tests/models/test_adapters.py",
    "adapters.alpha": "tests/models/test_adapters.py",
    "adapters.targets": "tests/models/test_adapters.py",
    "adapters.base": "tests/models/test_quantisation.py",
    "latent.num_codes": "test_sizes_of_the_latent",
    "latent.hidden_width": "test_sizes_of_the_latent",
    "latent.kl_weight": "tests/test_objective.py",
    "latent.free_bits": "tests/test_objective.py",
    "latent.temperature": "tests/test_objective.py",
    "latent.final_temperature": "tests/test_objective.py",
    "latent.temperature_schedule": "tests/test_objective.py",
    "latent.draw": "tests/test_objective.py",
    "latent.prior_share": "tests/test_objective.py",
    "latent.inference": "tests/test_objective.py",
    "latent.posterior_input": "tests/models/test_latent.py",
    "latent.posterior_start": "test_a_prior_from_clusters_knows_of_the_posterior",
    "latent.pool": "tests/training/test_users.py",
    "latent.effect": "test_codes_start_with_the_effect_asked_for",
    "latent.effect_limit": "tests/training/test_step.py",
    "latent.backbone_gradient": "tests/test_objective.py",
    "latent.learning_rate": "tests/training/test_optimizer.py",
    "latent.codebook_rate": "tests/training/test_optimizer.py",
    "loss.beta": "test_each_loss_setting_changes_the_loss",
    "loss.label_smoothing": "test_each_loss_setting_changes_the_loss",
    "loss.sft_weight": "test_each_loss_setting_changes_the_loss",
    "loss.ld_alpha": "test_each_loss_setting_changes_the_loss",
    "loss.reduction": "test_each_loss_setting_changes_the_loss",
    "loss.gamma": "test_each_loss_setting_changes_the_loss",
    "loss.gamma_beta_ratio": "test_each_loss_setting_changes_the_loss",
    "data.train": "tests/scripts/test_train.py",
    "data.train_split": "test_each_set_is_read_from_its_own_split",
    "data.eval": "tests/training/test_loop.py",
    "data.eval_split": "test_each_set_is_read_from_its_own_split",
    "data.user": "tests/training/test_users.py",
    **{
        f"source.{name}": "tests/data/test_pairs.py"
        for name in ("path", "split", "limit", "weight", "name")
    },
    "data.ranked": "tests/data/test_ranked.py",
    "data.cache": "tests/data/test_kept.py",
    "data.limit": "test_limits_take_the_first_pairs",
    "data.eval_limit": "test_limits_take_the_first_pairs",
    "data.max_length": "test_lengths_and_truncation_reach_the_tokens",
    "data.max_prompt_length": "test_lengths_and_truncation_reach_the_tokens",
    "data.truncation": "test_lengths_and_truncation_reach_the_tokens",
    "data.prefix_mismatch": "test_a_prefix_mismatch_is_cut_or_an_error",
    "data.template": "test_template_none_reads_text_as_it_stands",
    "data.template_arguments": "test_template_arguments_reach_the_tokens",
    "data.date": "test_a_date_that_the_template_writes_is_the_run_s",
    "packing.pairs_per_step": "test_how_many_steps_a_run_has",
    "packing.rows": "test_the_shape_of_a_micro_batch",
    "packing.row_length": "test_the_shape_of_a_micro_batch",
    "packing.length_choices": "test_shorter_rows_do_the_same_update",
    "packing.pairs_per_row": "test_the_shape_of_a_micro_batch",
    "optimizer.name": "tests/training/test_optimizer.py",
    "optimizer.options": "tests/training/test_optimizer.py",
    "optimizer.learning_rate": "tests/training/test_optimizer.py",
    "optimizer.schedule": "tests/training/test_optimizer.py",
    "optimizer.warmup_fraction": "tests/training/test_optimizer.py",
    "optimizer.clip_norm": "tests/training/test_optimizer.py",
    "training.epochs": "test_how_many_steps_a_run_has",
    "training.steps": "test_how_many_steps_a_run_has",
    "training.seed": "test_the_seed_decides_the_order_and_the_latent",
    "training.log_every": "tests/training/test_loop.py",
    "training.eval_every": "tests/training/test_loop.py",
    "training.checkpoint_every": "tests/training/test_loop.py",
    "training.samples": "tests/training/test_samples.py",
    "training.sample_tokens": "tests/training/test_samples.py",
    "training.best": "tests/training/test_loop.py",
    "training.max_skipped": "tests/training/test_faults.py",
    "distributed.coordinator": "tests/runtime/test_processes.py",
    "distributed.processes": "tests/runtime/test_processes.py",
    "distributed.process": "tests/runtime/test_processes.py",
    "distributed.start_timeout": "tests/runtime/test_processes.py",
    "distributed.heartbeat_timeout": "tests/runtime/test_processes.py",
    "mesh.data": "tests/test_sharding.py",
    "mesh.fsdp": "tests/test_sharding.py",
    "mesh.tensor": "tests/test_sharding.py",
    "reference.path": "tests/training/test_reference.py",
    "reference.cache": "test_the_reference_is_kept_in_the_named_folder",
    "run.folder": "test_a_run_tells_its_trackers_and_stays_in_its_folder",
    "run.trackers": "test_a_run_tells_its_trackers_and_stays_in_its_folder",
    "run.project": "tests/training/test_log.py",
    "run.resume": "tests/training/test_loop.py",
    "run.overwrite": "tests/training/test_loop.py",
    "run.profile": "tests/training/test_loop.py",
    "run.compilation_cache": "tests/training/test_loop.py",
}


def test_every_setting_is_tested_somewhere(repository):
    sections = [
        value
        for value in vars(cfg).values()
        if isinstance(value, type)
        and issubclass(value, cfg.Settings)
        and value not in (cfg.Settings, cfg.Config)
    ]
    names = {
        f"{section.section}{field.name}"
        for section in sections
        for field in dataclasses.fields(section)
    }
    assert set(TESTED_IN) == names
    for name, place in TESTED_IN.items():
        if place.endswith(".py"):
            assert name.split(".")[1] in (repository / place).read_text(), name
        else:
            assert place in globals(), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def config(folder: Path, **changes: Any) -> cfg.Config:
    """Plain SimPO, which needs no reference."""
    plain = {"latent": None, "loss": cfg.Simpo(beta=2.0, gamma=0.5)}
    return runs.config(folder, **plain | changes)


def lpc(**changes: Any) -> cfg.Latent:
    return cfg.Latent(**{"num_codes": 8, "effect": 1.0} | changes)


def first_update(made: cfg.Config) -> tuple[dict[str, float], Run]:
    """Metrics of the first step with its gradient's norm, and the run after it."""
    with runs.prepared(made) as run:
        run.begin()
        update = run.update()
        norm = {"gradient/norm": float(update.norm)}
        return metrics.values(update.sums) | norm, run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return first_update(config(tmp_path_factory.mktemp("base"), latent=lpc()))[0]


# --- model ----------------------------------------------------------------------------


def tokens_of(pairs: Pairs) -> list[tuple[bytes, bytes, bytes]]:
    return [
        (pair.prompt.tobytes(), pair.chosen.tobytes(), pair.rejected.tobytes())
        for pair in pairs
    ]


def read_both(made: cfg.Config) -> tuple[Pairs, Pairs | None]:
    return setup.read_pairs(made, loading.find_model(made.model).tokenizer())


def read(made: cfg.Config) -> Pairs:
    return read_both(made)[0]


def test_a_tokenizer_may_lie_elsewhere(folder):
    bare = Path(shutil.copytree(runs.MODEL, folder / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    there = {"path": str(bare), "tokenizer": str(runs.MODEL)}
    assert tokens_of(read(config(folder, model=there))) == tokens_of(
        read(config(folder))
    )


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_chat_template_file_replaces_the_model_s(folder):
    file = folder / "template.jinja"
    file.write_text(TEMPLATE)
    other = read(config(folder, model={"chat_template": str(file)}))
    ours = read(config(folder))
    assert all(
        one[0] != two[0]
        for one, two in zip(tokens_of(other), tokens_of(ours), strict=True)
    )


def test_bfloat16_computes_otherwise_on_the_same_masters(folder, base):
    made = config(folder, latent=lpc(), model={"compute_dtype": "bfloat16"})
    found, run = first_update(made)
    assert found["loss/preference"] != base["loss/preference"]
    assert found["loss/preference"] == pytest.approx(base["loss/preference"], rel=0.05)
    leaves = jax.tree.leaves(run.state.params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def resolved(model: dict[str, Any], platform: str) -> compute.Compute:
    model = {"path": "unread"} | model
    return compute.resolve(
        cfg.Model(**model), head_width=64, row_length=128, platform=platform
    )


def test_auto_is_float32_on_a_cpu():
    assert resolved({}, "cpu").dtype == jnp.dtype("float32")


def test_remat_recomputes_blocks(folder):
    none, block = (
        blocks_recomputed(config(folder, latent=lpc(), model={"remat": remat}))
        for remat in ("none", "block")
    )
    assert block > none


def blocks_recomputed(made: cfg.Config) -> int:
    """Recomputations in the gradient's program; scoring has one of its own."""
    with runs.prepared(made) as run:
        run.begin()
        state, batch = run.state, run.step_batches(0)[0][0]
        program = jax.make_jaxpr(run.programs.gradients)(
            state.params, state.params, {}, batch, state.key, state.step
        )
    text = str(program)
    return text.count("checkpoint[") + text.count("remat2[")


def loss_and_gradient(remat: str) -> tuple[jax.Array, Any]:
    graph, params = tiny.split_policy(remat=remat)
    made, (batch,) = tiny.config(), tiny.batches(tiny.pairs(4))

    @jax.jit
    @jax.value_and_grad
    def of(params: Any) -> jax.Array:
        scores = objective.score_training(
            nnx.merge(graph, params),
            batch,
            latent=made.latent,
            key=jax.random.key(0),
            progress=jnp.asarray(0.5),
            chunk=8,
        )
        return objective.terms(made.loss, made.latent, scores, batch)[0]

    return of(params)


def test_remat_changes_no_number():
    value, gradient = loss_and_gradient("none")
    for remat in ("block", "dots", "offload"):
        other, its_gradient = loss_and_gradient(remat)
        np.testing.assert_allclose(other, value, rtol=1e-5)
        for ours, theirs in zip(
            jax.tree.leaves(its_gradient), jax.tree.leaves(gradient), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_score_chunks_change_no_number(folder, base):
    made = config(folder, latent=lpc(), model={"score_chunk": 48})
    found, run = first_update(made)
    assert found == pytest.approx(base, rel=1e-5, abs=1e-5)
    assert run.shape.scored % 48 == 0


# --- latent and loss ------------------------------------------------------------------


def test_the_latent_s_inputs_are_standardised_on_the_data(folder, monkeypatch):
    monkeypatch.setattr(start, "STANDARDIZATION_PAIRS", 7)
    made = lpc(posterior_input="concat", posterior_start="random")
    with runs.prepared(config(folder, latent=made)) as run:
        count = len(run.train)
        order = np.random.default_rng([run.config.training.seed, 0])
        some = [run.train.tokens[i] for i in order.permutation(count)[:7]]
        graph, params = run.policy.graph, run.policy.params
        # Second source: each sequence by itself, as one prompt; what fills it up to
        # one length comes after its last token.
        state = jax.jit(lambda ids, last: logits(graph, params, ids)[0][0, last])
        states = []
        for pair in some:
            answers = [
                np.concatenate([pair.prompt, a]) for a in (pair.chosen, pair.rejected)
            ]
            states.append(
                [
                    np.asarray(
                        state(np.pad(ids, (0, 128 - len(ids)))[None], len(ids) - 1)
                    )
                    for ids in (pair.prompt, *answers)
                ]
            )
        prompt, chosen, rejected = np.asarray(states).swapaxes(0, 1)
        run.begin()
        found = jax.device_get(run.state.params["latent"])
    prior, posterior = found["prior_mlp"], found["posterior_mlp"]
    np.testing.assert_allclose(prior["input_mean"], prompt.mean(0), atol=1e-4)
    np.testing.assert_allclose(prior["input_spread"], prompt.std(0), rtol=0.02)
    answers = np.concatenate([chosen, rejected])
    np.testing.assert_allclose(
        posterior["input_mean"], np.tile(answers.mean(0), 2), atol=1e-4
    )
    np.testing.assert_allclose(
        posterior["input_spread"], np.tile(answers.std(0), 2), rtol=0.02
    )


def test_sizes_of_the_latent(folder):
    latent = lpc(num_codes=5, hidden_width=12)
    with runs.prepared(config(folder, latent=latent)) as run:
        found = jax.device_get(run.policy.params["latent"])
    assert found["codebook"].shape == (5, 32)
    assert found["prior_mlp"]["hidden_kernel"].shape == (32, 12)
    assert found["posterior_mlp"]["hidden_kernel"].shape == (96, 12)


def test_codes_start_with_the_effect_asked_for(folder):
    with runs.prepared(config(folder, latent=lpc(num_codes=200, effect=0.3))) as run:
        params = jax.device_get(run.policy.params)
    head = np.asarray(params["decoder"]["head"], np.float64)
    moved = np.asarray(params["latent"]["codebook"], np.float64) @ head.T
    found = np.sqrt(np.mean(np.var(moved, axis=1)))
    # The head's rows are not round, so that 200 codes say it to a tenth.
    assert found == pytest.approx(0.3, rel=0.1)


def test_a_prior_from_clusters_knows_of_the_posterior(folder):
    agreement = {}
    for how in ("random", "clusters"):
        with runs.prepared(config(folder, latent=lpc(posterior_start=how))) as run:
            run.begin()
            metrics = run.evaluate().metrics
            agreement[how] = metrics["code/agreement"]
    assert agreement["clusters"] > 0.7
    assert agreement["random"] < 0.35


@pytest.mark.parametrize(
    ("plain", "change"),
    [
        (cfg.Dpo(), {"beta": 0.3}),
        (cfg.Dpo(), {"label_smoothing": 0.2}),
        (cfg.Dpo(), {"sft_weight": 0.5}),
        (cfg.Dpo(), {"ld_alpha": 0.5}),
        (cfg.Simpo(gamma=0.5), {"ld_alpha": 0.5}),
        *(
            (kind(), {"beta": 0.3})
            for kind in cfg.Loss.kinds
            if kind not in (cfg.Simpo, cfg.Dpo, cfg.Ipo)
        ),
        (cfg.Robust(), {"label_smoothing": 0.2}),
        (cfg.ExoPair(), {"label_smoothing": 0.2}),
        (cfg.Ipo(), {"sft_weight": 0.5}),
        (cfg.Simpo(gamma=0.5), {"sft_weight": 0.5}),
        (cfg.Ipo(), {"beta": 0.3}),
        (cfg.Ipo(), {"reduction": "sum"}),
        (cfg.Simpo(gamma=0.5), {"beta": 1.0}),
        (cfg.Simpo(gamma=0.5), {"gamma": 0.7}),
        (cfg.Simpo(gamma_beta_ratio=0.5), {"gamma_beta_ratio": 0.7}),
        (cfg.Simpo(gamma=0.5), {"label_smoothing": 0.2}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else type(value).__name__,
)
def test_each_loss_setting_changes_the_loss(plain, change):
    graph, params = tiny.split_policy(latent=None)
    pairs = tiny.pairs(6)
    reference = np.random.default_rng(0).normal(-30, 5, (6, 4)).astype(np.float32)
    (batch,) = tiny.batches(pairs, rows=4, reference_logp=reference)
    scores = objective.score_inference(
        nnx.merge(graph, params), batch, steering=None, key=jax.random.key(0), chunk=8
    )
    one, two = (
        float(objective.terms(loss, None, scores, batch)[0])
        for loss in (plain, dataclasses.replace(plain, **change))
    )
    assert abs(one - two) > 1e-3


# --- data and packing -----------------------------------------------------------------


def test_each_set_is_read_from_its_own_split(folder, monkeypatch):
    read_rows, splits = pairs.rows.read, {}

    def noted(path: str, *, setting: str, split: str | None, **settings: Any) -> Any:
        splits[setting] = split
        return read_rows(path, setting=setting, split=split, **settings)

    monkeypatch.setattr(pairs.rows, "read", noted)
    read(config(folder, data={"train_split": "one", "eval_split": "other"}))
    assert splits == {"data.train": "one", "data.eval": "other"}


@pytest.mark.parametrize(
    "setting", ["model.path", "model.tokenizer", "data.train", "data.eval", "reference"]
)
def test_every_download_is_tried_again(folder, monkeypatch, caplog, setting):
    tries, slept = [], []

    def failing(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    monkeypatch.setattr("datasets.load_dataset", failing)
    monkeypatch.setattr("time.sleep", slept.append)
    change: dict[str, Any] = {
        "model.path": {"model": cfg.Model(path="owner/name")},
        "model.tokenizer": {"model": {"tokenizer": "owner/name"}},
        "data.train": {"data": {"train": "owner/name"}},
        "data.eval": {"data": {"eval": "owner/name"}},
        "reference": {"reference": {"path": "owner/name"}, "loss": cfg.Dpo()},
    }[setting]
    made = config(folder, **change)
    with pytest.raises(ValueError, match=r"no route\), tried 4 times\."):
        runs.train(made)
    assert (len(tries), slept) == (4, [2.0, 4.0, 8.0])
    assert len([r for r in caplog.records if "Trying again" in r.message]) == 3


def test_a_config_of_another_width_is_refused_before_the_latent_takes_it(folder):
    model = Path(shutil.copytree(runs.MODEL, folder / "model"))
    file = model / "config.json"
    wide = json.loads(file.read_text()) | {"hidden_size": 1 << 20, "head_dim": 16}
    file.write_text(json.dumps(wide))  # a latent of it would take terabytes
    made = config(folder, model={"path": str(model)}, latent=cfg.Latent())
    with pytest.raises(ValueError, match=r"of another shape: model\.embed_tokens"):
        runs.train(made)


def test_limits_take_the_first_pairs(folder):
    every, held_out = read_both(config(folder))
    few, few_held_out = read_both(config(folder, data={"limit": 7, "eval_limit": 3}))
    assert held_out is not None
    assert few_held_out is not None
    assert tokens_of(few) == tokens_of(every)[:7]
    assert [pair.id for pair in few_held_out] == [0, 1, 2]
    assert (len(every), len(held_out)) == (40, runs.HELD_OUT)


@pytest.mark.parametrize(
    ("change", "kept", "cut"),
    [
        ({}, 40, (0, 0)),
        ({"max_length": 80}, 40, (1, 1)),
        ({"max_length": 80, "max_prompt_length": 40}, 40, (1, 0)),
        ({"max_length": 80, "truncation": "drop"}, 38, (0, 0)),
    ],
    ids=str,
)
def test_lengths_and_truncation_reach_the_tokens(folder, change, kept, cut):
    report = read(config(folder, data=change)).report
    assert report.kept == kept
    assert (report.cut_prompts > 0, report.cut_chosen + report.cut_rejected > 0) == (
        bool(cut[0]),
        bool(cut[1]),
    )


def test_a_prefix_mismatch_is_cut_or_an_error(folder):
    file = folder / "template.jinja"
    # Without an answer it ends in other text than with one.
    file.write_text(TEMPLATE.replace("[assistant]", "[assistant] says"))
    model = {"chat_template": str(file)}
    assert read(config(folder, model=model)).report.prefix_mismatches > 0
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: .* data\.prefix_mismatch"):
        read(config(folder, model=model, data={"prefix_mismatch": "error"}))


def tokenizer_of(made: cfg.Config) -> Tokenizer:
    """As a run has it."""
    origin = loading.find_model(made.model)
    rendering = tokenizers.rendering(made.data)
    return dataclasses.replace(origin, rendering=rendering).tokenizer()


def test_template_none_reads_text_as_it_stands(folder):
    rows = [{"prompt": "Q:", "chosen": " a", "rejected": " b"}] * 2
    data = {"train": str(runs.write_pairs(folder / "a.jsonl", rows)), "eval": None}
    made = config(folder, data=data | {"template": None})
    with runs.prepared(made) as run:
        (pair, _), of_run = run.train.tokens, run.policy.tokenizer
    assert of_run.decode(pair.prompt) == "<|begin|>Q:"
    assert of_run.decode(pair.chosen) == " a<|im_end|>"
    with pytest.raises(ValueError, match=r"model\.chat_template has no effect with"):
        config(folder, data={"template": None}, model={"chat_template": "a.jinja"})
    with pytest.raises(ValueError, match="template_arguments has no effect with"):
        config(folder, data={"template": None, "template_arguments": {"a": 1}})


def test_template_arguments_reach_the_tokens(folder):
    file = folder / "template.jinja"
    switch = "}}{% if thinking is false %}<no>{% endif %}"
    file.write_text(TEMPLATE.replace("}}", switch, 1))
    model, arguments = {"chat_template": str(file)}, {"thinking": False}
    made = config(folder, model=model, data={"template_arguments": arguments})
    with runs.prepared(made) as run:
        text = run.policy.tokenizer.decode(run.train.tokens[0].prompt)
        assert text.startswith("<|begin|><no>[user]")
        digest = run.manifest["tokenizer_digest"]
    assert digest != tokenizers.digest(tokenizer_of(config(folder, model=model)))
    assert cfg.from_flat(json.loads(json.dumps(cfg.flat(made)))) == made
    wrong = {"template_arguments": {"thinkin": False}}
    with pytest.raises(ValueError, match="must read 'thinkin', got one that reads thi"):
        tokenizer_of(config(folder, model=model, data=wrong))


def test_a_date_that_the_template_writes_is_the_run_s(folder, monkeypatch):
    file = folder / "template.jinja"
    file.write_text(TEMPLATE.replace("}}", "}}{{ strftime_now('%d %b') }}", 1))
    made = config(folder, model={"chat_template": str(file)})
    monkeypatch.setattr(templates, "today", lambda: datetime.date(2026, 11, 27))
    with runs.prepared(made) as run:
        text = run.policy.tokenizer.decode(run.train.tokens[0].prompt)
        assert run.config.data.date == "2026-11-27"
        manifest = run.manifest
    assert text.startswith("<|begin|>27 Nov[user]")
    # The next day: a new run has that date, a resumed one its own.
    monkeypatch.setattr(templates, "today", lambda: datetime.date(2026, 11, 28))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    of_run = tokenizer_of(made)

    def date(of: cfg.Config) -> str | None:
        return run_folder.dated(of, of_run, folder).data.date

    assert date(made) == "2026-11-28"
    assert date(runs.resumed(made)) == "2026-11-27"
    assert date(config(folder, data={"date": "2024-02-29"})) == "2024-02-29"
    first, second = (
        read(config(folder, model={"chat_template": str(file)}, data={"date": day}))
        for day in ("2026-11-27", None)
    )
    assert tokens_of(first) == tokens_of(run.train)
    assert tokens_of(second) != tokens_of(run.train)


def test_a_date_that_no_template_writes_is_refused(folder):
    made = config(folder, data={"date": "2026-11-27"})
    with pytest.raises(ValueError, match="the chat template calls no strftime_now"):
        run_folder.dated(made, tokenizer_of(made), folder)
    plain = config(folder)
    assert run_folder.dated(plain, tokenizer_of(plain), folder) == plain
    for wrong in ("27 Nov 2026", "2026-02-30", "20261127"):
        with pytest.raises(ValueError, match=r"data\.date must be a date, YYYY-MM-DD"):
            config(folder, data={"date": wrong})


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"training": {"steps": None}}, 4),  # 40 pairs by 12
        ({"training": {"steps": None, "epochs": 3}}, 12),
        ({"training": {"steps": None}, "packing": {"pairs_per_step": 5}}, 8),
        ({"training": {"steps": 7, "epochs": 3}}, 7),
    ],
    ids=str,
)
def test_how_many_steps_a_run_has(folder, changes, steps):
    with runs.prepared(config(folder, **changes)) as run:
        assert run.total_steps == steps
        sizes = [run.step_batches(number)[1] for number in range(steps)]
    most = changes.get("packing", {}).get("pairs_per_step", 12)
    assert max(sizes) == most
    if steps != 7:
        assert sum(sizes) == 40 * changes["training"].get("epochs", 1)


def test_shorter_rows_do_the_same_update(folder, base, monkeypatch):
    # As in a long run, where compiling a length is worth it.
    monkeypatch.setattr(setup, "_CPU_COMPILED_ROWS", 0)
    packing = {"row_length": 160, "length_choices": 4}
    made = config(folder, latent=lpc(), packing=packing)
    found, run = first_update(made)
    lengths = run.shape.row_lengths
    assert 2 <= len(lengths) <= 4
    assert all(length % 32 == 0 for length in lengths)  # 160 and 64 have it in common
    # A set is read in rows of one length, which is one program to compile.
    read = {batch.tokens.shape[1] for batch in run._held_out_batches}
    assert read == {160}
    assert found == pytest.approx(base, rel=1e-4, abs=1e-5)


def test_the_shape_of_a_micro_batch(folder, base):
    packing = {"rows": 3, "row_length": 200, "length_choices": 1, "pairs_per_row": 2}
    made = config(folder, latent=lpc(), packing=packing)
    found, run = first_update(made)
    shape = run.shape
    assert (shape.rows, shape.row_lengths, shape.pair_slots) == (3, (200,), 2)
    assert found == pytest.approx(base, rel=1e-4, abs=1e-5)


def test_the_gpu_kernel_is_refused_in_float32():
    model = {"attention": "cudnn", "compute_dtype": "float32"}
    with pytest.raises(ValueError, match=r"needs model\.compute_dtype bfloat16"):
        resolved(model, "gpu")
    model["compute_dtype"] = "auto"  # bfloat16 there
    assert resolved(model, "gpu").attention == "cudnn"


# --- training and run -----------------------------------------------------------------


def test_the_seed_decides_the_order_and_the_latent(folder):
    def of(seed: int) -> tuple[list[int], np.ndarray]:
        made = config(folder, latent=lpc(), training={"seed": seed})
        with runs.prepared(made) as run:
            batches, _, _ = run.step_batches(0)
            ids = [i for b in batches for i in b.pair_id[b.pair_mask].tolist()]
            return sorted(ids), np.asarray(run.policy.params["latent"]["codebook"])

    (ids, codebook), (other_ids, other) = of(1), of(2)
    assert ids != other_ids
    assert np.abs(codebook - other).max() > 0.1


def test_a_resumed_run_frees_the_start_s_parameters(folder):
    with runs.prepared(config(folder)) as run:
        head = weakref.ref(run.policy.params["decoder"]["embedding"])
        run.forget_start()
        gc.collect()
        assert head() is None
        run.abstract_state()  # what the checkpoint is restored into, still known


def test_the_reference_is_kept_in_the_named_folder(folder):
    cache = {"cache": str(folder / "kept" / "here")}
    made = config(folder, loss=cfg.Dpo(), reference=cache)
    with runs.prepared(made):
        (file,) = (folder / "kept" / "here").iterdir()
    assert file.suffix == ".npz"


def test_a_run_tells_its_trackers_and_stays_in_its_folder(folder, monkeypatch):
    pytest.importorskip("tensorboardX")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    where = {"folder": str(folder / "mine"), "trackers": ("tensorboard",)}
    run = runs.train(
        config(folder, data={"eval": None}, training={"steps": 1}, run=where)
    )
    assert run.folder == folder / "mine" / "tiny"
    assert list((run.folder / "tensorboard").iterdir())
    assert list(elsewhere.iterdir()) == []
