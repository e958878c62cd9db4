"""Show what training will see: rows as tokens with the trained ones coloured, then totals over all rows.

    python -m train.inspect_data --data_path chats.jsonl --tokenizer_path out/tok --rows 3

In a terminal, tokens alternate between two shades, trained ones on green, and control tokens stand out; in a pipe,
trained text stands between ⟦ and ⟧. Bad rows are counted with their reasons instead of ending the program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minillm_jax.chat import ChatError, Rendered, render
from minillm_jax.config import ConfigError, parse_cli
from minillm_jax.data.errors import DataError, SkipReport
from minillm_jax.data.peek import row_kind
from minillm_jax.data.records import PreferenceRecord, PretrainRecord, Record, SftRecord, chat_field_error, read_file
from minillm_jax.data.sources import resolve_sources
from minillm_jax.tokenizer import StreamDecoder, Tokenizer, TokenizerError, encode_document

_PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    data_path: tuple[str, ...]
    """JSONL files or folders of them."""
    tokenizer_path: str
    """Tokenizer folder, or a run folder that holds one."""
    kind: Literal["auto", "pretrain", "sft", "preference"] = "auto"
    """Kind of rows; auto looks at each file's first row."""
    rows: int = 3
    """Rows to show; 0 for the totals alone."""
    max_seq_len: int = 512
    """Length in tokens above which a row counts as too long."""


@dataclass
class Totals:
    """Counts over all rows."""

    rows: int = 0
    tokens: int = 0
    trained: int = 0
    untrained_rows: int = 0
    lengths: list[int] = field(default_factory=list)

    def add(self, sequences: Sequence[Rendered]) -> None:
        """Count the sequences of one row."""
        self.rows += 1
        self.untrained_rows += not any(1 in sequence.mask for sequence in sequences)
        for sequence in sequences:
            self.tokens += len(sequence.token_ids)
            self.trained += sum(sequence.mask)
            self.lengths.append(len(sequence.token_ids))

    def percentiles(self) -> list[int]:
        """Return the sequence lengths below or at which _PERCENTILES of all sequences lie."""
        ordered = sorted(self.lengths)
        return [ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in _PERCENTILES]


def tokenise(tokenizer: Tokenizer, record: Record) -> dict[str, Rendered]:
    """Turn a record into the token sequences that training makes of it, by title.

    Raises:
        ChatError: the chat template cannot render the record.
    """
    if isinstance(record, PretrainRecord):
        ids = encode_document(tokenizer, record.text)
        return {"document": Rendered(ids, [0] + [1] * (len(ids) - 1))}  # nothing predicts the first token
    if isinstance(record, SftRecord):
        return {"conversation": render(tokenizer, record.conversations, tools=record.tools)}
    assert isinstance(record, PreferenceRecord)
    pair = {"chosen": record.chosen, "rejected": record.rejected}
    return {title: render(tokenizer, turns, tools=record.tools, field=title) for title, turns in pair.items()}


def read(
    config: InspectConfig, tokenizer: Tokenizer, report: SkipReport
) -> Iterator[tuple[Record, dict[str, Rendered]]]:
    """Stream every good row with its token sequences; bad rows go to the report."""
    for source in resolve_sources(config.data_path):
        for file in source.files:
            kind = row_kind(file) if config.kind == "auto" else config.kind
            for record, _ in read_file(file, kind, "skip", report):
                try:
                    yield record, tokenise(tokenizer, record)
                except ChatError as error:
                    problem = chat_field_error(error)
                    report.add(problem.reason, f"{record.file}:{record.line}: {problem}")


def show(tokenizer: Tokenizer, sequence: Rendered, coloured: bool) -> Text:
    """Lay out one sequence: shades for tokens and trained text if coloured, else brackets around trained text."""
    shown = Text()
    decoder = StreamDecoder(tokenizer)
    inside, shade = False, 0
    for token_id, trained in zip(sequence.token_ids, sequence.mask, strict=True):
        piece = _visible(decoder.push(token_id))
        if coloured:
            shown.append(piece, style=_style(shade, bool(trained), token_id in tokenizer.control_ids))
            shade ^= bool(piece)  # a token that only begins a character shares the shade of the one that ends it
        else:
            shown.append(("⟦" if trained else "⟧") * (bool(trained) != inside) + piece)
        inside = bool(trained)
    shown.append(_visible(decoder.flush()))
    return shown if coloured or not inside else shown.append("⟧")


def _style(shade: int, trained: bool, control: bool) -> str:
    if control:
        return "bold white on green" if trained else "bold magenta"
    if trained:
        return ("black on green", "black on bright_green")[shade]
    return ("bright_black", "white")[shade]


def _visible(text: str) -> str:
    """Show control characters as symbols, so that no data can drive the terminal."""
    return "".join(char if char >= " " or char in "\n\t" else chr(0x2400 + ord(char)) for char in text)


def totals_table(totals: Totals, max_seq_len: int) -> Table:
    """Lay out the totals."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("rows", f"{totals.rows:,}")
    table.add_row("tokens", f"{totals.tokens:,}")
    share = totals.trained / max(totals.tokens, 1)
    table.add_row("trained tokens", f"{totals.trained:,} ({share:.1%})")
    names = " / ".join("longest" if p == 100 else f"{p} %" for p in _PERCENTILES)
    if totals.lengths:
        table.add_row(f"length, {names}", " / ".join(f"{length:,}" for length in totals.percentiles()))
    longer = sum(length > max_seq_len for length in totals.lengths)
    table.add_row(f"longer than {max_seq_len:,}", f"{longer:,}")
    table.add_row("rows without a trained token", f"{totals.untrained_rows:,}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Show the first rows, then the totals."""
    console = Console()
    totals, report = Totals(), SkipReport()
    try:
        config = parse_cli(InspectConfig, "Show data as training sees it.", argv=argv)
        tokenizer = Tokenizer.load(config.tokenizer_path)
        for record, sequences in read(config, tokenizer, report):
            if totals.rows < config.rows:
                for title, sequence in sequences.items():
                    heading = f"{record.file}:{record.line} {title}, {len(sequence.token_ids)} tokens"
                    console.print(Text(heading, style="bold"), soft_wrap=True)
                    console.print(show(tokenizer, sequence, console.is_terminal), soft_wrap=True)
            totals.add(list(sequences.values()))
    except (ConfigError, DataError, TokenizerError, ChatError) as error:
        sys.exit(f"error: {error}")
    console.print(totals_table(totals, config.max_seq_len))
    console.print("\n".join(report.lines()) or "skipped no rows", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
