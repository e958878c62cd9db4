"""What a run reports about itself: metrics.jsonl, TensorBoard, Weights & Biases, the progress bar, curves.png.

Rows of numbers go in, one per logged step; files in the run folder and lines on the screen come out. metrics.jsonl is
the record that survives kills and full disks: each row is one unbuffered write, undone if it fails, and a resumed run
first cuts off the rows that it is about to compute again.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from minillm_jax.errors import UserError
from minillm_jax.flops import count_params, flops_per_token, peak_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "MetricsError",
    "MetricsLogger",
    "count_params",
    "flops_per_token",
    "peak_flops",
    "plot_curves",
    "read_metrics",
]

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
PLAIN_LINE_SECONDS = 10.0
"""Where there is no terminal, a progress line is printed at most this often."""


class MetricsError(UserError, RuntimeError):
    """Metrics could not be written or read; the message says where and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# The record: metrics.jsonl


def _parse_row(line: bytes) -> dict[str, Any] | None:
    """Read one line; None for a torn one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Read the rows of RUN/metrics.jsonl in file order; torn lines are left out, a missing file has no rows."""
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    return [row for line in path.read_bytes().splitlines() if (row := _parse_row(line)) is not None]


def _rewind(path: Path, start_step: int) -> None:
    """Keep the rows that a run resumed after `start_step` will not write again; replace the file atomically."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = ((line, _parse_row(line)) for line in lines)
    # A run that starts at 0 has done nothing yet: it will write even a row of step 0 again.
    kept = [line for line, row in rows if row is not None and 0 < start_step >= row["step"]]
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(line + b"\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise MetricsError(f"{path}: could not be prepared: {error.strerror or error}; free some space") from error


def _plain_number(value: Any) -> int | float | None:
    """Turn a Python, numpy or jax scalar into what JSON can hold: NaN and infinities become None (null)."""
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


class _JsonLines:
    """Appends rows to one file; a row is there completely or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._size = path.stat().st_size

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; on a full disk take back the part that fitted and raise MetricsError."""
        data = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
            self._size = self._file.tell()
        except OSError as error:
            self._file.truncate(self._size)
            raise MetricsError(
                f"{self._path}: the row of step {row['step']} could not be written: {error.strerror or error}; "
                "free some space and start the same command again to resume"
            ) from error

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """Writes event files from the calling thread.

    tensorboardX's SummaryWriter hands events to a thread through a bounded queue; when a full disk kills that thread,
    training blocks for ever on the queue. Its synchronous EventsWriter raises instead.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        # The file's own name has one-second resolution; the suffix keeps a quick resume from overwriting it.
        suffix = f".{os.getpid()}.{time.time_ns() % 10**9}"
        self._event = Event
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=suffix)
        self._flushed = time.monotonic()
        start = SessionLog(status=SessionLog.START)  # makes TensorBoard forget earlier events from this step on
        self._writer.write_event(Event(step=start_step + 1, wall_time=time.time(), session_log=start))

    def append(self, step: int, values: Mapping[str, int | float | None]) -> None:
        """Write the finite values of one step."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if value is not None:
                event = self._event(step=step, wall_time=time.time(), summary=scalar(name, value))
                self._writer.write_event(event)
        if time.monotonic() - self._flushed > PLAIN_LINE_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def _start_wandb(project: str, run_dir: Path, config: Mapping[str, Any] | None) -> Any:
    """Start, or on resume continue, the Weights & Biases run of this folder."""
    try:
        import wandb
    except ImportError as error:
        raise MetricsError(
            "--wandb_project: the wandb package is not installed; install it with: pip install 'minillm-jax[wandb]'"
        ) from error
    id_file = run_dir / "wandb_id"
    run_id = id_file.read_text().strip() if id_file.exists() else os.urandom(8).hex()
    id_file.write_text(run_id)
    settings = None if config is None else dict(config)
    return wandb.init(project=project, name=run_dir.name, dir=str(run_dir), id=run_id, resume="allow", config=settings)


# ---------------------------------------------------------------------------------------------------------------------
# The screen


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


class _Screen:
    """A progress bar on a terminal, plain lines now and then elsewhere, nothing when told to be quiet."""

    def __init__(self, stage: str, total_steps: int, start_step: int, enabled: bool) -> None:
        self.console = Console()
        self._stage, self._total, self._enabled = stage, total_steps, enabled
        self._latest: dict[str, int | float | None] = {}
        self._first: tuple[float, int] | None = None  # time and step of the first row: compilation ends before it
        self._printed = -math.inf
        self._bar: Progress | None = None
        if enabled and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
            )
            # No refresh thread: the bar moves when a row arrives, and costs nothing in between.
            self._bar = Progress(*columns, console=self.console, auto_refresh=False)
            self._task = self._bar.add_task(stage, total=total_steps, completed=start_step, status="")
            self._bar.start()

    def show(self, step: int, values: Mapping[str, int | float | None]) -> None:
        """Show the newest numbers; a row without some (a validation row) leaves the last ones standing."""
        now = time.monotonic()
        self._first = self._first or (now, step)
        self._latest.update(values)
        status = self._status(step, now)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
            self._bar.refresh()
        elif self._enabled and (now - self._printed >= PLAIN_LINE_SECONDS or step == self._total):
            self.print(f"{self._stage}  step {step}/{self._total}  {status}")
            self._printed = now

    def _status(self, step: int, now: float) -> str:
        get, parts = self._latest.get, []
        if "loss" in self._latest:
            loss = get("loss")
            parts.append("loss not finite" if loss is None else f"loss {loss:.4f}")
        if (valid_loss := get("valid_loss")) is not None:
            parts.append(f"held out {valid_loss:.4f}")
        if (reward := get("reward")) is not None:
            parts.append(f"reward {reward:.3f}")
        if (valid_reward := get("valid_reward")) is not None:
            parts.append(f"held out {valid_reward:.3f}")
        if (rate := get("tokens_per_second")) is not None:
            parts.append(f"{_short(rate)} tokens/s")
        if (mfu := get("mfu")) is not None:
            parts.append(f"MFU {100 * mfu:.1f}%")
        if self._first is not None and step > self._first[1]:
            seconds_per_step = (now - self._first[0]) / (step - self._first[1])
            parts.append(f"{_duration(seconds_per_step * (self._total - step))} left")
        return " · ".join(parts)

    def print(self, text: str) -> None:
        """Print above the bar, taking brackets in `text` literally."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class MetricsLogger:
    """Writes a run's metrics to every place where people look for them. A context manager.

    Args:
        run_dir: run folder; made when missing.
        total_steps: optimizer steps of the whole run, for the progress bar.
        start_step: steps already done. Rows of later steps, left by a run that was killed, are removed from
            metrics.jsonl, so that the file reads as if nothing had happened.
        wandb_project: Weights & Biases project to log to as well.
        config: settings shown beside the run in Weights & Biases.
        show_progress: whether to show a progress bar, or plain lines where there is no terminal.
        stage: name before the bar; None takes the run folder's.

    Raises:
        MetricsError: the folder cannot be written, or wandb is asked for and not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        total_steps: int,
        start_step: int = 0,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
        show_progress: bool = True,
        stage: str | None = None,
    ) -> None:
        folder = Path(run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _rewind(folder / METRICS_FILE, start_step)
            self._rows = _JsonLines(folder / METRICS_FILE)
            self._tensorboard = _TensorBoard(folder / "tensorboard", start_step)
        except OSError as error:
            raise MetricsError(f"{folder}: metrics cannot be written here: {error.strerror or error}") from error
        self._wandb = None if wandb_project is None else _start_wandb(wandb_project, folder, config)
        self._screen = _Screen(stage or folder.resolve().name, total_steps, start_step, show_progress)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record one row.

        Args:
            step: optimizer steps done so far.
            metrics: name → Python, numpy or jax scalar. `loss`, `tokens_per_second` and `mfu` (a share of 1) are
                shown on the screen; a number that is not finite is written as null.

        Raises:
            MetricsError: the disk is full or gone; the rows written before stay whole.
        """
        values = {name: _plain_number(value) for name, value in metrics.items()}
        self._rows.append({"step": int(step), **values})
        try:
            self._tensorboard.append(step, values)
        except OSError as error:
            raise MetricsError(f"TensorBoard events could not be written: {error.strerror or error}") from error
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in values.items() if value is not None}, step=step)
        self._screen.show(step, values)

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._screen.print(text)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.close()
        self._rows.close()
        try:
            self._tensorboard.close()
        except OSError as problem:
            if error is None:  # otherwise the first error is the one to tell
                raise MetricsError(
                    f"TensorBoard events could not be written: {problem.strerror or problem}"
                ) from problem
        finally:
            if self._wandb is not None:
                self._wandb.finish(exit_code=0 if kind is None else 1)


