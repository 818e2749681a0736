"""`hf-s3t serve`: an endpoint for one store."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from .options import OneStore
from .outcomes import Outcome, outcome_of, show


def serve(
    store: OneStore,
    base: Annotated[
        str | None, typer.Option(help="Folder or repository of the base model. Default: the one in the store.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or repository of the tokenizer. Default: the base's.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on. 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port. 0: any free one; the log names it.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model for clients. Default: the store's.")] = None,
    refresh_seconds: Annotated[float, typer.Option(help="Seconds between two looks at the store.")] = 5.0,
    max_staleness: Annotated[
        float, typer.Option(help="Stop answering if no look has succeeded for this many seconds.")
    ] = 60.0,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait. More get 429.")] = 256,
    max_batch: Annotated[int, typer.Option(help="Most rows in one batch.")] = 16,
    max_batch_tokens: Annotated[
        int, typer.Option(help="Most tokens in one batch: rows times the longest row with its answer.")
    ] = 65_536,
    drain_seconds: Annotated[
        float, typer.Option(help="Seconds that running answers get after SIGTERM. Then they are cut off.")
    ] = 300.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens in one answer. A request for more is refused.")] = 4096,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the base's weights, e.g. bfloat16. Default: as it was saved.")
    ] = None,
    allow_delete: Annotated[
        bool, typer.Option("--allow-delete", help="Answer DELETE /v1/examples, with the token in HF_S3T_DELETE_TOKEN.")
    ] = False,
    state: Annotated[Path | None, typer.Option("--state", help="Folder of the state, for --allow-delete.")] = None,
) -> None:
    """Serve a store over HTTP. Deletions take effect while it runs. Needs the extra `serve`.

    Language models answer /v1/completions and /v1/chat/completions like OpenAI's API,
    classifiers answer /classify. /health says whether the model answers, /metrics has
    counters. After SIGTERM it finishes the running answers and ends.
    """

    def verb() -> Outcome:
        try:
            from ..endpoint.server import bound, load
            from ..endpoint.server import serve as run
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("fastapi", "uvicorn", "prometheus_client"):
                raise
            raise ValueError(f"{error.name} is missing. Install the extra: pip install 'hf_s3t[serve]'.") from None
        from ..endpoint.settings import Settings, delete_token_of, model_name

        if allow_delete != (state is not None):
            raise ValueError("Give --allow-delete and --state together, or neither. Answering needs no state.")
        settings = Settings(
            name or model_name(store), refresh_seconds, max_staleness, max_queue, max_batch, max_batch_tokens,
            max_tokens, drain_seconds=drain_seconds, delete_token=delete_token_of(os.environ, allow_delete),
        )  # fmt: skip
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        listener = bound(host, port)
        run(*load(store, base, tokenizer, state, **({"dtype": dtype} if dtype else {})), settings, listener)

    show([outcome_of(store, verb)], as_json=False)
