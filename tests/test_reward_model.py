"""Reward models: the formula, the token that is read, heads old and new, and what evaluation says of them."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_tokenizers import TOKENIZER

import minillm_jax as mj
import train.evaluate
from minillm_jax.chat import render
from minillm_jax.config import ComputeConfig, ConfigError, ModelConfig
from minillm_jax.data import eval_batches, load_pairs
from minillm_jax.errors import UserError
from minillm_jax.evaluation import preference_metrics
from minillm_jax.lm import LanguageModel
from minillm_jax.model import forward, forward_hidden, init_params, param_axes
from minillm_jax.preference import pair_scores, reward_pairs, whole_documents
from minillm_jax.pretrained import axes_of, holds_reward_model, load_params, load_reward_params
from minillm_jax.reward import reward_axes, reward_scores, reward_shapes, scored
from minillm_jax.run import write_run
from minillm_jax.sharding import make_mesh, tree_shardings
from minillm_jax.trainer import accumulate_gradients
from rl import train_rm
from rl.losses import reward_model_loss
from rl.train_rm import RewardModelConfig, reward_pairs_loss
from serve import chat

TINY = ModelConfig(
    vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=24, initializer_range=0.3,
).resolved()  # fmt: skip
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
MOE = dataclasses.replace(TINY, use_moe=True, num_experts=3, moe_intermediate_size=16, router_aux_loss_coef=0.5)
MODELS = {"tied": TINY, "untied": UNTIED, "moe": MOE.resolved()}
COMPUTE = ComputeConfig()
draw = jax.jit(init_params, static_argnums=0)
accumulate = jax.jit(accumulate_gradients, static_argnums=(0, 5))


def language_model(config, seed=0):
    return draw(config, jax.random.key(seed))


def reward_model(config, seed=0):
    return scored(language_model(config, seed), jax.random.normal(jax.random.key(9), (config.hidden_size, 1)))


def turns(prompt, answer, before=()):
    return [*before, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


BEFORE = turns("it was", "the age")
PAIRS = [
    {"chosen": turns("it was", "the best of times"), "rejected": turns("it was", "the worst")},
    {"chosen": turns("x", "no"), "rejected": turns("x", "a far longer answer than the other one"), "margin": 1.5},
    {"chosen": turns("so on", "yes", BEFORE), "rejected": turns("so on", "not at all", BEFORE), "margin": -2},
    {"chosen": turns("a", "it was the best of times, it was"), "rejected": turns("a", "b"), "margin": 0.25},
]


@pytest.fixture
def load(tmp_path):
    """Write pairs to a file and load them."""

    def load(rows=PAIRS, max_seq_len=128, name="pairs.jsonl", **options):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"cache_dir": str(tmp_path / "cache"), "report": lambda line: None} | options
        return load_pairs([str(path)], TOKENIZER, max_seq_len, **options)

    return load


def score_alone(params, config, conversation, length=96):
    """The reward of one conversation, rendered by itself; padded so that all lengths share a program."""
    ids = np.asarray([render(TOKENIZER, conversation).token_ids])
    padding = ((0, 0), (0, length - ids.shape[1]))
    return float(reward_scores(params, config, np.pad(ids, padding), np.pad(np.ones_like(ids), padding))[0])


def means(metrics):
    return {name: float(total / weight) for name, (total, weight) in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "center", "expected"),
    [
        (0.0, 0.0, None, 0.0, math.log(2)),
        (1.0, 0.0, None, 0.0, math.log1p(math.exp(-1))),
        (0.0, 1.0, None, 0.0, math.log1p(math.exp(1))),
        (1.0, 0.0, 1.0, 0.0, math.log(2)),
        (1.0, -1.0, 0.5, 0.0, math.log1p(math.exp(-1.5))),
        (1.0, -1.0, None, 0.5, math.log1p(math.exp(-2))),
        (3.0, 1.0, None, 0.1, math.log1p(math.exp(-2)) + 1.6),
        (-200.0, 200.0, None, 0.0, 400.0),
        (200.0, -200.0, None, 0.0, 0.0),
    ],
)
def test_the_loss_is_bradley_terrys_with_margin_and_centring(chosen, rejected, margin, center, expected):
    arrays = [None if x is None else jnp.full(2, x) for x in (chosen, rejected, margin)]
    loss = reward_model_loss(*arrays, center)
    assert loss.shape == (2,)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("coefficient", [-0.1, math.nan])
def test_a_negative_centring_is_refused(coefficient):
    with pytest.raises(ConfigError, match="--center_coef must not be negative"):
        RewardModelConfig(center_coef=coefficient)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_stages_loss_is_that_of_conversations_scored_one_by_one(load, config):
    rows, _ = load()
    params, settings = reward_model(config), RewardModelConfig(center_coef=0.1)
    rewards = np.asarray([[score_alone(params, config, row[side]) for side in ("chosen", "rejected")] for row in PAIRS])
    assert len(np.unique(rewards.round(3))) == 8  # they differ, so that a mix-up would show
    lead, lengths = rewards[:, 0] - rewards[:, 1], rows.answer_lengths
    margins = [row.get("margin", 0.0) for row in PAIRS]
    expected = {
        "loss": np.mean(np.log1p(np.exp(margins - lead)) + 0.1 * rewards.sum(1) ** 2),
        "accuracy": np.mean(lead > 0),
        "margin": np.mean(lead),
        "rewards_chosen": np.mean(rewards[:, 0]),
        "rewards_rejected": np.mean(rewards[:, 1]),
        "brier": np.mean((1 / (1 + np.exp(-lead)) - 1) ** 2),
        "longer_accuracy": np.mean(lengths[:, 0] > lengths[:, 1]),
    }
    batch = rows.gather(range(4))
    loss_sum, (weight, metrics) = reward_pairs_loss(config, COMPUTE, settings)(params, None, batch, None)
    found = means(metrics)
    router_loss = found.pop("router_loss", 0.0)
    assert (router_loss > 0) == config.use_moe
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert weight == 4
    assert loss_sum == pytest.approx(4 * (expected["loss"] + router_loss), rel=1e-4)


def test_the_model_reads_the_whole_rendered_conversation(load):
    rows, _ = load()
    batch = rows.gather(range(4))
    tokens, segment_ids = whole_documents(batch)
    assert tokens.shape == (4, 2, rows.seq_len + 1)
    for i, row in enumerate(PAIRS):
        for side, name in enumerate(("chosen", "rejected")):
            ids = render(TOKENIZER, row[name]).token_ids
            assert TOKENIZER.decode(ids, skip_special_tokens=False).endswith("<|im_end|>\n")
            assert tokens[i, side, : len(ids)].tolist() == ids
            assert segment_ids[i, side].tolist() == [1] * len(ids) + [0] * (rows.seq_len + 1 - len(ids))


def test_a_conversation_that_is_cut_is_read_at_the_last_token_that_is_kept(load):
    row = {"chosen": turns("x", "a far longer answer than fits"), "rejected": turns("x", "b")}
    ids = render(TOKENIZER, row["chosen"]).token_ids
    length = len(ids) - 6
    rows, _ = load([row], max_seq_len=length - 1)
    params = reward_model(TINY)
    found = pair_scores(params, TINY, COMPUTE, rows.gather([0]))[0]
    expected = reward_scores(params, TINY, np.asarray([ids[:length]]))[0]
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("config", [TINY, MODELS["moe"]], ids=["dense", "moe"])
def test_pairs_score_in_a_batch_as_alone_whatever_the_padding(load, config):
    rows, _ = load()
    params = reward_model(config)
    together, _ = pair_scores(params, config, COMPUTE, rows.gather(range(4)))
    longer = dataclasses.replace(rows, seq_len=rows.seq_len + 32)
    for i in range(4):
        alone, _ = pair_scores(params, config, COMPUTE, longer.gather([i]))
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, MODELS["moe"]], ids=["dense", "moe"])
def test_accumulation_and_pairs_of_padding_change_nothing(load, config):
    rows, _ = load([*PAIRS, PAIRS[0]])
    params, loss_fn = reward_model(config), reward_pairs_loss(config, COMPUTE, RewardModelConfig())
    key, whole = jax.random.key(0), rows.gather(range(5))
    *_, padded = eval_batches(rows, 8)
    grads, weight, sums = accumulate(loss_fn, params, None, whole, key, 1)
    assert weight == 5
    for micro_batches in (1, 2, 4):
        other_grads, other_weight, other_sums = accumulate(loss_fn, params, None, padded, key, micro_batches)
        assert other_weight == weight
        assert means(other_sums) == pytest.approx(means(sums), rel=1e-4, abs=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), other_grads, grads)


def test_the_routers_loss_is_the_mean_over_the_tokens_of_each_pair(load):
    config, params = MODELS["moe"], reward_model(MODELS["moe"])
    rows, _ = load()
    _, (_, metrics) = reward_pairs_loss(config, COMPUTE, RewardModelConfig())(params, None, rows.gather(range(4)), None)
    forward_padded = jax.jit(lambda tokens, real: forward_hidden(params, config, tokens, segment_ids=real).router_loss)
    alone = []
    for row in PAIRS:
        sides = [render(TOKENIZER, row[side]).token_ids for side in ("chosen", "rejected")]
        tokens = np.asarray([ids + [0] * (96 - len(ids)) for ids in sides])
        real = np.arange(96) < np.asarray([[len(ids)] for ids in sides])
        losses = np.concatenate([forward_padded(tokens[i : i + 1], real[i : i + 1].astype(np.int32)) for i in (0, 1)])
        alone.append(losses[real].mean())
    assert means(metrics)["router_loss"] == pytest.approx(np.mean(alone), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters: a new head, an old one, shardings


def save(folder, config, params):
    write_run(folder, config, params, TOKENIZER, {})
    return folder


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_language_model_gets_a_head_of_zeros_and_loses_its_own(tmp_path, config, sharded):
    params = language_model(config)
    path = save(tmp_path / "lm", config, params)
    assert not holds_reward_model(path)
    shardings = tree_shardings(make_mesh(), reward_axes(config)) if sharded else None
    loaded_config, loaded = load_reward_params(path, shardings=shardings)
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(reward_shapes(config))
    jax.tree.map(np.testing.assert_array_equal, loaded, scored(params, np.zeros((config.hidden_size, 1), np.float32)))
    if sharded:
        assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_reward_model_is_loaded_as_it_is(tmp_path, config):
    params = reward_model(config)
    path = save(tmp_path / "rm", config, params)
    assert holds_reward_model(path)
    assert axes_of(path) == reward_axes(config)
    shardings = tree_shardings(make_mesh(), reward_axes(config))
    for loaded in (
        load_params(path)[1],
        load_params(path, shardings=shardings)[1],
        load_reward_params(path, shardings=shardings)[1],
        mj.load(path, mesh="data=-1").params,
    ):
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_one_kind_of_model_where_the_other_is_needed_is_named(tmp_path):
    mesh = make_mesh()
    lm, rm = (save(tmp_path / name, UNTIED, f(UNTIED)) for name, f in (("lm", language_model), ("rm", reward_model)))
    for path in (lm, rm):
        mj.export_hf(mj.load(path), tmp_path / f"{path.name}-hf")
    for suffix in ("", "-hf"):
        with pytest.raises(UserError, match="reward model, where a language model is needed"):
            load_params(f"{rm}{suffix}", shardings=tree_shardings(mesh, param_axes(UNTIED)))
        with pytest.raises(UserError, match="language model, where a reward model is needed"):
            load_params(f"{lm}{suffix}", shardings=tree_shardings(mesh, reward_axes(UNTIED)))
    assert holds_reward_model(tmp_path / "rm-hf") and not holds_reward_model(tmp_path / "lm-hf")


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_a_reward_model_writes_no_text(config):
    lm = LanguageModel(config, reward_model(config), TOKENIZER)
    with pytest.raises(ValueError, match="a reward model's parameters, which have no output head"):
        mj.generate(lm, ["it was"])


# ---------------------------------------------------------------------------------------------------------------------
# The stage and evaluation, in this process


@pytest.fixture
def stage(tmp_path, monkeypatch, capsys):
    """Run `rl.train_rm` on PAIRS; returns its report."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))

    def stage(model_path, out_dir, *flags):
        argv = ["--data_path", path, "--valid_path", path, "--cache_dir", tmp_path / "cache", "--max_seq_len", 96]
        argv += ["--model_path", model_path, "--out_dir", out_dir, "--batch_size", 4, "--steps", 3, *flags]
        monkeypatch.setattr(sys, "argv", ["train_rm", *map(str, argv)])
        assert train_rm.main() == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    stage.data = path
    return stage


