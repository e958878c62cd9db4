"""Health bounds: each names the metric that broke it, and nothing else is a problem."""

import math

import pytest

from minillm_jax.config import ConfigError
from rl.health import MONITORS, HealthConfig, broken_bound

FINE = {"loss": 0.1, "reward": 0.5, "reward_std": 0.5, "kl": 0.1, "entropy": 0.5, "eos_rate": 0.9,
        "completion_length": 20.0, "zero_variance": 0.3, "ratio": 1.0, "clip_fraction": 0.1,
        "explained_variance": 0.2}  # fmt: skip


def test_healthy_metrics_break_no_bound():
    assert broken_bound(HealthConfig(), FINE) is None
    assert broken_bound(HealthConfig(), {}) is None


@pytest.mark.parametrize("bound", MONITORS)
def test_every_bound_is_watched_from_its_own_side(bound):
    name = MONITORS[bound]
    side = -1 if bound.startswith("min") else 1
    limits = HealthConfig(**{bound: FINE[name] + side * 0.01})
    assert broken_bound(limits, FINE) is None
    problem = broken_bound(limits, FINE | {name: FINE[name] + side * 0.02})
    assert problem is not None and problem.startswith(f"{name} is ") and f"--{bound}" in problem


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_never_healthy(value):
    assert broken_bound(HealthConfig(max_kl=None, max_ratio=None), FINE | {"loss": value}) == f"the loss is {value}"
    assert "kl is nan" in broken_bound(HealthConfig(), FINE | {"kl": math.nan})


def test_bounds_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="health_patience"):
        HealthConfig(health_patience=0)
    with pytest.raises(ConfigError, match="rollback_lr_factor"):
        HealthConfig(rollback_lr_factor=1.5)
