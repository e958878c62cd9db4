"""Rewards of completions: built-in functions, functions of users, and a reward model, added up.

Samples go in; a total and every component by name come out, as numpy arrays. The decision worth knowing: a reward that
fails or is not finite stops the run, which can be resumed, because nothing should be learnt from garbage. With
`--on_bad_reward skip` such completions are marked instead, and the stage gives them no weight.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from minillm_jax.config import ComputeConfig, ConfigError
from minillm_jax.data.records import RLRecord
from minillm_jax.errors import UserError
from minillm_jax.tokenizer import Tokenizer
from rl.reward_functions import (
    RewardFn,
    exact,
    matches,
    numeric,
    read_number,
    repetition,
    soft_overlong_punishment,
    well_formed,
)
from rl.reward_model import RewardModel, open_reward_model

BUILT_IN = ("exact", "numeric", "format", "regex", "length", "repetition", "model")
"""Names that `--reward` knows without a module."""
FREE_LENGTH = 0.8
"""Share of the longest completion that `length` leaves free, as in DAPO's experiments."""
SHOWN = 80
"""Characters of a completion that an error shows."""

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


class RewardError(UserError):
    """A reward that cannot be computed; the message says which, on which row, and what to do."""


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt."""

    prompt_ids: list[int]
    """Tokens of the rendered prompt."""
    completion_ids: list[int]
    """Tokens that were drawn, the end token included if there was one."""
    prompt: str
    """Text of the rendered prompt."""
    completion: str
    """Text of the completion without its end token; tags such as <think> are text."""
    finished: bool
    """Whether an end token closed it; False when it was cut off."""
    record: RLRecord
    """The row that the prompt was made of."""


@dataclass(frozen=True)
class Scored:
    """Rewards of B completions; where `ok` is False all of them are 0 and mean nothing."""

    total: np.ndarray
    """[B] float32: the weighted sum, clipped, less the penalty of what was cut off."""
    components: dict[str, np.ndarray]
    """[B] float32 each, by name, before weighting."""
    ok: np.ndarray
    """[B] bool; False for a completion whose reward failed, which must carry no loss."""

    def metrics(self) -> dict[str, float]:
        """Return `reward`, `reward/NAME` for each component, means over good rewards, and the count `bad_rewards`."""
        good = max(1, int(self.ok.sum()))  # where none is good all values are 0
        means = {f"reward/{name}": float(values.sum()) / good for name, values in self.components.items()}
        return {"reward": float(self.total.sum()) / good, **means, "bad_rewards": float((~self.ok).sum())}


# --- Configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardConfig:
    """What completions are rewarded for."""

    reward: tuple[str, ...] = ()
    """exact, numeric, format, regex, length, repetition, model or package.module:function, each with a weight if it is
    not 1: exact format:0.2 my.module:func:0.5. Empty is exact, or model where reward_model_path is given."""
    reward_model_path: str | None = None
    """Run, checkpoint or Hugging Face folder of a reward model (model)."""
    reward_pattern: str | None = None
    """Regular expression to be found somewhere in a completion (regex)."""
    reward_length_target: int | None = None
    """Tokens of a completion that cost nothing; from there length falls to -1 at max_new_tokens. None is four fifths of
    those."""
    reward_clip: float | None = None
    """Keep the weighted sum of rewards within [-reward_clip, reward_clip]."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the clipped sum where a completion was cut off without an end token."""
    on_bad_reward: Literal["error", "skip"] = "error"
    """Stop when a reward fails or is not finite, or leave such completions out of the loss and count them."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        names = self.weights()
        settings = (
            ("model", "reward_model_path", self.reward_model_path),
            ("regex", "reward_pattern", self.reward_pattern),
            ("length", "reward_length_target", self.reward_length_target),
        )
        for name, flag, value in settings:
            if value is None and name in names and name != "length":
                raise ConfigError(f"--reward {name} needs --{flag}")
            if value is not None and name not in names:
                raise ConfigError(f"--{flag} is given, but --reward does not name {name}; add {name} to it")
        if self.reward_pattern is not None:
            try:
                re.compile(self.reward_pattern)
            except re.error as error:
                raise ConfigError(
                    f"--reward_pattern {self.reward_pattern!r} is no regular expression: {error}"
                ) from error
        if self.reward_clip is not None and not self.reward_clip > 0:
            raise ConfigError(f"--reward_clip must be positive, not {self.reward_clip}")
        if not 0 <= self.missing_eos_penalty < math.inf:
            raise ConfigError(f"--missing_eos_penalty must not be negative, but is {self.missing_eos_penalty}")

    def weights(self) -> dict[str, float]:
        """Return the weight of each reward by name.

        Raises:
            ConfigError: a reward that is neither built in nor `package.module:function`, or named twice.
        """
        found: dict[str, float] = {}
        for spec in self.reward or ("exact" if self.reward_model_path is None else "model",):
            name, weight = parse_reward(spec)
            if name in found:
                raise ConfigError(f"--reward names {name} twice; give it one weight")
            found[name] = weight
        return found


def parse_reward(spec: str) -> tuple[str, float]:
    """Split `NAME:WEIGHT` or `package.module:function:WEIGHT`; without a weight it is 1.

    Weights may be negative, and 0 only logs a reward. A function's name never looks like a number.

    Raises:
        ConfigError: a name that is neither built in nor a module and a function.
    """
    head, colon, tail = spec.rpartition(":")
    name, weight = (head, float(tail)) if colon and _NUMBER.fullmatch(tail) else (spec, 1.0)
    if not math.isfinite(weight):
        raise ConfigError(f"--reward {spec}: the weight is too large for a number")
    if name in BUILT_IN:
        return name, weight
    module, colon, function = name.partition(":")
    if module in BUILT_IN:
        raise ConfigError(f"--reward {spec}: {module} is built in, so what follows the colon must be its weight")
    identifiers = all(part.isidentifier() for part in [*module.split("."), function])
    if not colon or not identifiers or module.endswith(".py"):
        raise ConfigError(
            f"--reward {spec}: unknown; give one of {', '.join(BUILT_IN)}, or a function of your own as "
            "package.module:function"
        )
    return name, weight


# --- Functions of users --------------------------------------------------------------------------------------------


def load_function(name: str) -> RewardFn:
    """Import `package.module:function`, with the current directory on the path.

    Raises:
        RewardError: the module cannot be imported, or has no such function.
    """
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise RewardError(f"--reward {name}: {module_name} cannot be imported: {error}") from error
        missing = f"there is no module {module_name} in {here} or among installed packages"
        raise RewardError(f"--reward {name}: {missing}") from error
    except Exception as error:  # a module may raise anything
        raise RewardError(f"--reward {name}: {module_name} cannot be imported: {_describe(error)}") from error
    if not hasattr(module, function_name):
        raise RewardError(f"--reward {name}: {module.__file__ or module_name} has no {function_name}")
    function: RewardFn = getattr(module, function_name)
    if not callable(function):
        raise RewardError(f"--reward {name}: {function_name} is a {type(function).__name__}, not a function")
    return function


def call_function(name: str, function: RewardFn, samples: Sequence[Sample], skip: bool) -> np.ndarray:
    """Call a reward function on a batch, and find the row to blame when it raises.

    Args:
        name: what errors call it.
        function: gets texts of prompts, texts of completions, and rows.
        samples: B completions.
        skip: leave out completions on which it raises, and call it again on the others, instead of stopping.

    Returns:
        [B] float64, NaN for what was left out.

    Raises:
        RewardError: the function raised, or returned something else than a number for each completion.
    """
    try:
        return _numbers(name, _call(function, samples), len(samples))
    except RewardError:
        raise
    except Exception as error:  # a user's function may raise anything
        culprits = _culprits(function, samples)
        if not (skip and culprits):
            raise _raised(name, error, samples, culprits) from error
    values = np.full(len(samples), np.nan)
    rest = [i for i in range(len(samples)) if i not in culprits]
    try:
        values[rest] = _numbers(name, _call(function, [samples[i] for i in rest]), len(rest)) if rest else []
    except RewardError:
        raise
    except Exception as error:
        raise _raised(name, error, [samples[i] for i in rest], {}) from error
    return values


def _call(function: RewardFn, samples: Sequence[Sample]) -> Any:
    return function([s.prompt for s in samples], [s.completion for s in samples], [s.record.row for s in samples])


def _culprits(function: RewardFn, samples: Sequence[Sample]) -> dict[int, Exception]:
    """Find the samples on which a function raises even when it is called with each alone."""
    found: dict[int, Exception] = {}
    for i, sample in enumerate(samples):
        try:
            _call(function, [sample])
        except Exception as error:
            found[i] = error
    return found


def _raised(name: str, error: Exception, samples: Sequence[Sample], culprits: dict[int, Exception]) -> RewardError:
    if not culprits:
        first, last = _where(samples[0]), _where(samples[-1])
        return RewardError(
            f"--reward {name} raised {_describe(error)} on a batch of {len(samples)} completions (rows {first} to "
            f"{last}), though on none of them alone; mend the function and start again to resume"
        )
    first_bad = min(culprits)
    return _bad_reward(name, f"raised {_describe(culprits[first_bad])}", samples[first_bad])


def _bad_reward(name: str, problem: str, sample: Sample) -> RewardError:
    return RewardError(
        f"{_where(sample)}: --reward {name} {problem} on the completion {sample.completion[:SHOWN]!r}; mend it and "
        "start again to resume, or leave such completions out with --on_bad_reward skip"
    )


def _describe(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _where(sample: Sample) -> str:
    return f"{sample.record.file}:{sample.record.line}"


def _numbers(name: str, values: Any, count: int) -> np.ndarray:
    """Check that a function returned one number for each completion; returns them as [count] float64."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # a ragged list, or an array that is out of reach
        array = np.asarray(None)
    found = f"a {type(values).__name__}"
    if array.ndim:
        found += f" of shape {array.shape}" if array.ndim > 1 else f" of length {len(array)}"
    if array.shape == (count,) and array.dtype.kind not in "biuf" and count:
        odd = next((value for value in values if np.asarray(value).dtype.kind not in "biuf"), None)
        found += f" that holds {odd!r}"
    elif array.shape == (count,):
        return array.astype(np.float64)
    raise RewardError(
        f"--reward {name} must return a list of numbers, one for each of {count} completions, but returned {found}"
    )


