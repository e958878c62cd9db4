"""`adapter.json`: what an adapter's checkpoint says about itself, its ranks and targets and the base it belongs to.

A run pins the very checkpoint that it started from, so that a base that is trained further does not change under its
adapters. Both the absolute path and the way from one run to the other are kept: either folder may be moved alone, or
both together.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from minillm_jax import checkpoint
from minillm_jax.config import LoraConfig
from minillm_jax.errors import UserError

ADAPTER_FILE = "adapter.json"


class AdapterError(UserError, ValueError):
    """An adapter that cannot be used; the message names it, its base, and what to do."""


@dataclass(frozen=True)
class AdapterFile:
    """Contents of `adapter.json`.

    Attributes:
        lora: rank, scale, dropout and targets.
        base: absolute path of the base.
        base_from_run: the same, from the adapter's run folder.
    """

    lora: LoraConfig
    base: str
    base_from_run: str

    @classmethod
    def of(cls, lora: LoraConfig, base: Path, run: Path) -> AdapterFile:
        """Describe an adapter of `base` whose run folder is `run`."""
        base = base.absolute()
        return cls(lora, str(base), os.path.relpath(base, run.absolute()))

    def to_json(self) -> str:
        """Write as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> AdapterFile:
        """Read what `to_json` wrote.

        Raises:
            AdapterError: the text is something else.
        """
        try:
            values = json.loads(text)
            lora = dict(values.pop("lora"))
            return cls(LoraConfig(**lora | {"lora_targets": tuple(lora["lora_targets"])}), **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdapterError(f"{ADAPTER_FILE} cannot be read: {error}") from error

    def find_base(self, path: str | Path) -> Path:
        """Find the base of the adapter at `path`, a run or a checkpoint.

        Raises:
            AdapterError: it is neither where it was nor where it would be from here.
        """
        run = Path(path).absolute()
        if run.parent.name == checkpoint.CHECKPOINTS:
            run = run.parent
        if run.name == checkpoint.CHECKPOINTS:
            run = run.parent
        for base in (Path(os.path.normpath(run / self.base_from_run)), Path(self.base)):
            if base.exists():
                return base
        raise AdapterError(
            f"{path} is an adapter, and its base {self.base} is gone; name another copy of the base: "
            f"minillm_jax.load(BASE, adapter=…), or python -m minillm_jax.lora merge --base BASE"
        )


def read_adapter_file(path: str | Path) -> AdapterFile | None:
    """Read `adapter.json` of a run or checkpoint; None when it holds a whole model.

    Raises:
        CheckpointError: there is no checkpoint, or all are damaged.
        AdapterError: the file cannot be read.
    """
    text = checkpoint.read_file(path, ADAPTER_FILE)
    return None if text is None else AdapterFile.from_json(text)
