"""What whoever starts an endpoint decides, checked before anything is loaded."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

TOKEN_VARIABLE = "HF_S3T_DELETE_TOKEN"
LEAST_TOKEN = 16
"""Characters of a token that lets people delete."""

SECRETS = ("HF_S3T_KEY", "HF_S3T_STATE")
"""Variables that hand over what only an eraser needs."""


@dataclass(frozen=True)
class Settings:
    """How an endpoint answers.

    Args:
        name (`str`): of the model, as clients write it.
        refresh_seconds (`float`, *optional*, defaults to 5): between two looks at the store.
        max_staleness (`float`, *optional*, defaults to 60): seconds without a look that succeeded, after which nothing
            is answered.
        max_queue (`int`, *optional*, defaults to 256): requests that may wait; more are told to come again.
        max_batch (`int`, *optional*, defaults to 16): rows that are answered together.
        max_batch_tokens (`int`, *optional*, defaults to 65,536): rows of a batch times its longest row, prompt and
            answer: what its memory depends on. A request that is larger is answered alone.
        max_tokens (`int`, *optional*, defaults to 4,096): of one answer; who asks for more is refused.
        mates_seconds (`float`, *optional*, defaults to 0.005): how long the first request of a batch waits for others.
        drain_seconds (`float`, *optional*, defaults to 300): how long an endpoint that is to end may go on with the
            answers that it has begun.
        delete_token (`str`, *optional*): who has it may delete examples; `None`: there is no such route.

    Raises:
        ValueError: a number is out of its range, or the token is too short.
    """

    name: str
    refresh_seconds: float = 5.0
    max_staleness: float = 60.0
    max_queue: int = 256
    max_batch: int = 16
    max_batch_tokens: int = 65_536
    max_tokens: int = 4096
    mates_seconds: float = 0.005
    drain_seconds: float = 300.0
    delete_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.refresh_seconds > 0:
            raise ValueError(f"--refresh-seconds must be more than 0, got {self.refresh_seconds:g}.")
        if not self.max_staleness > self.refresh_seconds:
            raise ValueError(
                f"--max-staleness is {self.max_staleness:g} seconds and --refresh-seconds {self.refresh_seconds:g}: "
                "the state would be too old between two looks. Make the first larger, several times if you can."
            )
        if not 0 < self.drain_seconds < math.inf:
            raise ValueError(f"--drain-seconds must be more than 0 and finite, got {self.drain_seconds:g}.")
        for name in ("max_queue", "max_batch", "max_batch_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.delete_token is not None and len(self.delete_token) < LEAST_TOKEN:
            raise ValueError(
                f"{TOKEN_VARIABLE} has {len(self.delete_token)} characters, and whoever guesses it can delete. Set "
                f"one of {LEAST_TOKEN} or more, such as `openssl rand -hex 32` prints."
            )


def delete_token_of(environment: Mapping[str, str], allow_delete: bool) -> str | None:
    """The token for deletions, where they are allowed; `None` where they are not, and then no secret may be there.

    Raises:
        ValueError: the token is not set, or a key or a state is handed to an endpoint that may not delete.
    """
    if allow_delete:
        if not environment.get(TOKEN_VARIABLE):
            raise ValueError(f"--allow-delete needs a bearer token in {TOKEN_VARIABLE}, which is not set.")
        return environment[TOKEN_VARIABLE]
    if found := [name for name in SECRETS if environment.get(name)]:
        raise ValueError(
            f"{' and '.join(found)} is set. An endpoint that does not delete holds neither key nor state. Start it "
            "without, or with --allow-delete --state."
        )
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("me.example")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def model_name(store: str) -> str:
    """The name of a store's model: the id of its repository, or the name of its folder.

    >>> model_name("me/model"), model_name("/srv/stores/out")
    ('me/model', 'out')
    """
    from ..store.sources import is_repo_id

    return store if is_repo_id(store) else os.path.basename(os.path.abspath(store))
