"""What a purge removed, and what was seen of it afterwards: the report, as data, as a page, and where it is kept.

How the Hub is asked is for `probes.py`; what is removed, and how, for `purge.py`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import PRIVATE, json_bytes, read_json, write_atomic
from ..plain_data import read_as

SECONDS = 180.0
"""How long a purge is waited for before what it did not reach counts as pending."""

OUT_OF_REACH = (
    "Clones, downloads and caches of others, duplicates of the repository, and runtimes that loaded an adapter.",
    "What the Hub's storage keeps until its garbage is collected: no time is published for it.",
    "Copies at the edge of the Hub's delivery network, under addresses that were handed out to others.",
    "Pages of closed pull requests, which keep showing the differences of text files.",
)
NOT_PROBED = (
    "Blocks of Xet storage: an answer that a file is gone does not prove that its blocks are.",
    "Commits that no ref led to when the purge began, and that neither this machine's cache nor its receipts name.",
)
PLAIN_FILES = (
    "Plain files are kept by git itself, and a purge of large files leaves them where an old revision is kept. These "
    "hold names of stages, settings and hashes: no weights, no examples and no ids. An old tombstones.json has keyed "
    "digests of deleted ids, which say nothing to whoever lacks the key."
)
PLAIN_WEIGHTS = (
    "Plain weights are kept by git itself: where a kept ref leads to them remove that ref, or from a branch the file, "
    "and purge again."
)
SEEN = ("HTTP 2", "HTTP 3", "downloadable", "listed", "handed out")
"""How the answers begin of probes that see a content."""


@dataclass(frozen=True)
class Probe:
    """One way to a removed content, and what it answered.

    Args:
        oid (`str`): sha256 of the content; of a plain file git's name for it; of the head nothing.
        way (`str`): `"revision"` (a large file at a revision), `"object"` (by its sha256, from the large-file
            storage), `"listing"` (of that storage), `"address"` (one that the Hub handed out before the purge),
            `"plain weights"` (a file that git itself keeps, so that no purge removes it while a ref leads to it),
            `"plain file"` (one at an old revision, without weights), or `"head"` (whether the branch answers with its
            new commit).
        at (`str`): revision and path; size; or address, whose signature is dropped once it is gone.
        before (`str`): what it answered before the purge.
        answer (`str`): what it answered last.
        served (`bool`, *optional*): whether that is still there; `None`: not known.
        seen_at (`str`): UTC time of the last answer.
    """

    oid: str
    way: str
    at: str
    before: str = ""
    answer: str = ""
    served: bool | None = None
    seen_at: str = ""


@dataclass(frozen=True)
class PurgeReport:
    """What a purge removed, what was seen afterwards, and what cannot be seen.

    Args:
        status (`str`): `"no_longer_served"`: every probe of a removed large file said so; `"pending"`: some did not;
            `"begun"`: it was stopped before all was removed, and has to be begun again.
        head (`str`): the commit that is left.
        receipts (`list[str]`): names of the deletions whose stages it is about.
        references (`dict[str, str]`): of those, the references that were given with them.
        removed (`dict[str, list[str]]`): sha256 of each removed large file -> the paths that it had.
        held (`list[str]`): sha256 of those that a kept branch has at its head, and so stay, under whatever name; and
            git's name of plain weights that a kept ref leads to.
        refs_removed, refs_kept (`list[str]`): branches, tags and pull requests.
        probes (`list[Probe]`): every probe with its last answer.
        caches_cleared (`list[str]`): of this machine, named below their cache.
        caches_left (`list[str]`): of this machine, what is there still and was not recognised as the head's.
    """

    repo: str
    status: str
    began_at: str
    ended_at: str
    head: str = ""
    receipts: list[str] = field(default_factory=list)
    removed: dict[str, list[str]] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    refs_removed: list[str] = field(default_factory=list)
    refs_kept: list[str] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    caches_cleared: list[str] = field(default_factory=list)
    not_probed: list[str] = field(default_factory=lambda: list(NOT_PROBED))
    out_of_reach: list[str] = field(default_factory=lambda: list(OUT_OF_REACH))
    references: dict[str, str] = field(default_factory=dict)
    caches_left: list[str] = field(default_factory=list)

    @property
    def pending(self) -> list[Probe]:
        """Probes that found a removed large file, or gave no answer. Not plain files: see `plain_files`."""
        return [probe for probe in self.probes if probe.served is None or (probe.served and probe.way != "plain file")]

    @property
    def plain_files(self) -> list[Probe]:
        """Plain files that can still be read at an old revision."""
        return [probe for probe in self.probes if probe.served and probe.way == "plain file"]

    @property
    def still_served_at(self) -> list[str]:
        """Revisions that serve a removed file, or may serve it: no probe has ruled that out."""
        ways = ("revision", "plain weights")
        return sorted({probe.at.split(":", 1)[0] for probe in self.pending if probe.way in ways})

    @property
    def proving_nothing(self) -> list[Probe]:
        """Probes that do not see what was there, and did not see it before the purge either."""
        known = {oid for oid, paths in self.removed.items() if paths}
        known |= {probe.oid for probe in self.probes if probe.way == "plain weights"}
        return [
            probe for probe in self.probes
            if probe.served is False and probe.oid in known and probe.before and not probe.before.startswith(SEEN)
        ]  # fmt: skip

    def holders(self, oid: str) -> list[str]:
        """Branches and paths that still serve a removed large file."""
        found = [probe.at for probe in self.pending if (probe.oid, probe.way) == (oid, "revision")]
        return [at for at in found if at.startswith("refs/heads/")]

    def to_json(self) -> dict[str, Any]:
        """Plain data. While an address in it may answer, it opens the content to whoever reads it: keep it private."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PurgeReport:
        """Reads a report that [`to_json`] gave."""
        try:
            report = read_as(cls, data)
            datetime.datetime.fromisoformat(report.began_at)
        except ValueError as error:
            raise StoreError(f"This is no purge report: {error!r}. Give the JSON file that a purge wrote.") from None
        return report

    def to_text(self) -> str:
        """A page for a person."""
        begun = self.status == "begun"
        named = [f"{name} ({self.references[name]})" if name in self.references else name for name in self.receipts]
        lines = [
            f"Purge of {self.repo}: {'begun, and stopped before its end' if begun else self.status.replace('_', ' ')}",
            f"from {self.began_at} to {self.ended_at}; head {self.head or 'not known'}",
            *([f"for {', '.join(named)}"] if named else []),
            "",
            f"{len(self.removed)} large files {'to be removed' if begun else 'removed'}:",
            *(
                f"  {oid[:16]}  {', '.join(paths) or 'no name known'}{self._held_line(oid)}"
                for oid, paths in sorted(self.removed.items())
            ),
            "",
            f"refs {'to be removed' if begun else 'removed'}: {', '.join(self.refs_removed) or 'none'}",
            f"refs kept: {', '.join(self.refs_kept) or 'none'}",
            f"cleared on this machine: {', '.join(self.caches_cleared) or 'nothing'}",
            *([f"left on this machine, remove it by hand: {', '.join(self.caches_left)}"] if self.caches_left else []),
            "",
            *self._probe_lines(),
            "",
            "Not probed:",
            *(f"  - {line}" for line in self.not_probed),
            "Out of reach:",
            *(f"  - {line}" for line in self.out_of_reach),
        ]
        return "\n".join(lines) + "\n"

    def _held_line(self, oid: str) -> str:
        holders = self.holders(oid) if oid in self.held else []
        return f"; held by a kept branch: {', '.join(holders)}" if holders else ""

    def _probe_lines(self) -> list[str]:
        lines = [f"{len(self.probes)} probes, {len(self.pending)} of them pending:"]
        for probe in self.pending:
            where = probe.at.split("?")[0] if probe.way == "address" else probe.at
            seen = f"{probe.answer or 'not asked yet'}{f' ({probe.seen_at})' if probe.seen_at else ''}"
            kept = f"{probe.oid[:16]} " if probe.oid else ""
            lines.append(f"  {probe.way} {kept}{where}: {seen}")
        for oid in sorted(self.removed):
            gone = [probe for probe in self.probes if probe.oid == oid and probe.served is False]
            if gone:
                last = max(probe.seen_at for probe in gone)
                ways = ", ".join(sorted({probe.way for probe in gone}))
                lines.append(f"  {oid[:16]}  gone by {len(gone)} probes ({ways}), the last at {last}")
        if any(probe.way == "plain weights" for probe in self.pending):
            lines.append(f"  {PLAIN_WEIGHTS}")
        if self.proving_nothing:
            lines.append(
                f"{len(self.proving_nothing)} probes saw nothing before the purge either, so they prove little now."
            )
        if self.plain_files:
            lines += ["", f"{len(self.plain_files)} plain files can still be read:"]
            lines += [f"  {probe.at}: {probe.answer} ({probe.seen_at})" for probe in self.plain_files]
            lines.append(f"  {PLAIN_FILES}")
        return lines