# --- Rewards together ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Component:
    """One reward among those that are added up."""

    name: str
    weight: float
    score: Callable[[Sequence[Sample]], np.ndarray]
    """Gives [B], NaN for a completion to leave out."""


@dataclass(frozen=True)
class Rewards:
    """A sum of rewards: `rewards.check(records)` before training, `rewards(samples)` to score completions."""

    components: tuple[Component, ...]
    clip: float | None = None
    missing_eos_penalty: float = 0.0
    skip_bad: bool = False

    def check(self, records: Iterable[RLRecord]) -> None:
        """Refuse rows that a verifiable reward has nothing to compare with.

        Raises:
            RewardError: `FILE:LINE: answer: what is wrong`.
        """
        names = {component.name for component in self.components}
        for record in records:
            where = f"{record.file}:{record.line}: answer: "
            if record.answer is None and (name := next((n for n in ("exact", "numeric") if n in names), None)):
                raise RewardError(
                    f"{where}is missing, and --reward {name} compares with it; add it, or choose another --reward"
                )
            if "numeric" in names and read_number(str(record.answer)) is None:
                raise RewardError(f"{where}{record.answer!r} holds no number for --reward numeric to compare with")

    def __call__(self, samples: Sequence[Sample]) -> Scored:
        """Score completions.

        Raises:
            RewardError: a reward failed or is not finite; with `skip_bad` only if no single completion is to blame.
        """
        ok = np.ones(len(samples), bool)
        raw: dict[str, np.ndarray] = {}
        for component in self.components:
            with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and a bad reward
                raw[component.name] = values = component.score(samples).astype(np.float32)
            finite = np.isfinite(values)
            if not (self.skip_bad or finite.all()):
                first = int(np.argmin(finite))
                raise _bad_reward(component.name, f"is {values[first]}", samples[first])
            ok &= finite
        components = {name: np.where(ok, values, 0).astype(np.float32) for name, values in raw.items()}
        total = np.zeros(len(samples), np.float64)
        for component in self.components:
            total += component.weight * components[component.name]
        if self.clip is not None:
            total = np.clip(total, -self.clip, self.clip)
        if self.missing_eos_penalty:  # after clipping, so that it is felt whatever else a completion earns
            cut_off = ok & ~np.asarray([sample.finished for sample in samples], bool)
            components["missing_eos"] = -cut_off.astype(np.float32)
            total -= self.missing_eos_penalty * cut_off
        return Scored(total.astype(np.float32), components, ok)


