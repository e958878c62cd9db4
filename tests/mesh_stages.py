"""Every stage in one process, on one mesh: what `test_meshes.py` starts in subprocesses with simulated devices.

    python tests/mesh_stages.py prepare FOLDER
    python tests/mesh_stages.py evaluate FOLDER NAME MESH
    python tests/mesh_stages.py run FOLDER NAME MESH RUN[,RUN ...] [flags of all stages]

`prepare` writes data, a tokenizer and models into FOLDER; `run` runs stages into FOLDER/NAME/RUN. A run is the name of
a stage's settings below, with `moe/` in front for a mixture of experts.
"""

import importlib
import json
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

WORDS = ("the", "a", "cat", "dog", "sees", "finds", "red", "blue", "house", "tree", "and", "under", "small", "old")
STEPS = 20
REWARDS = """
def letters(prompts, completions, rows):
    return [completion.count("e") / 4 + len(completion) / 64 for completion in completions]
"""
SHAPE = ["--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "8", "--num_key_value_heads", "4",
         "--intermediate_size", "48", "--vocab_size", "384", "--initializer_range", "0.1"]  # fmt: skip
SHARED = ["--steps", str(STEPS), "--log_interval", "1", "--eval_interval", "0", "--save_interval", "1000",
          "--learning_rate", "1e-2", "--adam_eps", "1e-2", "--valid_fraction", "0.1"]  # fmt: skip
ROWS = [*SHARED, "--max_seq_len", "64", "--batch_size", "8", "--accumulation_steps", "2"]
PROMPTS = [*SHARED, "--max_seq_len", "64", "--max_new_tokens", "8", "--batch_size", "16", "--minibatches", "2",
           "--update_epochs", "2", "--max_kl", "100", "--save_rollouts"]  # fmt: skip
LETTERS = ["--reward", "mesh_rewards:letters", "--num_generations", "2"]
DROPOUT = ["--dropout", "0.1"]
RUNS = {
    "pretrain": ("train.pretrain", "text", [*ROWS, *DROPOUT, "--tokenizer_path", "{}/tokenizer", *SHAPE]),
    "sft": ("train.sft", "chats", [*ROWS, *DROPOUT, "--model_path", "{}/model"]),
    "sft_lora": (
        "train.sft_lora", "chats",
        [*ROWS, "--model_path", "{}/model", "--lora_rank", "4", "--lora_dropout", "0.1"],
    ),
    "dpo": ("train.dpo", "pairs", [*ROWS, *DROPOUT, "--model_path", "{}/model"]),
    "dpo_online": ("train.dpo", "pairs", [*ROWS, "--model_path", "{}/model", "--reference", "online"]),
    "distill": ("train.distill", "chats", [*ROWS, "--model_path", "{}/model", "--teacher_path", "{}/teacher"]),
    "distill_stored": (
        "train.distill", "text",
        [*ROWS, "--model_path", "{}/model", "--teacher_path", "{}/teacher", "--teacher_top_k", "8"],
    ),
    "distill_on_policy": (
        "train.distill", "chats",
        [*ROWS, "--model_path", "{}/model", "--teacher_path", "{}/teacher", "--on_policy", "0.5"],
    ),
    "distill_reason": (
        "train.distill_reason", "traces",
        [*ROWS, "--model_path", "{}/model", "--report_rows", "4", "--report_max_new_tokens", "8"],
    ),
    # A reward model's gradients grow with its steps, and rounding with them: smaller steps keep both apart.
    "train_rm": ("rl.train_rm", "pairs", [*ROWS, "--model_path", "{}/model", "--learning_rate", "1e-3"]),
    "ppo": (
        "rl.ppo", "prompts",
        [*PROMPTS, "--model_path", "{}/model", "--reward", "model", "--reward_model_path", "{}/reward"],
    ),
    "grpo": ("rl.grpo", "prompts", [*PROMPTS, *LETTERS, "--model_path", "{}/model"]),
    "grpo_lora": (
        "rl.grpo", "prompts",
        [*PROMPTS, *LETTERS, "--model_path", "{}/model", "--lora_rank", "4"],
    ),
}  # fmt: skip
"""Stage, data and flags by name; `{}` is the folder, or its part with experts."""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_data(folder):
    """Rows whose masks and lengths differ widely."""
    rng = random.Random(0)
    words = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    texts = [words(4, 40) for _ in range(150)]
    write(folder / "text.jsonl", [{"text": text} for text in texts])
    write(folder / "chats.jsonl", [{"conversations": chat(words(1, 4), words(1, 8))} for _ in range(100)])
    pairs = []
    for _ in range(60):
        question = words(1, 3)
        pairs.append({"chosen": chat(question, f"yes {words(1, 6)}"), "rejected": chat(question, f"no {words(1, 6)}")})
    write(folder / "pairs.jsonl", pairs)
    write(folder / "questions.jsonl", [{"prompt": words(1, 4), "answer": rng.choice(WORDS)} for _ in range(10)])
    write(folder / "prompts.jsonl", [{"prompt": f"{a} {b}"} for a in WORDS for b in WORDS[:4]])
    thoughts = []
    for _ in range(60):
        last = rng.choice(WORDS)
        reply = f"<think>\n{words(1, 4)}\n</think>\n<answer>\n{last}\n</answer>"
        thoughts.append({"conversations": chat(f"{words(1, 2)} {last}", reply)})
    write(folder / "traces.jsonl", thoughts)
    (folder / "mesh_rewards.py").write_text(REWARDS)
    return texts