# ---- kept beside the receipts ----


def keep(report: PurgeReport, folder: Path | None) -> None:
    if folder is not None:
        write_atomic(folder / file_name(report), json_bytes(report.to_json()), PRIVATE)


def file_name(report: PurgeReport) -> str:
    """Of a report, beside the receipts."""
    return f"purge-{report.began_at.replace(':', '')}.json"


def read_reports(repo_id: str, folder: Path | None) -> list[PurgeReport]:
    """The reports on a repository that a folder holds, oldest first."""
    paths = sorted(folder.glob("purge-*.json")) if folder is not None else []
    return [report for report in map(PurgeReport.from_json, map(read_json, paths)) if report.repo == repo_id]


def unfinished(repo_id: str, folder: Path | None) -> PurgeReport | None:
    """The first report on a repository whose purge was stopped, or did not settle."""
    return next((report for report in read_reports(repo_id, folder) if report.status != "no_longer_served"), None)


def covered(repo_id: str, folder: Path | None) -> set[str]:
    """Names of the deletions that finished purges of a repository were for."""
    reports = [report for report in read_reports(repo_id, folder) if report.status == "no_longer_served"]
    return {name for report in reports for name in report.receipts}


def uncovered(repo_id: str, receipts: Iterable[Mapping[str, Any]], folder: Path | None) -> list[Mapping[str, Any]]:
    """The receipts of deletions of what was served, that no finished purge of the repository covers."""
    done = covered(repo_id, folder)
    return [
        receipt for receipt in receipts
        if receipt["kind"] != "readmit" and receipt["receipt"] not in done and receipt["status"] != "unchanged"
        and (receipt["stages_removed"] or (receipt.get("still_served_at") and receipt.get("repository") == repo_id))
    ]  # fmt: skip
