"""The command line: both spellings, presets, and flags that contradict a checkpoint."""

import dataclasses
import json

import pytest

from minillm_jax.config import ConfigError, ModelConfig, RopeScaling, model_config_from_dict, parse_cli, to_json
from train.pretrain import PretrainConfig

REQUIRED = ["--data_path", "a.jsonl", "--out_dir", "out"]


def parse(*flags, read_model=None):
    return parse_cli(PretrainConfig, "test", argv=[*REQUIRED, *flags], read_model=read_model)


def test_hyphens_and_underscores_mean_the_same():
    assert parse("--hidden_size", "256", "--use_moe") == parse("--hidden-size", "256", "--use-moe")


def test_several_paths_with_weights_are_kept_as_written():
    flags = ["--data_path", "a.jsonl:0.7", "b.jsonl:0.3", "--out_dir", "o"]
    assert parse_cli(PretrainConfig, "test", argv=flags).data.data_path == ("a.jsonl:0.7", "b.jsonl:0.3")


def test_a_preset_is_the_start_for_shape_flags():
    config = parse("--preset", "minimind3", "--num_hidden_layers", "3").model
    assert (config.hidden_size, config.num_hidden_layers, config.use_qk_norm) == (768, 3, True)


def test_derived_sizes_follow_the_hidden_size():
    config = parse("--hidden_size", "256").model.resolved()
    assert (config.head_dim, config.intermediate_size, config.moe_intermediate_size) == (32, 704, 704)


def test_rope_scaling_is_json():
    scaling = parse("--rope_scaling", '{"rope_type": "yarn", "factor": 4}').model.rope_scaling
    assert scaling == RopeScaling("yarn", 4)


def test_a_checkpoint_decides_the_shape():
    saved = ModelConfig(hidden_size=64, num_attention_heads=4).resolved()
    assert parse("--model_path", "run", read_model=lambda path: saved).model == saved
    assert parse("--model_path=run", "--hidden_size", "64", read_model=lambda path: saved).model == saved
    with pytest.raises(ConfigError, match="--hidden_size 128 contradicts run, which was trained with 64"):
        parse("--model_path", "run", "--hidden_size", "128", read_model=lambda path: saved)
    assert parse("--model_path", "run", "--dropout", "0.2", read_model=lambda path: saved).model.dropout == 0.2


@pytest.mark.parametrize(
    "flags", [["--no_such_flag", "1"], ["--hidden_size", "wide"], ["--schedule", "linear"]], ids=lambda f: f[0]
)
def test_wrong_flags_end_with_status_2(flags, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*flags)
    assert exit_info.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="choose from minillm, minimind3"):
        parse("--preset", "giant")


def test_model_configuration_survives_json():
    config = ModelConfig(rope_scaling=RopeScaling("yarn", 2.0), use_moe=True).resolved()
    assert model_config_from_dict(json.loads(to_json(config))) == config


def test_unknown_model_fields_are_refused():
    values = dataclasses.asdict(ModelConfig()) | {"sliding_window": 512}
    with pytest.raises(ConfigError, match="sliding_window"):
        model_config_from_dict(values)
