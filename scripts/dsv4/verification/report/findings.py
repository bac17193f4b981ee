"""Collect the faults that verify finds, and the checks that it made.

`Findings` keeps the count and the first places of each fault, so that 33,024 wrong tensors are one
finding and not 33,024 lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dsv4.text import escape_line
from dsv4.verification.report.finding_types import (
    CONVERT,
    ERROR,
    EXPERTS,
    FAULTS,
    MAKER,
    REQUANTIZE,
    FindingType,
)

TEXT_LENGTH = 300  # characters of a place, of what was found there, and of what was expected
PLACES = 5  # places that a finding keeps; further ones are only counted


@dataclass
class Finding:
    """One fault: its name, how often it was found, and its first places.

    ours, storage: as in `Findings`.
    """

    name: str
    count: int = 0
    places: list[dict[str, str]] = field(default_factory=list)
    ours: bool = False
    storage: bool = True

    @property
    def fault(self) -> FindingType:
        """Its entry in the catalogue."""
        return FAULTS[self.name]

    @property
    def repair(self) -> str:
        """The command that repairs it; for bundles of other makers, some are not offered."""
        not_offered = {CONVERT} if self.storage else {CONVERT, REQUANTIZE, EXPERTS}
        return self.fault.repair if self.ours or self.fault.repair not in not_offered else MAKER

    def as_json(self) -> dict[str, Any]:
        """The finding as verify.json holds it."""
        fault = self.fault
        return {
            "name": self.name,
            "severity": fault.severity,
            "count": self.count,
            "why": fault.why,
            "repair": self.repair,
            "places": self.places,
        }


class Findings:
    """Findings by name, in the order in which they were first reported.

    ours: whether this recipe made the bundle, so that it can be made again; storage: whether it has
    storage names, which requantize needs.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Finding] = {}
        self.ours, self.storage = False, True

    def add(self, name: str, where: str, found: str, expected: str, times: int = 1) -> None:
        """Report one fault. Raises KeyError for a name that the catalogue lacks: a bug."""
        if name not in FAULTS:
            raise KeyError(name)
        finding = self._by_name.setdefault(name, Finding(name))
        finding.count += times
        if len(finding.places) < PLACES:
            place = {"where": where, "found": found, "expected": expected}
            finding.places.append({k: escape_line(v, TEXT_LENGTH) for k, v in place.items()})

    def __iter__(self) -> Iterator[Finding]:
        for finding in self._by_name.values():
            finding.ours, finding.storage = self.ours, self.storage
            yield finding

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def names(self) -> set[str]:
        """The names of all faults found."""
        return set(self._by_name)

    def text(self, most: int = PLACES) -> str:
        """Return every finding as lines of text: name, why it matters, `most` places, repair."""
        lines = []
        for finding in self:
            fault = finding.fault
            lines.append(f"\n{fault.severity}: {finding.name} ({finding.count:,}×): {fault.why}")
            for place in finding.places[:most]:
                difference = f"found {place['found']}, expected {place['expected']}"
                lines.append(f"    {place['where']}: {difference}")
            if finding.count > most:
                lines.append(f"    … and {finding.count - most:,} more")
            lines.append(f"  repair: {finding.repair}")
        return "\n".join(lines)

    @property
    def errors(self) -> list[Finding]:
        """The findings that make verify fail."""
        return [finding for finding in self if finding.fault.severity == ERROR]


@dataclass
class Check:
    """One check: what it checked, the number of items, a note and the worst value.

    optional: the number may be 0, as that of MTP layers, which not every model has.
    """

    what: str
    number: int
    note: str = ""
    worst: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        self.what, self.worst = escape_line(self.what), escape_line(self.worst, TEXT_LENGTH)
        self.note = escape_line(self.note, 2 * TEXT_LENGTH)

    def text(self) -> str:
        """Return the check as text: one line, and one for each part of the note."""
        notes = [part for part in (*self.note.split("; "), self.worst) if part]
        first = f"{self.number:>15,} {self.what}"
        if len(notes) == 1 and len(first) + len(notes[0]) < 98:
            return f"{first}; {notes[0]}"
        return "\n".join([first, *(f"{'':16}  {note}" for note in notes)])
