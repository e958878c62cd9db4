"""The reward model: learn from pairs of answers what people prefer, as one number per conversation.

    python -m rl.train_rm --data_path pairs.jsonl --model_path out/sft --out_dir out/rm

Rows are `{"chosen": [turns], "rejected": [turns]}` that differ in their last turn, with an optional number `"margin"`.
Training starts from the model at `--model_path`, which gets a scalar head, read at the last token of the whole rendered
conversation; or it goes on from a reward model. The chosen answer's reward should be the higher one, by a margin if the
row names one. After training, `report.json` says how well rewards order the pairs that were set aside.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import (
    ComputeConfig,
    ConfigError,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    parse_cli,
)
from minillm_jax.data import PairRows
from minillm_jax.evaluation import preference_metrics
from minillm_jax.losses import Batch, LossFn, Metrics
from minillm_jax.model import Params
from minillm_jax.preference import pair_scores, reward_pairs, sum_pairs, whole_documents
from minillm_jax.pretrained import load_params, read_model_config
from minillm_jax.reward import reward_axes
from minillm_jax.run import Run, load_stage_pairs, open_run, run_job, write_atomically
from minillm_jax.sharding import make_mesh, tree_shardings
from rl.losses import reward_model_loss


@dataclass(frozen=True)
class RewardModelConfig:
    """What is particular about reward models."""

    center_coef: float = 0.01
    """Weight of the squared sum of a pair's rewards, which keeps rewards around zero (arXiv:2312.09244); 0 for none."""

    def __post_init__(self) -> None:
        """Refuse a number that means nothing."""
        if not self.center_coef >= 0:
            raise ConfigError(f"--center_coef must not be negative, but is {self.center_coef}")


@dataclass(frozen=True)
class TrainRmConfig:
    """Settings of a reward model's run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = OptimConfig(weight_decay=0.0)
    compute: ComputeConfig = ComputeConfig()
    reward: RewardModelConfig = RewardModelConfig()
    lora: LoraConfig = LoraConfig()


def reward_pairs_loss(config: ModelConfig, compute: ComputeConfig, settings: RewardModelConfig) -> LossFn:
    """Make the loss of a reward model: Bradley-Terry with margins, plus centring, plus the router's loss.

    The batch is `tokens targets weights segment_ids`, each `[B, 2, T]`, chosen before rejected, and `margin` `[B]`.
    Every term is a mean per pair, and the weight counts pairs: one of zeros is padding.

    Metrics: `loss` (router's part left out) and `router_loss`; `rewards_chosen`, `rewards_rejected`, their difference
    `margin`, and `accuracy`, how often it is positive; `longer_accuracy`, that of preferring the longer answer, where
    equal lengths count one half; `brier`, the mean of (σ(margin) - 1)².
    """

    def loss_fn(
        params: Params, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        scores, output = pair_scores(params, config, compute, batch, key)
        chosen, rejected = scores[:, 0], scores[:, 1]
        loss = reward_model_loss(chosen, rejected, batch["margin"], settings.center_coef)
        lengths = batch["weights"].sum(-1)  # [B, 2]
        per_pair = {
            "loss": loss,
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": (chosen > rejected).astype(jnp.float32),
            "longer_accuracy": 0.5 + 0.5 * jnp.sign(lengths[:, 0] - lengths[:, 1]),
            "brier": (jax.nn.sigmoid(chosen - rejected) - 1) ** 2,
        }
        _, segment_ids = whole_documents(batch)
        return sum_pairs(loss, per_pair, (segment_ids[..., 0] > 0).all(-1), output, segment_ids)

    return loss_fn


def report(config: TrainRmConfig, run: Run, rows: PairRows) -> dict[str, Any]:
    """Ask the finished model about pairs that were set aside; see `evaluation.preference_metrics`."""
    mesh = make_mesh(config.run.mesh)
    params = load_params(run.folder, dtype=jnp.float32, shardings=tree_shardings(mesh, reward_axes(run.model)))[1]
    scores = reward_pairs(params, run.model, config.compute, rows, config.data.batch_size, mesh)
    return preference_metrics(scores, rows.answer_lengths, calibration=True)


def main() -> int:
    """Run the stage, and print the report as one JSON object in the last line; returns the exit status."""
    with user_errors():
        config = parse_cli(TrainRmConfig, str(__doc__), read_model=read_model_config)
        if config.run.model_path is None:
            raise ConfigError("--model_path is needed: a reward model starts from a model that knows the language")
        setup_jax()
        run = open_run(config)
        longest = min(config.data.max_seq_len, run.model.max_position_embeddings - 1)  # T + 1 tokens are read
        train_rows, valid_rows = load_stage_pairs(config, run, longest)
        loss_fn = reward_pairs_loss(run.model, config.compute, config.reward)
        status = run_job(config, run, loss_fn, train_rows, valid_rows, scored=True)
        if status == 0 and valid_rows is not None:
            line = json.dumps(report(config, run, valid_rows))
            write_atomically(run.folder / "report.json", line + "\n")
            print(line)
        return status


if __name__ == "__main__":
    sys.exit(main())
