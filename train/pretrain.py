"""Pretraining: next-token prediction on raw text.

    python -m train.pretrain --data_path corpus.jsonl --tokenizer_path out/tokenizer --out_dir out/pretrain

Rows are `{"text": "…"}`. Documents are packed into rows of `--max_seq_len` tokens and never see each other.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, parse_cli
from minillm_jax.losses import language_model_loss
from minillm_jax.pretrained import read_model_config
from minillm_jax.run import open_run, train_on_rows
from minillm_jax.samples import continue_texts


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pretraining run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = OptimConfig(learning_rate=1e-3)
    compute: ComputeConfig = ComputeConfig()


def main() -> int:
    """Run the stage; returns the exit status."""
    with user_errors():
        config = parse_cli(PretrainConfig, str(__doc__), read_model=read_model_config)
        setup_jax()
        run = open_run(config)
        loss_fn = language_model_loss(run.model, config.compute)
        return train_on_rows(config, run, "pretrain", loss_fn, lambda lm: continue_texts(lm, config.run.sample_prompts))


if __name__ == "__main__":
    sys.exit(main())
