"""Trains tiny_llama with TRL and writes each step's numbers: trl_trajectories.json.

    python tests/golden/make_trl_trajectories.py

Needs torch and TRL 1.16.0 (the parity extra), tiny_llama/ and pairs.jsonl. Runs of 8
steps in fp32: every loss of ours that TRL has, DPO with two micro-batches of two pairs
a step, with a likelihood term, a pair a micro-batch, and length-desensitised.

What TRL 1.16.0 does, read in its sources (trl/trainer/dpo_trainer.py,
trl/experimental/cpo/cpo_trainer.py, trl/experimental/orpo/orpo_trainer.py,
transformers' trainer.py):

- Order: rows as they come with train_sampling_strategy="sequential"; the default
  shuffles with RandomSampler.
- Prompt: with add_generation_prompt=True, so the assistant's header is not scored. The
  answer starts where the tokens of the prompt and of prompt + answer part.
- End of an answer: DPOTrainer takes everything the chat template writes after the
  prompt, a line feed after EOS included, and adds EOS to plain strings only.
  CPOTrainer (which holds SimPO) renders, tokenizes the text without special tokens,
  puts BOS in front if it is not there and EOS behind if the last token is another.
  With this template both give the same ids: checked below.
- Loss of a step: the mean over the pairs of a micro-batch; Trainer divides each by the
  number of micro-batches before backward: the mean over all pairs if all are equal.
- DPO: -log sigmoid(beta ((s_w - ref_w) - (s_l - ref_l))) over sums of log-probs. The
  reference is the model loaded again from its folder.
- IPO: ((s_w - ref_w)/n_w - (s_l - ref_l)/n_l - 1/(2 beta))^2, n answer tokens with EOS.
- SimPO: -log sigmoid(beta (s_w/n_w - s_l/n_l - simpo_gamma/beta)), so simpo_gamma is
  gamma itself and not gamma/beta. CPOTrainer adds cpo_alpha (1.0 by default, 0 here)
  times the cross-entropy of the chosen answers' tokens, over all of a micro-batch.
- CPO: loss_type="sigmoid" there, -log sigmoid(beta (s_w - s_l)), no reference.
- ORPO: -beta log sigmoid(log odds of the means over tokens, chosen less rejected), plus
  the cross-entropy of the whole chosen sequences, prompt included. Ours, as the paper's
  eq. 2, counts the answer alone, and so does the run here: its NLL alone is replaced.
- ld_alpha: log-probs, the reference's too, weigh it behind the shorter answer's length.
- A likelihood term, loss_type=["sigmoid", "sft"] with loss_weights: the mean over all
  chosen tokens of a micro-batch, so that long answers count for more; ours is each
  answer's mean. With one pair a micro-batch the two are one.
- Defaults that a parity run must change: bf16=True, gradient checkpointing on, linear
  decay to zero, sampling at random. Dropout is off by default, weight decay is zero.
- torch.nn.Embedding gives the row config.pad_token_id no gradient. tiny_llama names no
  pad token, so EOS, which is also the tokenizer's pad, is trained here.
- Clipping: torch multiplies by max_norm / (norm + 1e-6) if that is below 1. The
  recorded norm is the one before clipping.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # and TRL sends no telemetry
os.environ["TQDM_DISABLE"] = "1"

import json
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

FOLDER = Path(__file__).parent
STEPS, PAIRS_PER_STEP = 8, 4
HELD_OUT = range(32, 40)  # rows that no step sees
SETTINGS: dict[str, Any] = {
    # With an epsilon of 1e-8, Adam makes steps of gradients that are rounding alone,
    # and one answer's -179 nats come out 3.7e-4 apart, whatever the loss.
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_steps": STEPS,
    "max_length": 512,
    "train_sampling_strategy": "sequential",
    "disable_dropout": True,
    "bf16": False,
    "activation_checkpointing": False,
    "seed": 42,
}
DPO = {"loss_type": ["sigmoid"], "beta": 0.1, "label_smoothing": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "dpo": DPO,
    "ipo": {"loss_type": ["ipo"], "beta": 0.1},
    "simpo": {
        "loss_type": "simpo",
        "beta": 2.0,
        "simpo_gamma": 1.0,  # gamma/beta = 0.5
        "cpo_alpha": 0.0,  # no NLL term
        "label_smoothing": 0.0,
    },
    "dpo_accumulated": DPO | {"gradient_accumulation_steps": 2},
    "dpo_sft": DPO
    | {
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.5],
        "gradient_accumulation_steps": 4,
    },
    "dpo_ld": DPO | {"ld_alpha": 0.4},
    "hinge": {"loss_type": ["hinge"], "beta": 0.1},
    "robust": {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.1},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"], "beta": 5.0},
    "apo_zero": {"loss_type": ["apo_zero"], "beta": 0.1},
    "apo_down": {"loss_type": ["apo_down"], "beta": 0.1},
    "exo_pair": {"loss_type": ["exo_pair"], "beta": 0.1, "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": ["nca_pair"], "beta": 0.1},
    "sppo_hard": {"loss_type": ["sppo_hard"], "beta": 0.05},
    # With one pair a micro-batch the mean over its tokens is the answer's mean.
    "orpo": {"beta": 0.5, "gradient_accumulation_steps": 4},
    "cpo": {
        "loss_type": "sigmoid",
        "beta": 0.1,
        "cpo_alpha": 1.0,
        "label_smoothing": 0.0,
        "gradient_accumulation_steps": 4,
    },
}
NO_REFERENCE = {"simpo", "cpo", "orpo"}
# Two ways to compute the same attention: how far rounding alone takes a trajectory.
ROUNDING = 1e-5


def load(folder: Path, attention: str) -> torch.nn.Module:
    """The model as it starts."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )


