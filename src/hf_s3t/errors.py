"""Every exception that the library raises on its own account.

```
S3TError
├── IsolationError      a stage touched a tensor that it does not own
├── StoreError          the store cannot be read or written as asked
│   ├── StateError      the private state is absent, foreign or older than the manifest
│   ├── StoreLockedError  another writer or another training run holds the store
│   ├── UnfinishedDeletionError  a deletion was begun, is obeyed, and is not finished
│   ├── HubError        a repository cannot be reached, or this token may not do that
│   └── HeadMovedError  somebody else committed to the repository meanwhile
├── RecipeError         settings that change bits differ from those of the store
├── DatasetError        rows have vanished or changed without a deletion
├── AnswerCutOffError   an answer that began before a deletion went on for longer than it may
├── CompatibilityError  another library is not as this one needs it to keep a promise
└── UnknownExampleError a request names an example that the store does not know
```

Bad arguments are plain `ValueError`s.
"""


class S3TError(Exception):
    """Base class: a promise of the library cannot be kept as things stand."""


class IsolationError(S3TError):
    """A stage changed, or was about to train, a tensor that it does not own (promise 1)."""


class StoreError(S3TError):
    """The store is damaged, of an unknown format, or asked for something that it does not hold."""


class StateError(StoreError):
    """The private state below `.s3t/` is absent, belongs to another store, or is older than the manifest."""


class StoreLockedError(StoreError):
    """Another process holds the store; the message names it."""


class UnfinishedDeletionError(StoreError):
    """A deletion was begun and could not be finished: what it is about is not served, and still on the disk."""


class HeadMovedError(StoreError):
    """The repository's head is not the one that a commit was made for: look again and make it anew."""


class HubError(StoreError):
    """A repository cannot be reached, is not there for this token, or may not be changed by it."""


class RecipeError(S3TError):
    """A setting that changes bits differs from the one that the store was trained with."""


class DatasetError(S3TError):
    """The train set does not agree with the index of what was trained on."""


class CompatibilityError(S3TError):
    """Another library, in the version that is installed, is not as this one needs it to keep a promise."""


class AnswerCutOffError(S3TError):
    """An answer that began before a deletion went on for longer than old answers may."""


class UnknownExampleError(S3TError):
    """A request names ids, groups or rows that the store does not know; nothing was changed."""
