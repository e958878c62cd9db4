"""How long is a server away? Seconds from its start until it is ready, the first time and again after a SIGKILL.

    python -m benchmarks.restart

The first start finds an empty folder of compiled programs and fills it; the second finds them there. Prints one JSON
line with both times, their ratio, and how many programs each start had to compile and add to the folder.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.common import emit, machine
from benchmarks.load import export_random_model, serving
from minillm_jax.cli import setup_jax, user_errors
from minillm_jax.config import ModelConfig, parse_cli
from minillm_jax.flops import count_params


@dataclass(frozen=True)
class RestartBenchmark:
    """What is started."""

    model: ModelConfig
    preset: str = "minillm"
    """Shape of the model: minillm, minimind3, minimind3_moe or tiny."""


@dataclass(frozen=True)
class Start:
    """One start: seconds until the server was ready, and programs that it added to the folder of compiled ones."""

    seconds: float
    programs_added: int


def restart(model_path: Path, folder: Path, flags: Sequence[str] = (), **env: str) -> tuple[Start, Start]:
    """Start a server, kill it when it is ready, and start it again.

    Args:
        model_path: what is served.
        folder: empty; takes compiled programs and logs.
        flags: of the server.
        env: added to its environment.
    """
    cache = folder / "compiled"
    starts, before = [], 0
    for name in ("first.log", "second.log"):
        words = [f"--model_path={model_path}", "--port=0", *flags]
        with serving("serve", *words, log=folder / name, **env | {"JAX_COMPILATION_CACHE_DIR": str(cache)}) as server:
            kept = len(list(cache.glob("*-cache")))
            starts.append(Start(round(server.start_seconds, 2), kept - before))
            before = kept  # leaving kills the process
    return starts[0], starts[1]


def main() -> int:
    """Measure and print; returns the exit status."""
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        config = parse_cli(RestartBenchmark, str(__doc__))
        setup_jax()
        folder = Path(temporary)
        export_random_model(config.model, folder / "model")
        first, second = restart(folder / "model", folder)
        emit({
            "name": "restart", **machine(), "preset": config.preset,
            "parameters": count_params(config.model), "first": asdict(first), "second": asdict(second),
            "ratio": round(second.seconds / first.seconds, 3),
        })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
