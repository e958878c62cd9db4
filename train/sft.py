"""Supervised fine-tuning: learn the assistant's turns of conversations.

    python -m train.sft --data_path chats.jsonl --model_path out/pretrain --out_dir out/sft

Rows are `{"conversations": [{"role": …, "content": …}, …]}`. The chat template renders tokens and loss mask together:
only what the assistant says, its end token included, is trained. With `--lora_rank 8` an adapter is trained in place
of the parameters; `train.sft_lora` is the same with settings that suit adapters.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ComputeConfig, DataConfig, LoraConfig, ModelConfig, OptimConfig, RunConfig, parse_cli
from minillm_jax.losses import language_model_loss
from minillm_jax.pretrained import read_model_config
from minillm_jax.run import open_run, train_on_rows
from minillm_jax.samples import answer_chats


@dataclass(frozen=True)
class SftConfig:
    """Settings of a supervised fine-tuning run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig = OptimConfig(learning_rate=5e-4)
    compute: ComputeConfig = ComputeConfig()
    lora: LoraConfig = LoraConfig()


def fine_tune(config: SftConfig) -> int:
    """Train on conversations; returns the exit status."""
    run = open_run(config)
    loss_fn = language_model_loss(run.model, config.compute)
    return train_on_rows(config, run, "sft", loss_fn, lambda lm: answer_chats(lm, config.run.sample_prompts))


def main() -> int:
    """Run the stage; returns the exit status."""
    with user_errors():
        config = parse_cli(SftConfig, str(__doc__), read_model=read_model_config)
        setup_jax()
        return fine_tune(config)


if __name__ == "__main__":
    sys.exit(main())
