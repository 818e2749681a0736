"""The store as a folder, or as a repository: which file holds what, in which order, and what of it may be served.

```
out/  README.md  s3t.json  adapter_config.json  adapter_model.safetensors      the card, the manifest, the root adapter
      shard-00/2-0-3/adapter_config.json, adapter_model.safetensors            stage (0, (2, 0, 3))
      .s3t/  partition.key  state.sqlite  intents/                             the state, never published
             running/  scratch/  write.lock  train.lock                        scratch
```

Readers take no lock: every file is replaced in one step and the manifest is written last. What an open intent covers
is served no more, whether or not its files are still there. In a repository on the Hub the published files are those
of one revision, and what is written waits until `publish` commits all of it at once. The state stays on this machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import StateError, StoreError, StoreLockedError
from ..files import (
    Lock,
    check_plain,
    denied,
    inside,
    install_folder,
    json_bytes,
    parse_json,
    parse_safetensors,
    read_json,
    read_limited,
    remove,
    sync_folder,
    write_durable,
)
from ..lora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, average, join
from ..plan.tree import Order, Stage
from .card import render_card
from .ids import encoded
from .manifest import DAMAGED, Log, Manifest, places_beyond
from .schema import DATABASE
from .sources import MANIFEST, FolderSource, RepoSource, default_state, is_repo_id
from .stage_contents import read_header, stage_findings
from .state import key_check_value
from .state_files import KEY_FILE, STATE_VARIABLE, StateFiles

logger = logging.getLogger(__name__)

KEY_VARIABLE = "HF_S3T_KEY"
MAX_MANIFEST_BYTES = 64 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHTS_BYTES = 16 << 30
LOCK_SECONDS = 120.0
"""How long a writer waits for another one: no longer than a checkpoint takes to write."""


def as_key(key: str | bytes) -> bytes:
    """A partition key as bytes, 16 at least: hexadecimal text is decoded, other text taken as it is."""
    if isinstance(key, str):
        text = key
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = encoded(text, "The partition key")
    if len(key) < 16:
        raise ValueError(f"The partition key has {len(key)} bytes; it needs 16 or more, or ids could be guessed.")
    return key


def stage_files(stage: Stage, adapter: Adapter) -> dict[str, bytes]:
    """What a stage's folder holds, by name: of the same tensors always the same bytes."""
    return adapter.files({"stage": stage.name, "parents": [above.name for above in stage.path[:-1]]})


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    """sha256 by name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


class StoreFolder(StateFiles):
    """Files of one store, whose folder need not exist yet. [`S3TStore`] says what the arguments mean."""

    reads_state = True
    """Whether whatever reads this store may open its private state: an endpoint may not."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        key: str | bytes | None = None,
        state: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | None = None,
    ):
        self.path = Path(path)
        self.source: FolderSource | RepoSource = FolderSource(self.path)
        self.private = Path(state) if state else self.path / ".s3t"
        self.knows_state = True
        if is_repo_id(path):
            from ..hub.repo import HubRepo  # a folder needs no client

            self.source = RepoSource(HubRepo(str(path), token=token), revision)
            state = state or os.environ.get(STATE_VARIABLE)
            self.private, self.knows_state = Path(state) if state else default_state(str(path)), bool(state)
        self._given_key = as_key(key) if key is not None else None
        self._hashed: dict[str, tuple[Any, str]] = {}
        self.write_lock = Lock(self.private / "write.lock", "writing")
        self.train_lock = Lock(self.private / "train.lock", "training")

    # ---- the manifest and what may be served ----

    @property
    def exists(self) -> bool:
        """Whether a training has started here."""
        return self.source.has(MANIFEST)

    def manifest(self) -> Manifest:
        """The manifest: of a folder as it is on disk now, of a repository as it is in the commit that is read."""
        if not self.exists:
            raise StoreError(f"{self.path} holds no store: there is no {MANIFEST}. Give the output_dir of a training.")
        return Manifest.from_json(read_json(self.source.file(MANIFEST, MAX_MANIFEST_BYTES), MAX_MANIFEST_BYTES))

    def write_manifest(self, manifest: Manifest) -> None:
        """Replaces the manifest, durably. A [`StoreError`] if nobody could read it again; then nothing is written."""
        data = json_bytes(manifest.to_json())
        Manifest.from_json(json.loads(data))
        self.source.put(MANIFEST, data)

    def live(self, manifest: Manifest | None = None, intents: list[dict[str, Any]] | None = None) -> Manifest:
        """The manifest less every stage that an open intent covers: the stages that may be served.

        Its generation counts those intents: what serves it is as new as the deletions that it obeys. Where `intents`
        are given, others that cannot be read are not an error: nothing is to be served by it. Beside a newer state a
        folder's manifest is an older copy, and loses what the state knows to be deleted.
        """
        intents = self.intents() if intents is None else intents
        if manifest is None:
            manifest = self.manifest()  # after the intents: one that ended in between is in the manifest
            manifest = manifest.untouched_by(places_beyond(self._newer_log(manifest), manifest.log))
        intents = [intent for intent in intents if intent["receipt"]["receipt"] not in manifest.log]
        hit = {place for intent in intents for place in intent["places"]}
        manifest = manifest.untouched_by(hit)
        return replace(manifest, generation=max([manifest.generation, *(intent["generation"] for intent in intents)]))

    def _newer_log(self, manifest: Manifest) -> Log:
        """The log of the state beside a folder, if it is there and this store's."""
        if not (self.reads_state and isinstance(self.source, FolderSource)) or self._private_file(DATABASE) is None:
            return {}
        try:
            with self.reading(lost=True) as state:
                return state.log() if state.store == manifest.key_check else {}
        except (OSError, StateError, StoreLockedError) as error:  # the manifest names what it has obeyed itself
            logger.warning("whether the state knows of newer deletions is not known: %s", error)
            return {}

    def served(self, manifest: Manifest | None = None) -> dict[int, Order]:
        """The served prefix of each live shard."""
        manifest = self.live(manifest)
        return manifest.plan.served(manifest.stages)

    def marks(self) -> tuple[Any, ...]:
        """Changes whenever a deletion begins or ends: of a folder cheap enough to look at before every step."""
        names = self._names_of_intents()
        return (*self.source.marks(), *names)

    # ---- adapters ----

    def read_stage(self, stage: Stage, manifest: Manifest | None = None) -> Adapter:
        """A live stage's own adapter, after its files were compared with the manifest."""
        return self.read_live_stage(stage, self.live(manifest))

    def read_live_stage(self, stage: Stage, manifest: Manifest) -> Adapter:
        """As [`read_stage`], of what [`live`] gave."""
        if stage not in manifest.stages:
            raise StoreError(f"Stage {stage.name} is not in the store: never trained, or removed by a deletion.")
        adapter = self._read_adapter(stage.name, manifest.stages[stage])
        if isinstance(self.source, RepoSource):
            self._check_contents(stage, manifest, adapter)
        return adapter

    def _check_contents(self, stage: Stage, manifest: Manifest, adapter: Adapter) -> None:
        """Hashes tell damage only: whoever may write to a repository makes the manifest agree."""
        try:
            header = read_header(self.source.file(f"{stage.name}/{WEIGHTS_FILE}"))
            findings = list(stage_findings(stage, manifest.recipe["config"], adapter.config, header))
        except DAMAGED as error:
            findings = [f"{stage.name} is not of the form that hf_s3t writes: {type(error).__name__} {error}"]
        if findings:
            raise StoreError(f"{self.path} holds what no training wrote. It is not used. {'; '.join(findings[:3])}.")

    def _read_adapter(self, relative: str, expected: Mapping[str, str]) -> Adapter:
        """Each file is read once: what was compared is what is used."""
        read = {name: self._read_trained(f"{relative}/{name}", digest) for name, digest in expected.items()}
        return Adapter(parse_json(*read[CONFIG_FILE]), parse_safetensors(*read[WEIGHTS_FILE]))

    def _read_trained(self, relative: str, digest: str) -> tuple[bytes, Path]:
        limit = MAX_CONFIG_BYTES if relative.endswith(CONFIG_FILE) else MAX_WEIGHTS_BYTES
        path = self.source.file(relative, limit)
        try:
            data = read_limited(path, limit)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing, but the manifest lists it. Restore it from a backup.") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}.") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"{path} is not the file that was trained: its sha256 differs from the manifest's.")
        return data, path

    def assemble(self, shard: int, prefix: Order, manifest: Manifest | None = None) -> Adapter:
        """Any live prefix as one ordinary LoRA adapter."""
        return self._assembled(shard, prefix, self.live(manifest))

    def _assembled(self, shard: int, prefix: Order, manifest: Manifest) -> Adapter:
        stages = [self.read_live_stage(stage, manifest) for stage in Stage(shard, tuple(prefix)).path]
        return join(stages, manifest.recipe["config"].get("stage_parameters"))

    def write_stage(self, stage: Stage, adapter: Adapter) -> dict[str, str]:
        """Writes a stage's folder in one step; returns the sha256 of its files. The manifest is the caller's."""
        files = stage_files(stage, adapter)
        scratch = self.private_folder("scratch") / stage.name.replace("/", "_")
        remove(scratch)
        scratch.mkdir()
        for name, data in files.items():
            write_durable(scratch / name, data)
        sync_folder(scratch)
        install_folder(scratch, inside(self.path, stage.name))
        return digests(files)

    def assemble_root(self, manifest: Manifest) -> Adapter | None:
        """The root adapter of a manifest's served prefixes, if they have one."""
        live = self.live(manifest)  # once for all shards
        return average([self._assembled(end.shard, end.prefix, live) for end in manifest.served_ends])

    def root_files(self, manifest: Manifest) -> dict[str, bytes]:
        """The files of the root adapter, by name; none if there is none."""
        root = self.assemble_root(manifest)
        return root.files({"root": [end.name for end in manifest.served_ends]}) if root else {}

    def has_root_of(self, manifest: Manifest) -> bool:
        """Whether the root adapter in the folder is the one that a manifest names. Each file is hashed once.

        One that a deletion had to leave out, as a stage or another deletion could not be read, is missed.
        """
        heads = manifest.recipe["config"].get("modules_to_save")
        if manifest.root is None and manifest.log and manifest.served_ends:
            return bool(heads) and len(manifest.served_ends) > 1
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            path = self.path / name
            try:
                check_plain(path)
                found = path.stat()
            except (FileNotFoundError, StoreError):
                digest = None
            else:
                mark = (found.st_ino, found.st_mtime_ns, found.st_size)
                if self._hashed.get(name, (None, ""))[0] != mark:
                    self._hashed[name] = (mark, hashlib.sha256(path.read_bytes()).hexdigest())
                digest = self._hashed[name][1]
            if digest != (manifest.root or {}).get(name):
                return False
        return True

    def write_root(self, manifest: Manifest) -> Manifest:
        """Replaces the root adapter and the card by those of the manifest's served prefixes.

        Weights go first: under an older config, layers that they lack start at zero, which is their absence.
        """
        files = self.root_files(manifest)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            if files:
                self.source.put(name, files[name])
            else:
                self.source.drop(name)
        manifest = replace(manifest, root=digests(files) or None)
        self.source.put("README.md", render_card(manifest).encode())
        return manifest

    # ---- the key ----

    @property
    def key(self) -> bytes:
        """The partition key. A [`StateError`] unless it is the one that this store was trained with."""
        key = self.given_key
        if key is None:
            path = self.key_file
            if path is None:
                raise StateError(
                    f"{self.path} has no partition key. Give `key=`, set {KEY_VARIABLE}, or {self._way_out}"
                )
            key = as_key(self.key_text(path))
        if self.exists and key_check_value(key) != self.manifest().key_check:
            raise StateError(
                f"The partition key is not the one that {self.path} was trained with: ids would be looked for in the "
                "wrong slices. Restore the right key from the backup of .s3t/."
            )
        return key

    def key_text(self, path: Path) -> str:
        """What the file of a partition key holds."""
        try:
            check_plain(path)
            return path.read_bytes().decode().strip()
        except PermissionError:
            raise denied(path) from None
        except UnicodeDecodeError:
            raise StateError(f"{path} holds no text, so no key. Restore it from the backup of .s3t/.") from None

    @property
    def has_key(self) -> bool:
        """Whether a partition key is at hand, the right one or not."""
        return bool(self.given_key or self.key_file)

    @property
    def given_key(self) -> bytes | None:
        """The partition key that was handed in, or is in the environment."""
        return self._given_key or self._environment_key()

    def _environment_key(self) -> bytes | None:
        value = os.environ.get(KEY_VARIABLE)
        return as_key(value) if value else None

    def ensure_key(self) -> bytes:
        """The partition key; made where there is no store yet. One from the environment is never written."""
        if self.exists:
            return self.key
        key = self.given_key
        if key is None and self.key_file is None:
            key = secrets.token_bytes(32)
        if key is not None and key != self._environment_key():
            self.write_private(KEY_FILE, key.hex().encode() + b"\n")
        return self.key
