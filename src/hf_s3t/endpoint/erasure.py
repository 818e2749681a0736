"""`DELETE /v1/examples`: a deletion over HTTP, for whoever has the token. Without one there is no such route."""

from __future__ import annotations

import hmac
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool

from ..errors import S3TError, StoreLockedError, UnknownExampleError
from ..serving.ensemble import S3TEnsemble
from .protocol import DeleteRequest, Refusal


def add_deletion(app: FastAPI, model: S3TEnsemble, token: str) -> None:
    """Adds the route: examples are deleted from the store and from the model that answers; it returns the receipt."""
    expected = token.encode()

    async def check_token(request: Request) -> None:
        """Compares in a time that tells nothing of the token."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(given.encode(), expected) or scheme.lower() != "bearer":
            raise Refusal(401, "This bearer token may not delete. Nothing was changed.", None, "bad_token")

    @app.delete("/v1/examples", dependencies=[Depends(check_token)])
    async def delete(asked: DeleteRequest) -> dict[str, Any]:
        if not asked.ids and not asked.groups:
            raise Refusal(400, "`ids` and `groups` name nothing. Nothing was changed.", "ids", "invalid_value")
        return await run_in_threadpool(_deleted, model, asked)


def _deleted(model: S3TEnsemble, asked: DeleteRequest) -> dict[str, Any]:
    try:
        receipt = model.delete(ids=asked.ids, groups=asked.groups, reference=asked.reference)
    except UnknownExampleError as error:
        raise Refusal(404, str(error), "ids", "unknown_example") from None
    except StoreLockedError as error:
        raise Refusal(503, str(error), None, "store_locked", 10) from None
    except ValueError as error:
        raise Refusal(400, str(error), None, "invalid_value") from None
    except (S3TError, OSError) as error:
        raise Refusal(500, str(error), None, type(error).__name__) from error
    return receipt.to_json()
