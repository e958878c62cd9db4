"""What the demo leaves behind: `report.md` and one picture of how the model learnt.

Records of the steps and two evaluations go in; the two files come out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm_jax.metrics import COLOURS, read_metrics


@dataclass(frozen=True)
class StepRecord:
    """One finished step of the chain: its title, command, seconds, and the run folder that it made."""

    title: str
    command: str
    seconds: float
    folder: Path | None


@dataclass(frozen=True)
class Preferences:
    """What learning from pairs did: on how many held-out ones, how often the right answer wins, and by what margin."""

    pairs: int
    accuracy: float
    margin: float


def write_report(
    folder: Path,
    steps: Sequence[StepRecord],
    accuracies: Mapping[str, dict[str, Any]],
    answers: Sequence[tuple[str, str]],
    preferences: Preferences,
    skill: tuple[dict[str, Any], dict[str, Any]],
) -> Path:
    """Write `report.md` and `report.png` into `folder`; returns the path of the report.

    `accuracies` are evaluations on the same held-out questions, by the stage that they follow, in order.
    """
    _draw(folder, accuracies)
    last = list(accuracies.values())[-1]
    lines = [
        "# From raw text to a chat model",
        "",
        f"Exact match on {last['rows']:,} held-out questions: "
        + ", ".join(f"{name} **{found['accuracy']:.1%}**" for name, found in accuracies.items())
        + ".",
        "",
        f"Preferences: on {preferences.pairs:,} held-out pairs the right answer gained more on the SFT model than the "
        f"wrong one in **{preferences.accuracy:.1%}**, by {preferences.margin:.2f} on average.",
        "",
        f"Adapter: a kind of question that SFT never asked, {skill[1]['rows']:,} held-out ones: "
        f"**{skill[0]['accuracy']:.1%}** before, **{skill[1]['accuracy']:.1%}** with the adapter; the model beneath is "
        "unchanged.",
        "",
        "![loss and accuracy](report.png)",
        "",
        "| Step | Seconds | Steps | Final loss | Held-out loss | Tokens/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [_step_row(step) for step in steps]
    lines += ["", f"All steps: {sum(s.seconds for s in steps):.0f} seconds.", "", "## By kind of question", ""]
    lines += [f"| Kind | {' | '.join(accuracies)} |", "|---|" + "---:|" * len(accuracies)]
    lines += [
        f"| {family} | "
        + " | ".join(f"{found['accuracy_by_family'][family]:.1%}" for found in accuracies.values())
        + " |"
        for family in last["accuracy_by_family"]
    ]
    lines += ["", "## A few answers", "", "```"]
    for question, answer in answers:
        lines += [f"you    {question}", f"model  {answer}"]
    lines += ["```", "", "## Commands", "", "```", *(step.command for step in steps if step.command), "```", ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _last(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def _step_row(step: StepRecord) -> str:
    rows = read_metrics(step.folder) if step.folder is not None and (step.folder / "metrics.jsonl").exists() else []
    cells = [
        f"{_last(rows, 'step'):,}" if rows else "",
        *("" if (value := _last(rows, name)) is None else f"{value:.3f}" for name in ("loss", "valid_loss")),
        "" if (rate := _last(rows, "tokens_per_second")) is None else f"{rate:,.0f}",
    ]
    return f"| {step.title} | {step.seconds:.0f} | {' | '.join(cells)} |"


def _draw(folder: Path, accuracies: Mapping[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (loss_axes, bar_axes) = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained")
    start = 0
    for run, colour in (("pretrain", "#0072B2"), ("sft", "#D55E00")):
        rows = read_metrics(folder / run)
        for name, style in (("loss", "-"), ("valid_loss", "o")):
            points = [(start + row["step"], row[name]) for row in rows if row.get(name) is not None]
            label = f"{run}{' (held out)' if name == 'valid_loss' else ''}"
            loss_axes.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1, markersize=4)
        start += rows[-1]["step"]
    loss_axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title="Learning")
    loss_axes.legend(frameon=False)
    families = list(list(accuracies.values())[-1]["accuracy_by_family"])
    height = 0.85 / len(accuracies)
    for i, ((name, found), colour) in enumerate(zip(accuracies.items(), itertools.cycle(COLOURS), strict=False)):
        places = [family + 0.4 - height * (i + 0.5) for family in range(len(families))]
        bar_axes.barh(places, [found["accuracy_by_family"][f] for f in families], height, color=colour, label=name)
    bar_axes.set_yticks(range(len(families)), families)
    bar_axes.set(xlim=(0, 1), xlabel="exact match", title="Held-out questions")
    figure.legend(*bar_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    for axes in (loss_axes, bar_axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "report.png", dpi=110)
    plt.close(figure)
