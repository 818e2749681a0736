"""What a state took over from elsewhere: each such event gets a small receipt in this state's chain.

So every event that a state knows has a receipt here, and one that is removed is missed, the newest one too. Where two
states are joined, such a receipt joins their chains.
"""

from __future__ import annotations

from dataclasses import replace

from ..files import utc_now
from .database import StateDatabase
from .folder import StoreFolder
from .manifest import Log
from .receipts import Receipt, finished, linked, read_receipts, receipt_name, versions


def account_for(folder: StoreFolder, state: StateDatabase, known: Log, log: Log) -> None:
    """Adds a receipt for the events of a state that were not `known`, with the digests that another `log` has of them.

    Within the transaction that takes them over. Those of deletions that were begun here get their own. Of a version
    before receipts were chained it accounts for all that have none; one that the log names is not made up for.
    """
    ours, first = state.log(), not state.newest_links()
    told = {name: list(log[name].receipts if name in log else ()) for name in ours}
    begun = {intent["receipt"]["receipt"] for intent in folder.readable_intents()}
    new = [name for name in ours if name not in begun and (name not in known or (first and not told[name]))]
    new = [name for name in new if state.receipt_digest(name) is None]
    if new:
        add_obeyed(folder, state, {name: told[name] for name in new}, [])


def join_chains(folder: StoreFolder, state: StateDatabase) -> None:
    """Adds a receipt that joins all chains that end in a state, where there are several: two states were joined."""
    ends = [digest for _, digest in chain_ends(state)]
    if len(ends) > 1:
        add_obeyed(folder, state, {}, ends)


def add_obeyed(folder: StoreFolder, state: StateDatabase, obeys: dict[str, list[str]], ends: list[str]) -> None:
    """Adds such a receipt; it follows all of some `ends` of chains, or the newest one."""
    receipt = Receipt(
        receipt_name(), "obeyed", "obeyed", utc_now(), state.generation, obeys=obeys, versions=versions(), limits=(),
        inactive_since=utc_now(), joins=ends,
    )  # fmt: skip
    receipt = finished(folder, linked(folder, receipt, state))
    state.add_receipt(receipt.receipt, receipt.to_json())


def chain_ends(state: StateDatabase) -> list[tuple[int, str]]:
    """Number and digest of every receipt that no other one follows, the newest first."""
    links = state.links()
    followed = {digest for _, _, before in links for digest in before}
    return sorted(((number, digest) for number, digest, _ in links if digest not in followed), reverse=True)


def with_receipts(log: Log, state: StateDatabase) -> Log:
    """A log in which events that name no receipt name the one that the state has, or was told of."""
    if all(event.receipts for event in log.values()):
        return log
    told = {name: digests for obeys in state.obeyed() for name, digests in obeys.items()}
    found = dict(log)
    for name, event in log.items():
        if not event.receipts:
            own = state.receipt_digest(name)
            found[name] = replace(event, receipts=(own,) if own else tuple(told.get(name, ())))
    return found


def obeyed_events(folder: StoreFolder) -> dict[str, list[str]]:
    """Every event that a receipt here accounts for without being its own, with the digests that it had elsewhere."""
    found: dict[str, list[str]] = {}
    for receipt in read_receipts(folder):
        found |= receipt["obeys"]
        found |= dict.fromkeys(receipt["deleted_by"], []) if receipt["kind"] == "loss" else {}
    return found
