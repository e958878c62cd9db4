"""EleutherAI's evaluation harness scores a served model and finds what our own evaluation finds.

The harness sends token ids to /v1/completions and reads the log-probabilities of the echoed prompt, so this holds the
engine, the API and `train.evaluate` against one another.
"""

import json
import random

import jax
import pytest

lm_eval = pytest.importorskip("lm_eval")

from api_server import Server
from example_tokenizers import TOKENIZER

from minillm_jax.config import ModelConfig
from minillm_jax.hf import export_hf
from minillm_jax.lm import LanguageModel, load
from minillm_jax.model import init_params
from serve.config import ServeConfig
from train.evaluate import main as evaluate

pytestmark = pytest.mark.conformance

CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=256,
)
WORDS = ["it", "was", "the", "best", "of", "times", "we", "do", "not", "know", "which", "and", "so", "on"]
ROWS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose logits differ clearly, and questions about nothing."""
    root = tmp_path_factory.mktemp("serving")
    params = jax.tree.map(lambda leaf: 3 * leaf, init_params(CONFIG, jax.random.key(0)))
    export_hf(LanguageModel(CONFIG, params, TOKENIZER), root / "model")
    draw = random.Random(0)
    rows = [
        {
            "query": " ".join(draw.choices([*WORDS, "曹操", "渡河"], k=8)),
            # Distinct and in ASCII: a tie is our error, and we count bytes where the harness counts letters.
            "choices": [" ".join([word, *draw.choices(WORDS, k=draw.randint(0, 2))]) for word in firsts(draw)],
            "gold": draw.randrange(4),
        }
        for _ in range(ROWS)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def firsts(draw):
    """Four different words."""
    return draw.sample(WORDS, 4)


def task(data):
    """The questions as the harness wants them: a document starts with the begin token."""
    return {
        "task": "minillm_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": TOKENIZER.id_to_token(TOKENIZER.bos_token_id) + "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    }


METRICS = {"acc": "accuracy_unnormalized", "acc_norm": "accuracy"}
"""The harness's names of what our evaluation measures."""


def test_the_harness_finds_the_accuracy_that_our_evaluation_finds(folder):
    from serve.engine import Engine, EngineConfig

    engine = Engine(load(folder / "model"), EngineConfig(slots=4), {})
    engine.start(wait=True)
    with Server(engine, ServeConfig(str(folder / "model"))) as server:
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": "model",
                "base_url": f"{server.url}/v1/completions",
                "tokenizer": str(folder / "model"),
                "tokenizer_backend": "huggingface",
                "max_length": CONFIG.max_position_embeddings,
                "batch_size": 4,
                "num_concurrent": 2,
            },
            tasks=[task(folder / "rows.jsonl")],
            bootstrap_iters=0,
        )["results"]["minillm_choice"]
    assert engine.drain(5)
    flags = ("--data_path", folder / "rows.jsonl", "--task", "choice", "--out_file", folder / "ours.json")
    evaluate(["--model_path", str(folder / "model"), *map(str, flags)])
    ours = json.loads((folder / "ours.json").read_text())
    for theirs, name in METRICS.items():
        assert found[f"{theirs},none"] == pytest.approx(ours[name], abs=1e-9)
    assert 0 < ours["accuracy"] < 1