def evaluate(capsys, model_path, data_path, *flags):
    argv = ["--model_path", model_path, "--data_path", data_path, "--task", "pairs", *flags]
    assert train.evaluate.main([*map(str, argv)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_starts_from_a_language_model_and_another_goes_on_from_it(stage, tmp_path, capsys):
    lm, first, second = save(tmp_path / "lm", UNTIED, language_model(UNTIED)), tmp_path / "first", tmp_path / "second"
    report = stage(lm, first, "--learning_rate", "1e-2")
    assert report == json.loads((first / "report.json").read_text())
    trained = mj.load(first)
    assert "lm_head" not in trained.params and np.any(trained.params["score"]["kernel"])
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    start = next(row for row in rows if "loss" in row)
    assert start["accuracy"] == 0 and start["brier"] == 0.25  # a head of zeros ties
    last = [row for row in rows if "valid_loss" in row][-1]
    assert last["valid_accuracy"] == report["accuracy"]
    assert last["valid_brier"] == pytest.approx(report["brier"], rel=1e-4)
    evaluated = evaluate(capsys, first, stage.data)
    assert {name: evaluated[name] for name in report} == pytest.approx(report, rel=1e-4)
    assert evaluated["max_seq_len"] == 96 and evaluated["rows_left_out"] == 0

    again = stage(first, second, "--learning_rate", "0")
    assert again == pytest.approx(report, rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, mj.load(second).params, trained.params)


def test_an_adapter_of_a_reward_model_trains_the_head_as_well(stage, tmp_path, capsys):
    lm, first, second = save(tmp_path / "lm", UNTIED, language_model(UNTIED)), tmp_path / "first", tmp_path / "second"
    adapter = ["--lora_rank", "2", "--learning_rate", "1e-2"]
    report = stage(lm, first, *adapter)
    trained, base = mj.load(first), mj.load(lm).params
    assert "lm_head" not in trained.params and np.any(trained.params["score"]["kernel"])
    np.testing.assert_array_equal(trained.params["embed_tokens"]["embedding"], base["embed_tokens"]["embedding"])
    newest = max((first / "checkpoints").iterdir(), key=lambda path: int(path.name))
    arrays = json.loads((newest / "metadata.json").read_text())["arrays"]
    assert not [name for name in arrays if name.startswith("params.") and name[-2:] not in (".a", ".b", "el")]
    evaluated = evaluate(capsys, first, stage.data)
    assert evaluated["margin"] == pytest.approx(report["margin"], rel=1e-4)
    jax.tree.map(np.testing.assert_array_equal, mj.load(first, mesh="data=-1").params, trained.params)

    again = stage(first, second, *adapter[:2], "--learning_rate", "0")
    assert again == pytest.approx(report, rel=1e-4)


def test_a_mixture_of_experts_becomes_a_reward_model_that_transformers_knows(stage, tmp_path):
    config = dataclasses.replace(MODELS["moe"], n_shared_experts=0, use_qk_norm=True)
    lm = save(tmp_path / "lm", config, language_model(config))
    assert stage(lm, tmp_path / "rm", "--learning_rate", "1e-2")["rows"] == 4
    trained = mj.load(tmp_path / "rm")
    mj.export_hf(trained, tmp_path / "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["architectures"] == ["Qwen3MoeForSequenceClassification"]
    jax.tree.map(np.testing.assert_array_equal, mj.load(tmp_path / "hf").params, trained.params)


def test_a_context_that_a_row_fills_leaves_room_for_the_last_token(stage, tmp_path):
    config = dataclasses.replace(TINY, max_position_embeddings=80)
    assert stage(save(tmp_path / "lm", config, language_model(config)), tmp_path / "rm", "--steps", "1")["rows"]


def test_the_stage_needs_a_model(monkeypatch, tmp_path, capsys):
    argv = ["train_rm", "--data_path", "x", "--out_dir", str(tmp_path / "rm"), "--preset", "tiny"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        train_rm.main()
    assert "--model_path is needed" in capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


@pytest.mark.parametrize("config", [TINY, MODELS["moe"]], ids=["dense", "moe"])
def test_a_language_model_judges_pairs_by_the_log_probability_of_the_last_turn(data, tmp_path, capsys, config):
    params = language_model(config)
    logps = []
    for row in PAIRS:
        prompt = len(render(TOKENIZER, row["chosen"][:-1], add_generation_prompt=True).token_ids)
        for side in ("chosen", "rejected"):
            ids = np.asarray(render(TOKENIZER, row[side]).token_ids)
            logits = jax.nn.log_softmax(forward(params, config, ids[None])[0])
            logps.append(float(logits[np.arange(prompt - 1, len(ids) - 1), ids[prompt:]].sum()))
    lead = np.subtract(logps[::2], logps[1::2])
    found = evaluate(capsys, save(tmp_path / "lm", config, params), data)
    assert found["margin"] == pytest.approx(lead.mean(), rel=1e-4)
    assert (found["accuracy"], found["rows"], found["longer_accuracy"]) == ((lead > 0).mean(), 4, 0.5)
    assert "brier" not in found


def test_a_reward_model_judges_pairs_by_its_rewards(data, tmp_path, capsys, load):
    params = reward_model(UNTIED)
    path = save(tmp_path / "rm", UNTIED, params)
    scores = reward_pairs(params, UNTIED, COMPUTE, load()[0], 3, make_mesh())
    expected = preference_metrics(scores, load()[0].answer_lengths, calibration=True)
    found = evaluate(capsys, path, data, "--batch_size", "3")
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert found["tokens_processed"] == sum(len(render(TOKENIZER, r[s]).token_ids) for r in PAIRS for s in list(r)[:2])
    assert evaluate(capsys, path, data, "--limit", "2")["rows"] == 2


def test_pairs_that_do_not_fit_are_left_out_of_an_evaluation_as_of_training(data, tmp_path, capsys):
    wordy = {"chosen": turns("x " * 200, "y"), "rejected": turns("x " * 200, "z")}
    data.write_text(json.dumps(wordy) + "\n" + data.read_text())
    path = save(tmp_path / "rm", TINY, reward_model(TINY))
    found = evaluate(capsys, path, data, "--max_seq_len", "120")
    assert (found["rows"], found["rows_left_out"]) == (4, 1)
    with pytest.raises(SystemExit):
        evaluate(capsys, path, data, "--max_seq_len", "120", "--limit", "1")
    assert "not one of its 1 pairs fits" in capsys.readouterr().err


def test_bad_pairs_stop_an_evaluation_or_are_counted(data, tmp_path, capsys):
    path = save(tmp_path / "rm", TINY, reward_model(TINY))
    same = {"chosen": PAIRS[0]["chosen"], "rejected": PAIRS[0]["chosen"]}
    data.write_text(data.read_text() + json.dumps(same) + "\n" + '{"chosen": 3}\n')
    with pytest.raises(SystemExit):
        evaluate(capsys, path, data, "--limit", "5")
    assert "pairs.jsonl:5: rejected: is the same as chosen" in capsys.readouterr().err
    found = evaluate(capsys, path, data, "--on_bad_row", "skip")
    assert (found["rows"], found["skipped_rows"]) == (4, 2)


@pytest.mark.parametrize(
    ("task", "row"),
    [("lm", {"text": "x"}), ("pairs", {"good": "a", "bad": "b"}), ("exact", {"prompt": "a", "answer": "b"})],
)
def test_a_reward_model_is_refused_by_other_tasks(tmp_path, capsys, task, row):
    path, data = save(tmp_path / "rm", TINY, reward_model(TINY)), tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit) as caught:
        train.evaluate.main(["--model_path", str(path), "--data_path", str(data), "--task", task])
    assert caught.value.code == 2
    assert "is a reward model, which predicts no text" in capsys.readouterr().err


def test_nobody_can_talk_to_a_reward_model(tmp_path, capsys):
    path = save(tmp_path / "rm", TINY, reward_model(TINY))
    with pytest.raises(SystemExit) as caught:
        chat.main(["--model_path", str(path), "--prompt", "hello"])
    assert caught.value.code == 2
    assert "is a reward model; it scores texts and writes none" in capsys.readouterr().err.replace("\n", " ")