def prepare(folder):
    import dataclasses

    import jax

    from minillm_jax.config import ModelConfig
    from minillm_jax.model import init_params
    from minillm_jax.reward import scored
    from minillm_jax.run import write_run
    from minillm_jax.tokenizer import train_tokenizer

    template = ["system user assistant\nYou are a helpful assistant"] * 50
    tokenizer = train_tokenizer([*write_data(folder), *template], 320)
    tokenizer.save(folder / "tokenizer")
    dense = ModelConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=48, initializer_range=0.1, max_position_embeddings=256,
    )  # fmt: skip
    moe = dataclasses.replace(dense, use_moe=True, num_experts=4, moe_intermediate_size=24)
    for kind, config in (("", dense), ("moe", moe)):
        draw = jax.jit(init_params, static_argnums=0)
        teacher = dataclasses.replace(config, hidden_size=64, intermediate_size=64)
        (folder / kind).mkdir(exist_ok=True)
        write_run(folder / kind / "model", config.resolved(), draw(config, jax.random.key(1)), tokenizer, {})
        write_run(folder / kind / "teacher", teacher.resolved(), draw(teacher, jax.random.key(2)), tokenizer, {})
        head = 0.3 * jax.random.normal(jax.random.key(4), (32, 1))
        reward = scored(draw(config, jax.random.key(3)), head)
        write_run(folder / kind / "reward", config.resolved(), reward, tokenizer, {})


def run_stage(folder, out_dir, mesh, run, *flags):
    """Run one stage in this process; returns its exit status."""
    *moe, name = run.split("/")
    stage, data, settings = RUNS[name]
    settings = [flag.format(folder.joinpath(*moe)) for flag in settings]
    settings = [flag.replace("moe/tokenizer", "tokenizer") for flag in settings]
    if moe and "--lora_dropout" in settings:  # devices that hold experts draw masks of their own
        settings[settings.index("--lora_dropout") + 1] = "0"
    if moe and "--tokenizer_path" in settings:
        settings += ["--use_moe", "--num_experts", "4", "--moe_intermediate_size", "24"]
    paths = ["--data_path", str(folder / f"{data}.jsonl"), "--out_dir", str(out_dir), "--mesh", mesh]
    sys.argv = [stage, *paths, *settings, *flags]
    module = importlib.import_module(stage)
    for name in {"minillm_jax.run", "rl.loop"} & set(sys.modules):  # a picture a run is what would take longest here
        sys.modules[name].plot_curves = lambda folder: None
    try:
        return module.main()
    except SystemExit as stop:
        return stop.code


EVALUATIONS = {
    "lm": ("text", "model"),
    "pairs": ("pairs", "moe/reward"),
    "exact": ("questions", "model"),
}
"""Rows and model by task."""


def evaluate(folder, name, mesh):
    """Evaluate every task on a mesh, and keep what was measured in FOLDER/NAME/TASK.json."""
    from train.evaluate import main

    for task, (data, model) in EVALUATIONS.items():
        paths = ["--data_path", folder / f"{data}.jsonl", "--model_path", folder / model]
        out_file = ["--out_file", folder / name / f"{task}.json"]
        main([str(word) for word in [*paths, *out_file, "--task", task, "--mesh", mesh]])


def main():
    command, folder, *rest = sys.argv[1:]
    folder = Path(folder)
    os.environ["MINILLM_CACHE"] = str(folder / "cache")
    sys.path.insert(0, str(folder))  # where the reward function is
    if command == "prepare":
        prepare(folder)
        return 0
    if command == "evaluate":
        evaluate(folder, *rest)
        return 0
    name, mesh, runs, *flags = rest
    status = {run: run_stage(folder, folder / name / run, mesh, run, *flags) for run in runs.split(",")}
    print(f"exit statuses: {status}")
    return int(any(status.values()))


if __name__ == "__main__":
    sys.exit(main())
