"""What tests against a Hub share, for modules that name this one in `pytest_plugins`: one server, and its users."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hub_server import Faults, Server, start
from machines import Machine
from purging import Case


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one server of all tests of a process, so that there is one process that imports, too."""
    with start(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The server with every switch off; afterwards nothing is left in it."""
    yield running
    vars(running.faults).update(vars(Faults()))
    running.hub.odd = None
    for name in list(running.hub.repositories):
        running.hub.delete(name)


@pytest.fixture
def new_machine(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Machine]]:
    """Makes machines, each with a new home unless it is given one, from what [`Machine`] takes."""
    made = []

    def make(home: Path | None = None, **how: Any) -> Machine:
        made.append(Machine(server, home or tmp_path_factory.mktemp("home"), **how))
        return made[-1]

    yield make
    for machine in made:
        machine.stop()


@pytest.fixture
def machine(new_machine: Callable[..., Machine]) -> Machine:
    """A machine of the repositories' owner."""
    return new_machine()


@pytest.fixture
def new_case(server: Server, new_machine: Callable[..., Machine], tmp_path: Path) -> Callable[..., Case]:
    """Makes a repository with a deletion that is not purged yet, with its store in the test's folder."""
    return partial(Case, server, new_machine, tmp_path)