def read_pairs() -> list[dict[str, Any]]:
    """The rows of pairs.jsonl."""
    text = (FOLDER / "pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def token_logps(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> float:
    """One answer's summed log-prob, from the logits of one unpadded sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return float(logps[torch.arange(len(answer)), torch.tensor(answer)].sum())


class Recorder(TrainerCallback):
    """Collects per micro-batch and per step what a run did.

    Attributes:
        rows: Ids of every pair of the data set, to recognise batches by.
        micro_batches: Loss, row indices and log-probs of each call of compute_loss.
        steps: Learning rate and gradient norm of each step.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, list[int]]] = []
        self.micro_batches: list[dict[str, Any]] = []
        self.steps: list[dict[str, float]] = []
        self.pending: dict[str, list[float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the numbers of the step that ended; the log's loss is rounded."""
        logs = kwargs["logs"]
        if "grad_norm" in logs:
            self.steps.append(
                {
                    "learning_rate": logs["learning_rate"],
                    "grad_norm": float(logs["grad_norm"]),
                }
            )

    def finish(self, loss: torch.Tensor, sequences: Sequence[Sequence[int]]) -> None:
        """Close a micro-batch whose sequences are all chosen, then all rejected."""
        half = len(sequences) // 2
        known = [
            (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"])
            for row in self.rows
        ]
        pairs = zip(sequences[:half], sequences[half:], strict=True)
        self.micro_batches.append(
            {
                "loss": float(loss.detach()),
                "rows": [known.index((list(c), list(r))) for c, r in pairs],
                **self.pending,
            }
        )
        self.pending = {}


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Rows without their padding."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


class RecordedDPO(DPOTrainer):
    """TRL's trainer, watched: hooks on the models see the log-probs it uses."""

    recorder: Recorder

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, recorded."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.recorder.finish(
            loss, unpadded(inputs["input_ids"], inputs["attention_mask"])
        )
        return loss

    def watch(self, recorder: Recorder) -> None:
        """Record from here on."""
        self.recorder = recorder
        recorder.rows = [
            {key: row[f"{key}_ids"] for key in ("prompt", "chosen", "rejected")}
            for row in self.train_dataset
        ]

        def hook(prefix: str) -> Any:
            def take(module: Any, inputs: Any, output: Any) -> None:
                if not hasattr(output, "log_probs"):  # a plain call, after training
                    return
                sums = output.log_probs.detach().sum(dim=1).tolist()
                half = len(sums) // 2
                recorder.pending[f"{prefix}chosen_logp"] = sums[:half]
                recorder.pending[f"{prefix}rejected_logp"] = sums[half:]

            return take

        self.model.register_forward_hook(hook(""))
        self.ref_model.register_forward_hook(hook("ref_"))


class RecordedAnswers:
    """What TRL's trainers without a reference share, watched."""

    recorder: Recorder
    average: bool

    def keep(self, logps: dict[str, Any]) -> None:
        """Log-probs of a side, as sums where TRL passes means over tokens."""
        for side, values in logps.items():
            scale = self.lengths[side] if self.average else 1
            self.recorder.pending[f"{side}_logp"] = (values.detach() * scale).tolist()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, recorded."""
        sides = ("chosen", "rejected")
        self.lengths = {s: (inputs[f"{s}_labels"] != -100).sum(-1) for s in sides}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        sequences = [
            ids
            for s in sides
            for ids in unpadded(inputs[f"{s}_input_ids"], inputs[f"{s}_attention_mask"])
        ]
        self.recorder.finish(loss, sequences)
        return loss

    def watch(self, recorder: Recorder) -> None:
        """Record from here on."""
        self.recorder = recorder
        for row in self.train_dataset:
            prompt = row["prompt_input_ids"]
            ids = {"prompt": prompt}
            for side in ("chosen", "rejected"):
                assert row[f"{side}_input_ids"][: len(prompt)] == prompt
                ids[side] = row[f"{side}_input_ids"][len(prompt) :]
                assert [i for i in row[f"{side}_labels"] if i != -100] == ids[side]
            recorder.rows.append(ids)


class RecordedCPO(RecordedAnswers, CPOTrainer):
    """TRL's SimPO and CPO."""

    def cpo_loss(self, chosen: Any, rejected: Any) -> Any:
        """The losses."""
        self.average = self.loss_type == "simpo"
        self.keep({"chosen": chosen, "rejected": rejected})
        return super().cpo_loss(chosen, rejected)


class RecordedORPO(RecordedAnswers, ORPOTrainer):
    """TRL's ORPO, its likelihood over answers alone."""

    average = True

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """As TRL's, but for the likelihood term: each chosen answer's mean."""
        chosen, rejected, *logits, _ = super().concatenated_forward(model, batch)
        self.keep({"chosen": chosen, "rejected": rejected})
        return chosen, rejected, *logits, -chosen.mean()


TRAINERS = {
    "simpo": (CPOConfig, RecordedCPO),
    "cpo": (CPOConfig, RecordedCPO),
    "orpo": (ORPOConfig, RecordedORPO),
}


def train(
    folder: Path, name: str, pairs: list[dict], attention: str
) -> tuple[list[dict[str, Any]], list[dict[str, list[int]]], dict[str, list[float]]]:
    """One run: its steps, the token ids of every row, held-out log-probs after it."""
    settings = RUNS[name]
    config_class, trainer_class = TRAINERS.get(name, (DPOConfig, RecordedDPO))
    micro_batches = settings.get("gradient_accumulation_steps", 1)
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as output:
        arguments = config_class(
            output_dir=output,
            per_device_train_batch_size=PAIRS_PER_STEP // micro_batches,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            **SETTINGS | settings,
        )
        trainer = trainer_class(
            model=load(folder, attention),
            args=arguments,
            train_dataset=Dataset.from_list(
                [{k: p[k] for k in ("prompt", "chosen", "rejected")} for p in pairs]
            ),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[recorder],
        )
        trainer.watch(recorder)
        assert trainer.model.get_input_embeddings().padding_idx is None
        trainer.train()

    assert len(recorder.steps) == STEPS
    assert len(recorder.micro_batches) == STEPS * micro_batches
    steps = []
    for index, numbers in enumerate(recorder.steps):
        start = index * micro_batches
        parts = recorder.micro_batches[start : start + micro_batches]
        lists = {
            k: [v for part in parts for v in part[k]] for k in parts[0] if k != "loss"
        }
        loss = sum(part["loss"] for part in parts) / micro_batches
        steps.append({"loss": loss, **numbers, **lists})
    model = trainer.model.eval()
    after = {
        f"{side}_logp": [
            token_logps(model, recorder.rows[i]["prompt"], recorder.rows[i][side])
            for i in HELD_OUT
        ]
        for side in ("chosen", "rejected")
    }
    return steps, recorder.rows, after


def check_first_step(
    folder: Path, name: str, steps: list[dict[str, Any]], rows: list[dict]
) -> None:
    """Log-probs against unpadded sequences, and the loss against its formula."""
    model, step = load(folder, "eager").eval(), steps[0]
    for side in ("chosen", "rejected"):
        alone = [token_logps(model, rows[i]["prompt"], rows[i][side]) for i in range(4)]
        assert np.allclose(step[f"{side}_logp"], alone, atol=5e-5, rtol=0)
        if name not in NO_REFERENCE:
            assert np.allclose(step[f"ref_{side}_logp"], alone, atol=5e-5, rtol=0)
    lengths = np.array(
        [[len(rows[i][s]) for s in ("chosen", "rejected")] for i in range(4)]
    )
    logps = np.array([step["chosen_logp"], step["rejected_logp"]]).T
    mean = logps / lengths
    beta, e = RUNS[name]["beta"], RUNS[name].get("label_smoothing")
    log_p, log_odds = mean, mean - np.log1p(-np.exp(mean))
    # Where the policy is the reference, r is 0.
    expected = {
        "dpo": lambda: np.log(2),
        "dpo_accumulated": lambda: np.log(2),
        "dpo_sft": lambda: np.log(2) - 0.5 * np.mean(log_p[:, 0]),
        "dpo_ld": lambda: np.log(2),
        "ipo": lambda: (1 / (2 * beta)) ** 2,
        "hinge": lambda: 1.0,
        "robust": lambda: np.log(2),
        "sigmoid_norm": lambda: np.log(2),
        "apo_zero": lambda: 1.0,
        "apo_down": lambda: 1.0,
        "exo_pair": lambda: -np.log(2) - (np.log(1 - e) + np.log(e)) / 2,
        "nca_pair": lambda: 2 * np.log(2),
        "sppo_hard": lambda: 2 * (1 / (2 * beta)) ** 2,
        "simpo": lambda: np.mean(
            np.logaddexp(0, RUNS[name]["simpo_gamma"] - beta * -np.diff(log_p))
        ),
        "orpo": lambda: np.mean(
            beta * np.logaddexp(0, np.diff(log_odds)[:, 0]) - log_p[:, 0]
        ),
        "cpo": lambda: np.mean(
            np.logaddexp(0, beta * np.diff(logps)[:, 0]) - log_p[:, 0]
        ),
    }[name]()
    assert abs(step["loss"] / expected - 1) < 1e-6, (name, step["loss"], expected)


def run(
    folder: Path, name: str, pairs: list[dict], attention: str = "eager"
) -> tuple[dict[str, Any], list[dict[str, list[int]]]]:
    """One run by name, checked: what it did, and the token ids of every row."""
    settings = RUNS[name]
    steps, rows, after = train(folder, name, pairs, attention)
    for index, step in enumerate(steps):
        assert step["rows"] == list(range(4 * index, 4 * index + 4))
        assert step["learning_rate"] == SETTINGS["learning_rate"]
    check_first_step(folder, name, steps, rows)
    gamma = {"gamma_over_beta": 0.5} if name == "simpo" else {}
    return {
        "settings": settings | gamma,
        "steps": steps,
        "held_out_after": {"rows": list(HELD_OUT)} | after,
    }, rows


def main() -> None:
    """Every run, checked and written."""
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    folder, pairs = FOLDER / "tiny_llama", read_pairs()
    runs, all_rows = {}, []
    for name in RUNS:
        runs[name], rows = run(folder, name, pairs)
        all_rows.append(rows)
        other, _ = run(folder, name, pairs, "sdpa")
        losses = np.array([step["loss"] for step in runs[name]["steps"]])
        drift = np.abs([step["loss"] for step in other["steps"]] / losses - 1)
        print(name, losses, "drift", drift.max())
        assert drift.max() < ROUNDING
    assert all(rows == all_rows[0] for rows in all_rows)

    result = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "settings": SETTINGS | {"pairs_per_step": PAIRS_PER_STEP, "dtype": "float32"},
        "pairs": all_rows[0],
        "runs": runs,
    }
    (FOLDER / "trl_trajectories.json").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
