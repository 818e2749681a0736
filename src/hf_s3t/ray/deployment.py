"""The endpoint on many machines: replicas behind Ray Serve, of which each loads the store and follows it by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..endpoint.settings import Settings, delete_token_of, model_name
from ..store.sources import is_repo_id
from ..store.store import S3TStore

if TYPE_CHECKING:
    from ray.serve import Application


HEADROOM = 64
"""Requests that a replica is sent beyond those that it answers and those that wait: it refuses them itself."""


class Replica:
    """What Ray asks of a replica, beside the routes of its `app`."""

    app: Any

    def check_health(self) -> None:
        """Ray replaces a replica of which this raises: its model's thread has ended, or batch after batch fails. A
        store that cannot be reached is no reason: another replica would not reach it either."""
        if reason := self.app.state.endpoint.batcher.reason:
            raise RuntimeError(reason)


def serve(
    store: str,
    *,
    base: str | None = None,
    tokenizer: str | None = None,
    name: str | None = None,
    replicas: int = 1,
    autoscaling: Mapping[str, Any] | None = None,
    resources: Mapping[str, float] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Application:
    """A Ray Serve application with the routes of `hf-s3t serve`, to be handed to `ray.serve.run`.

    Every replica reads the store by itself: its folder must be mounted wherever a replica may start, or it is a
    repository. After a deletion each takes it over at its own next look, so that for `refresh_seconds` replicas may be
    of different generations; none goes back. A replica holds neither key nor state, and deletes nothing.

    Args:
        store (`str`): a folder or the id of a repository.
        base, tokenizer (`str`, *optional*): folders or ids, as for `hf-s3t serve`.
        name (`str`, *optional*): of the model, as clients write it. `None`: the repository's id or the folder's name.
        replicas (`int`, *optional*, defaults to 1): how many answer.
        autoscaling (`Mapping`, *optional*): Ray Serve's `autoscaling_config`, in the place of `replicas`.
        resources (`Mapping[str, float]`, *optional*): of one replica, such as `{"GPU": 1}`. `None`: one CPU.
        model_kwargs (`Mapping`, *optional*): for the base's `from_pretrained`.
        settings: those of [`~hf_s3t.endpoint.settings.Settings`]: `refresh_seconds`, `max_queue` and so on.

    Returns:
        `ray.serve.Application`: not yet running.

    Raises:
        ValueError: a setting is out of its range, or allows deletions.
        StoreError: there is no store.

    Example:

        ```py
        ray.serve.run(hf_s3t.ray.serve("me/model", replicas=4, resources={"GPU": 1}), name="chat")
        ```
    """
    if settings.get("delete_token") is not None:
        raise ValueError(
            "Replicas delete nothing: several of them would each need the state. Delete with `hf-s3t delete`, or "
            "through one `hf-s3t serve --allow-delete`; every replica takes it over."
        )
    from ray import serve as ray_serve  # training does without

    S3TStore(store).manifest()  # said here and at once, where a replica would try three times
    checked = Settings(name=name or model_name(store), **settings)
    store = store if is_repo_id(store) else str(Path(store).resolve())  # a replica has another working folder

    def application() -> Any:
        """In a replica: loads the model, and makes the application."""
        from ..endpoint.app import make_app
        from ..endpoint.server import load

        delete_token_of(os.environ, allow_delete=False)
        model, own = load(store, base, tokenizer, **(model_kwargs or {}))
        return make_app(model, own, checked)

    wanted = dict(resources or {"CPU": 1})
    scale = {"num_replicas": replicas} if autoscaling is None else {"autoscaling_config": dict(autoscaling)}
    deployment: Any = ray_serve.deployment(
        ray_serve.ingress(application)(Replica),
        name="hf_s3t",
        max_ongoing_requests=checked.max_queue + checked.max_batch + HEADROOM,
        max_queued_requests=checked.max_queue + HEADROOM,  # at each proxy
        graceful_shutdown_timeout_s=checked.drain_seconds,
        ray_actor_options={
            "num_cpus": wanted.pop("CPU", 0),
            "num_gpus": wanted.pop("GPU", 0),
            "resources": wanted,
        },
        **scale,
    )
    return deployment.bind()


def application(arguments: Mapping[str, Any]) -> Application:
    """[`serve`] for a config file of `serve deploy`: `import_path: hf_s3t.ray:application`, `args: {store: ...}`."""
    return serve(**arguments)

