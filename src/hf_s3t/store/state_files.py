"""The private part of a store as files: who was trained on, what was deleted, what a deletion has begun.

```
.s3t/  partition.key  index.json  state.json  receipts.jsonl  exports.json  purge-*.json  intents/     kept
       running/  scratch/  activations/  write.lock  train.lock                                        scratch
```

Files that their owner alone may read, in folders that the owner alone may enter. Whoever may not look into them is
told so: not to see the deletions that were begun is not that there are none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import StateError, StoreError
from ..files import PRIVATE, denied, json_bytes, loose, private_folder, read_json, tighten, write_atomic
from .deletion_records import read_intent
from .partition import Entry, Index
from .state import State

INTENTS = "intents"
PRIVATE_NAMES = (
    "*.json", "*.jsonl", "*.key", "*.lock", "*.holder", "*.tmp", INTENTS, f"{INTENTS}/*", "activations",
    "activations/*", "running", "scratch",
)  # fmt: skip
"""What its owner alone may use. Below `running` another library writes; what is in `scratch` is to be published."""
STATE_VARIABLE = "HF_S3T_STATE"


class StateFiles:
    """Files of one state."""

    private: Path  # its folder
    path: Path  # the store that it belongs to, for messages
    knows_state: bool  # whether somebody said where the state is

    def private_folder(self, name: str = "") -> Path:
        """A folder of the state, made if it is not there; its owner alone may enter it."""
        for folder in (self.private, self.private / name):
            private_folder(folder)
        return self.private / name

    def write_private(self, name: str, data: bytes) -> None:
        """Replaces a file of the state, durably; its owner alone may read it."""
        self.private_folder(os.path.dirname(name))
        write_atomic(self.private / name, data, PRIVATE)

    def loose(self) -> list[Path]:
        """What of the state others than its owner may use."""
        return loose(self.private, PRIVATE_NAMES)

    def tighten(self) -> None:
        """Makes the state its owner's alone, which earlier versions did not."""
        for path in self.loose():
            tighten(path)

    def _private_file(self, name: str) -> Path | None:
        """A file of the state, if it is there. A [`StateError`] if the state is another user's."""
        try:
            os.stat(self.private / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            raise denied(self.private) from None
        return self.private / name

    def state(self) -> State:
        """Generation, tombstones and training records."""
        path = self._private_file("state.json")
        if path is None:
            raise StateError(f"{self.path} has no state (state.json). To find anybody, {self._way_out}")
        return State.from_json(read_json(path))

    @property
    def _way_out(self) -> str:
        lost = "With the state lost, `delete(slices=...)` still works."
        if self.knows_state:
            return f"restore {self.private} from its backup (`hf-s3t state import`). {lost}"
        return f"name the folder of the state: `state=`, `--state` or {STATE_VARIABLE}. {lost}"

    def write_state(self, state: State) -> None:
        """Replaces the state, durably."""
        self.write_private("state.json", json_bytes(state.to_json()))

    def index(self) -> Index:
        """Keyed digests of the examples that were handed in and not deleted."""
        path = self._private_file("index.json")
        if path is None:
            raise StateError(f"{self.path} has no index (index.json). To find anybody, {self._way_out}")
        data = read_json(path)
        return {digest: Entry(*entry) for digest, entry in data.items()}

    @property
    def has_index(self) -> bool:
        """Whether there is an index."""
        return self._private_file("index.json") is not None

    def write_index(self, index: Index) -> None:
        """Replaces the index, durably."""
        self.write_private("index.json", json_bytes({digest: list(entry) for digest, entry in index.items()}))

    def intents(self) -> list[dict[str, Any]]:
        """Deletions that were begun and not finished, oldest first; their places as a set of `(shard, slice)`."""
        found = []
        for path in (self.private / INTENTS / name for name in self._names_of_intents() if name.endswith(".json")):
            try:
                intent = read_json(path)
            except StoreError:
                if path.exists():  # otherwise it was finished between the listing and the reading
                    raise
                continue
            found.append(read_intent(intent, path))
        return found

    def _names_of_intents(self) -> list[str]:
        try:
            return sorted(os.listdir(self.private / INTENTS))
        except FileNotFoundError:
            return []
        except PermissionError:  # not to see them is not that there are none
            raise denied(self.private) from None
