"""A results file as Markdown tables, for people.

python -m benchmarks.summary out/gpu/results.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lay out a table; a missing value is a dash."""
    shown = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join('–' if cell is None else str(cell) for cell in row)} |" for row in shown)


def percent(share: float | None) -> str | None:
    """Spell a share."""
    return None if share is None else f"{share:.1%}"


def training(lines: Sequence[Line]) -> str:
    """Tokens per second of training, ours and PyTorch's."""
    header = ("model", "by", "dtype", "batch", "seconds a step", "tokens/s", "MFU", "of the roofline", "bound by")
    rows = [
        (
            line["preset"] + (" (mixture of experts)" if line.get("active_parameters", 0) < line["parameters"] and
                              "active_parameters" in line else ""),
            "PyTorch" if line["name"] == "torch_baseline" else "here",
            line["dtype"], f"{line['batch_size']} × {line['seq_len']}",
            f"{line['step_seconds_median']} ± {line['step_seconds_iqr']}", f"{line['tokens_per_second']:,.0f}",
            percent(line.get("mfu")), percent(line.get("roofline_share")), line.get("bound"),
        )
        for line in lines
    ]  # fmt: skip
    return table(header, rows)


def decoding(lines: Sequence[Line]) -> str:
    """Tokens per second of prefill and decoding, by batch size."""
    header = (
        "model",
        "weights",
        "batch",
        "prefill tokens/s",
        "of the roofline",
        "decoding tokens/s",
        "of the roofline",
    )
    rows = [
        (
            line["preset"], line["weights"], line["batch_size"], f"{line['prefill_tokens_per_second']:,.0f}",
            percent(line["prefill"]["roofline_share"]), f"{line['tokens_per_second']:,.0f}",
            percent(line["decode"]["roofline_share"]),
        )
        for line in lines
    ]  # fmt: skip
    return table(header, rows)


def rollouts(lines: Sequence[Line]) -> str:
    """Tokens per second of rollouts."""
    header = ("model", "completions", "tokens/s", "of the roofline", "times one by one")
    rows = (
        (line["preset"], f"{line['completions']} × {line['max_new_tokens']}", f"{line['tokens_per_second']:,.0f}",
         percent(line["roofline_share"]), line["ratio"])
        for line in lines
    )  # fmt: skip
    return table(header, rows)


def serving(lines: Sequence[Line]) -> str:
    """Tokens per second of server and engine."""
    header = ("way", "clients", "tokens/s", "first token, median s", "p99 s")
    rows = (
        (line["way"], line["clients"], f"{line['tokens_per_second']:,.0f}", line.get("first_token_seconds_p50"),
         line.get("first_token_seconds_p99"))
        for line in lines
    )  # fmt: skip
    return table(header, rows)


def stages(lines: Sequence[Line]) -> str:
    """How far bfloat16 is from float32 in each stage."""
    header = ("stage", "curve", "steps", "mean difference", "largest", "s in float32", "in bfloat16", "ok")
    rows = (
        (line["stage"], line.get("curve"), line.get("points"), _small(line.get("mean_difference")),
         _small(line.get("max_difference")), line.get("seconds_float32", line.get("seconds")),
         line.get("seconds_bfloat16"), "yes" if line["ok"] else "**no**")
        for line in lines
    )  # fmt: skip
    return table(header, rows)


def _small(share: float | None) -> str | None:
    return None if share is None else f"{share:.3%}"


def kernels(lines: Sequence[Line]) -> str:
    """Each implementation's largest error over all cases, what it refused, and what is wrong."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line["operation"], line["impl"], line["dtype"]), []).append(line)
    header = ("operation", "implementation", "dtype", "cases", "largest error", "of a gradient", "refused", "wrong")
    rows = []
    for key, group in found.items():
        judged = [line for line in group if "error" in line]
        wrong = [line["case"] for line in group if line.get("ok") is False]
        largest = (max((line[name] for line in judged), default=None) for name in ("error", "gradient_error"))
        refused = sum("refused" in line for line in group)
        rows.append((*key, len(judged), *largest, refused, ", ".join(wrong) or "none"))
    return table(header, rows)


SECTIONS = (
    ("Kernels against their definitions", ("kernels",), kernels),
    ("bfloat16 against float32", ("stages",), stages),
    ("Training", ("train", "torch_baseline"), training),
    ("Decoding", ("decode",), decoding),
    ("Rollouts", ("rollout",), rollouts),
    ("Serving", ("serve",), serving),
)


def summary(lines: Sequence[Line]) -> str:
    """Return all tables that there are lines for, below the machine that they were measured on."""
    machines = [line for line in lines if "jaxlib" in line]
    parts = []
    if machines:
        first = machines[0]
        driver = "" if first["driver"] is None else f", driver {first['driver']}"
        parts.append(
            f"{first['hardware']} ({first['memory_gib']} GiB{driver}), jax {first['jax']}, flax {first['flax']}, "
            f"Python {first['python']}"
        )
    for title, names, write in SECTIONS:
        if chosen := [line for line in lines if line["name"] in names]:
            parts.append(f"### {title}\n\n{write(chosen)}")
    return "\n\n".join(parts)


def main() -> int:
    """Print the tables; returns the exit status."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        print("usage: python -m benchmarks.summary RESULTS.jsonl", file=sys.stderr)
        return 2
    print(summary([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
