"""What became of the rows of a source: read, kept, dropped by reason with row numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

_MAX_NUMBERS = 10  # row numbers written out in a message


def number_list(numbers: list[int]) -> str:
    """``2 rows (3, 7)``, with the first ten numbers at most."""
    shown = ", ".join(map(str, numbers[:_MAX_NUMBERS]))
    more = ", ..." if len(numbers) > _MAX_NUMBERS else ""
    return f"{len(numbers)} row{'' if len(numbers) == 1 else 's'} ({shown}{more})"


@dataclass
class SourceReport:
    """One file or data set.

    dropped: reason -> row numbers, counted from 1 (in JSONL the line, in CSV without the header).
    converted: row numbers in which a number became text.
    unused: columns that were there and are not used.
    """

    name: str
    format: str
    rows_read: int = 0
    kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    converted: list[int] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def drop(self, reason: str, number: int) -> None:
        """Count a row as dropped."""
        self.dropped.setdefault(reason, []).append(number)

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.format}): {self.rows_read} rows read, {self.kept} kept"]
        lines += [f"  dropped, {why}: {number_list(rows)}" for why, rows in self.dropped.items()]
        if self.converted:
            lines.append(f"  numbers taken as text: {number_list(self.converted)}")
        if self.unused:
            lines.append(f"  columns not used: {', '.join(self.unused[:10])}")
        return "\n".join(lines)


@dataclass
class LoadReport:
    """All sources of one load. ``rows_read == kept + sum of dropped`` always.

    train, test: rows of the two halves; kept is their sum.
    duplicates: kept rows whose text (case and spaces aside) stood in an earlier row.
    cut: numbers of kept passages that were split at max_chars, in all sources.
    """

    sources: list[SourceReport] = field(default_factory=list)
    train: int = 0
    test: int = 0
    duplicates: int = 0
    cut: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows_read(self) -> int:
        """Rows found in all sources, readable or not."""
        return sum(source.rows_read for source in self.sources)

    @property
    def kept(self) -> int:
        """Rows in train and test."""
        return sum(source.kept for source in self.sources)

    @property
    def dropped(self) -> dict[str, list[int]]:
        """Reason -> row numbers; with several sources each reason starts with the source's name."""
        if len(self.sources) == 1:
            return dict(self.sources[0].dropped)
        return {
            f"{source.name}: {reason}": numbers
            for source in self.sources
            for reason, numbers in source.dropped.items()
        }

    def __str__(self) -> str:
        lines = [str(source) for source in self.sources]
        lines.append(
            f"{self.kept} of {self.rows_read} rows kept: {self.train} train, {self.test} test"
        )
        if self.duplicates:
            lines.append(
                f"  repeats of an earlier row, kept and on the same side: {self.duplicates}"
            )
        if self.cut:
            lines.append(f"  split at max_chars: {number_list(self.cut)}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