# ---------------------------------------------------------------------------------------------------------------------
# curves.png

FIRST_PANELS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
ZERO_BASED_PANELS = ("learning_rate", "grad_norm", "tokens_per_second", "mfu")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""


def _panels(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Sort the numbers of all rows into panels: panel → curve → (steps, values).

    `valid_X` is drawn into the panel of X; the panels that every stage has come first.
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float | None) and not isinstance(value, bool):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(math.nan if value is None else value)
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {name: {} for name in FIRST_PANELS}
    for name in sorted(curves, key=lambda name: (name.startswith("valid_"), name)):
        if any(math.isfinite(value) for value in curves[name][1]):
            panels.setdefault(name.removeprefix("valid_"), {})[name] = curves[name]
    return {name: panel for name, panel in panels.items() if panel}


def _draw(axes: Axes, title: str, curves: Mapping[str, tuple[list[int], list[float]]]) -> None:
    """Draw one panel; a curve of few points shows them."""
    from matplotlib.ticker import MaxNLocator

    for (name, (steps, values)), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        marker = "o" if len(steps) <= 30 else None
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=4, label=name.replace("_", " "))
    axes.set_title(title.replace("_", " "), loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if len(all_steps := {step for steps, _ in curves.values() for step in steps}) == 1:
        axes.set_xlim(min(all_steps) - 1, min(all_steps) + 1)
    axes.yaxis.set_major_formatter("{x:.4g}")
    if title in ZERO_BASED_PANELS:
        axes.set_ylim(bottom=0)
    if title == "tokens_per_second":
        axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=9)


def plot_curves(run_dir: str | Path) -> Path | None:
    """Draw RUN/metrics.jsonl as RUN/curves.png: loss, learning rate, gradient norm, tokens/s, then every other metric.

    Returns:
        Path of the picture, or None when there is no number to draw.
    """
    panels = _panels(read_metrics(run_dir))
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(
        figsize=(5.2 * columns, 3.0 * lines), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    FigureCanvasAgg(figure)
    for place, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(lines, columns, place)
        _draw(axes, title, curves)
        if place > len(panels) - columns:
            axes.set_xlabel("step")
    path = Path(run_dir) / CURVES_FILE
    figure.savefig(path)
    return path
