"""Every exception that the library raises on its own account.

```
S3TError
├── IsolationError      a stage touched a tensor that it does not own
├── StoreError          the store cannot be read or written as asked
│   ├── StateError      the private state is absent, foreign or older than the manifest
│   ├── StoreLockedError  another writer or another training run holds the store
│   ├── UnfinishedDeletionError  a deletion is obeyed, but its files are not all removed yet
│   ├── HubError        a repository cannot be reached, or this token may not do that
│   └── HeadMovedError  somebody else has committed to the repository
├── RecipeError         settings that change bits differ from those of the store
├── DatasetError        rows have vanished or changed without a deletion
├── AnswerCutOffError   an answer began before a deletion and went on for too long
├── CompatibilityError  a promise needs another library to work in a way that it does not
└── UnknownExampleError a request names an example that the store does not know
```

Bad arguments are plain `ValueError`s.
"""


class S3TError(Exception):
    """Base class: the library cannot keep one of its promises."""


class IsolationError(S3TError):
    """A stage changed, or was about to train, a tensor that it does not own (promise 1)."""


class StoreError(S3TError):
    """The store is damaged, of an unknown format, or asked for something that it does not hold."""


class StateError(StoreError):
    """The private state below `.s3t/` is absent, belongs to another store, or is older than the manifest."""


class StoreLockedError(StoreError):
    """Another process holds the store; the message names it."""


class UnfinishedDeletionError(StoreError):
    """A deletion could not be finished. What it covers is no longer served, but is still on the disk."""


class HeadMovedError(StoreError):
    """Somebody else has committed to the repository: read the new head, and make the commit again."""


class HubError(StoreError):
    """A repository cannot be reached, does not exist for this token, or the token may not change it."""


class RecipeError(S3TError):
    """A setting that changes the trained bits differs from that of the store."""


class DatasetError(S3TError):
    """The train set does not agree with the index of what was trained on."""


class CompatibilityError(S3TError):
    """A promise needs another library to work in a way that its installed version does not."""


class AnswerCutOffError(S3TError):
    """An answer began before a deletion, and went on for longer than `old_answers_seconds`."""


class UnknownExampleError(S3TError):
    """A request names ids, groups or rows that the store does not know; nothing was changed."""
