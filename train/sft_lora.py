"""Supervised fine-tuning of an adapter (LoRA): the model stays as it is, and what is learnt beside it is small.

    python -m train.sft_lora --data_path chats.jsonl --model_path out/pretrain --out_dir out/sft_lora

Data and loss are those of `train.sft`. Only the adapter is trained, stored and kept in optimizer state: its run names
the model that it belongs to, and wherever a model is asked for, `--model_path out/sft_lora` means the two together.
`python -m minillm_jax.lora` merges them into one, and exports and imports adapters in PEFT's format.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ConfigError, LoraConfig, OptimConfig, parse_cli
from minillm_jax.pretrained import read_model_config
from train.sft import SftConfig, fine_tune


@dataclass(frozen=True)
class SftLoraConfig(SftConfig):
    """Settings of an adapter's run.

    Its product starts at zero and has few directions to move in, so it bears several times the rate of full
    fine-tuning; and it starts so close to the base that decay has nothing to restrain.
    """

    optim: OptimConfig = OptimConfig(learning_rate=2e-3, weight_decay=0.0)
    lora: LoraConfig = LoraConfig(lora_rank=8)


def main() -> int:
    """Run the stage; returns the exit status."""
    with user_errors():
        config = parse_cli(SftLoraConfig, str(__doc__), read_model=read_model_config)
        if not config.lora.lora_rank:
            raise ConfigError("--lora_rank 0 trains no adapter; use train.sft to train all parameters")
        setup_jax()
        return fine_tune(config)


if __name__ == "__main__":
    sys.exit(main())