def make_rewards(
    config: RewardConfig,
    tokenizer: Tokenizer,
    *,
    max_prompt_len: int,
    max_new_tokens: int,
    mesh: Mesh | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> Rewards:
    """Load what a configuration names.

    Args:
        config: which rewards, with which weights.
        tokenizer: the policy's.
        max_prompt_len: the most tokens of a prompt.
        max_new_tokens: the most tokens of a completion, at which `length` is -1.
        mesh: devices of this process for a reward model; None is the first one.
        compute: dtype and attention implementation of a reward model.

    Raises:
        RewardError: a user's function cannot be loaded.
        ConfigError: a target length that is no less than the limit, or a reward model that does not fit the policy.
        HfError, CheckpointError: the reward model's folder holds no model.
    """
    skip = config.on_bad_reward == "skip"

    def component(name: str, weight: float) -> Component:
        if name == "model":
            longest = max_prompt_len + max_new_tokens
            model = open_reward_model(
                str(config.reward_model_path), tokenizer, max_seq_len=longest, mesh=mesh, compute=compute
            )
            return Component(name, weight, _of_model(model))
        if name == "length":
            return Component(name, weight, _of_length(config.reward_length_target, max_new_tokens))
        if name == "regex":
            return Component(name, weight, _of_function(name, matches(str(config.reward_pattern)), skip))
        texts = {"exact": exact, "numeric": numeric, "format": well_formed, "repetition": repetition}
        return Component(name, weight, _of_function(name, texts.get(name) or load_function(name), skip))

    components = tuple(component(name, weight) for name, weight in config.weights().items())
    return Rewards(components, config.reward_clip, config.missing_eos_penalty, skip)


Score = Callable[[Sequence[Sample]], np.ndarray]


def _of_function(name: str, function: RewardFn, skip: bool) -> Score:
    return lambda samples: call_function(name, function, samples, skip)


def _of_model(model: RewardModel) -> Score:
    return lambda samples: model.score([model.whole(s.prompt_ids, s.completion_ids) for s in samples])


def _of_length(target: int | None, limit: int) -> Score:
    target = int(FREE_LENGTH * limit) if target is None else target
    if not 0 <= target < limit:
        raise ConfigError(f"--reward_length_target must lie between 0 and --max_new_tokens ({limit}), not {target}")
    return lambda samples: soft_overlong_punishment([len(s.completion_ids) for s in samples], target, limit)
