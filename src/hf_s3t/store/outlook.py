"""What a store still gives: which prefixes got shorter, what a repair costs, how near the end of a shard is.

A row is *dark* while its slice is in no served prefix: nothing that answers has seen it. A deletion makes the other
rows of its slices dark until a repair.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import StateError
from ..plan.life import first_slice_chances, life_until_first_dead
from .database import Place
from .folder import StoreFolder
from .manifest import Manifest
from .receipts import Receipt

logger = logging.getLogger(__name__)

Served = Mapping[int, Sequence[int]]
"""The served prefix of each live shard."""


class Outlook(NamedTuple):
    """What a repair costs, in slice passes per epoch, and how many more requests end a shard, if nothing is repaired.

    `requests_left` is 0 where a shard is dead, and `None` where none ever dies, as the prior rules it out.
    """

    repair_stages: int
    repair_slice_passes: float
    requests_left: float | None


def outlook_of(manifest: Manifest) -> Outlook:
    """The outlook of a manifest: some milliseconds for thousands of stages, so nothing that serves waits for it."""
    missing = manifest.plan.missing(manifest.stages)
    priors = [None, *([] if manifest.deletion_prior is None else [manifest.deletion_prior])]
    chances = [first_slice_chances(manifest.plan, prior, manifest.stages) for prior in priors]
    left = min(life_until_first_dead(shards).mean for shards in chances)
    passes = round(sum(stage.passes(manifest.replay) for stage in missing), 2)
    return Outlook(len(missing), passes, left if math.isfinite(left) else None)


def tell_of_deletion(folder: StoreFolder, receipt: Receipt) -> None:
    """One warning where a deletion made a served prefix shorter."""
    told = receipt.served_before, receipt.served_after
    before, after = ({int(shard): prefix for shard, prefix in served.items()} for served in told)
    if receipt.repair_stages is not None and receipt.repair_slice_passes is not None:
        outlook = Outlook(receipt.repair_stages, receipt.repair_slice_passes, receipt.requests_left)
        warn(less_served(folder.path, before, after, receipt.dark_examples, outlook))


def tell_of_change(folder: StoreFolder, manifest: Manifest, before: Served, after: Served) -> None:
    """One warning where a served prefix got shorter for whatever reason; counts rows where the state is here."""
    if shorter(before, after):
        warn(less_served(folder.path, before, after, dark_rows(folder, before, after), outlook_of(manifest)))


def warn(line: str | None) -> None:
    """Logs a line, if there is one."""
    if line is not None:
        logger.warning("%s", line)


def shorter(before: Served, after: Served) -> list[int]:
    """Shards that answer with a shorter prefix than before, or not at all."""
    return [shard for shard in sorted(before) if len(after.get(shard, ())) < len(before[shard])]


def lost_places(before: Served, after: Served) -> set[Place]:
    """The `(shard, slice)`s that were in a served prefix and are in none any more."""
    return {(shard, at) for shard, prefix in before.items() for at in prefix if at not in after.get(shard, ())}


def dark_rows(folder: StoreFolder, before: Served, after: Served) -> int | None:
    """How many rows went dark, by the state; `None` where the state is not here, or not readable."""
    try:
        if not (folder.reads_state and folder.has_state):
            return None
        with folder.reading() as state:
            counts = state.counts()
    except (StateError, OSError):  # of somebody else
        return None
    return sum(counts[place] for place in lost_places(before, after))


def less_served(path: Any, before: Served, after: Served, dark: int | None, outlook: Outlook) -> str | None:
    """What to say where a served prefix got shorter or a shard died; `None` where neither is so."""
    shards = shorter(before, after)
    if not shards:
        return None
    changes = [f"shard {shard}: {shown(before[shard])} -> {shown(after.get(shard))}" for shard in shards]
    dead = "" if after else " No shard is live: the bare base model answers."
    rows = "Without the state it is not known how many rows are dark until then"
    if dark is not None:
        rows = f"{dark:,} rows that nobody asked to delete are dark until then: no part that answers has seen them"
    return (
        f"{path} answers with less until it is repaired. Slices that answer: {'; '.join(changes)}.{dead} {rows}. "
        f"{repair_line(outlook)} {cliff_line(outlook)}"
    )


def repair_line(outlook: Outlook) -> str:
    """What a repair costs, in a sentence."""
    stages = f"{outlook.repair_stages} stage{'' if outlook.repair_stages == 1 else 's'}"
    return f"The repair, `train()`, costs {outlook.repair_slice_passes:g} slice passes per epoch ({stages})."


def cliff_line(outlook: Outlook) -> str:
    """How many more requests the store takes, in a sentence."""
    if outlook.requests_left == 0:
        return "A shard is dead."
    left = "Any number of" if outlook.requests_left is None else f"About {outlook.requests_left:.1f}"
    return f"{left} more requests until a shard is dead, if nothing is repaired."


def shown(prefix: Sequence[int] | None) -> str:
    """A prefix as its stage is named; of a dead shard, that there is none."""
    return "-".join(map(str, prefix)) if prefix else "none (dead)"
