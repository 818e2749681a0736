"""Signatures of receipts, Ed25519: who signed one is told to whoever has the public key, with no store at hand.

A signature covers the digest of the evidence, and the outcome. `cryptography` (the extra `signing`) does it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_limited
from .folder import StoreFolder
from .names import read_names
from .partition import canonical

logger = logging.getLogger(__name__)

SIGNING_VARIABLE = "HF_S3T_SIGNING_KEY"
"""Names the file of a private key; it goes before the one that `hf-s3t state set signing_key=FILE` named."""
SIGNED = ("digest", "status", "generation", "inactive_since", "still_served_at", "copies")
"""Fields of a receipt that its signature covers; the digest covers the rest."""
MAX_KEY_BYTES = 1 << 16


def signing_key_file(folder: StoreFolder) -> str | None:
    """The file of the private key that signs receipts, if one is named."""
    return os.environ.get(SIGNING_VARIABLE) or read_names(folder).get("signing_key")


def check_signer(folder: StoreFolder) -> None:
    """Raises `ValueError` if receipts are to be signed and cannot be: before anything is changed."""
    if file := signing_key_file(folder):
        check_key(file)


def check_key(file: str) -> None:
    """Raises `ValueError` if no receipt can be signed with the private key in a PEM file."""
    _private_key(file)


def signed(folder: StoreFolder, receipt: Mapping[str, Any]) -> dict[str, str] | None:
    """The signature of a receipt; `None` where no key is named. It stops no deletion that is on its way."""
    try:
        file = signing_key_file(folder)
        return signature_by(file, receipt) if file else None
    except (ValueError, OSError) as error:
        logger.error("%s is not signed: %s", receipt["receipt"], error)
        return None


def signature_by(file: str, receipt: Mapping[str, Any]) -> dict[str, str]:
    """The signature of a receipt by the private key in a PEM file."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = _private_key(file)
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return {"public_key": public.hex(), "signature": key.sign(_signed_bytes(receipt)).hex()}


def read_public_key(file: str) -> bytes:
    """The public key in a PEM file, as its 32 bytes. A `ValueError` if it is none of Ed25519."""
    check_installed()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

    try:
        key = load_pem_public_key(read_limited(Path(file), MAX_KEY_BYTES))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no public key ({error}). Give a PEM file.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError(f"{file} holds a key of another kind than Ed25519, by which no receipt is signed.")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def signature_finding(receipt: Mapping[str, Any], public_key: bytes | None = None) -> str | None:
    """What is wrong with the signature of a receipt; it has to be by a public key, if one is given."""
    check_installed()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if receipt["signature"] is None:
        return None if public_key is None else "it is not signed"
    try:
        given = bytes.fromhex(receipt["signature"]["public_key"])
        Ed25519PublicKey.from_public_bytes(given).verify(
            bytes.fromhex(receipt["signature"]["signature"]), _signed_bytes(receipt)
        )
    except (InvalidSignature, KeyError, TypeError, ValueError):
        return "its signature is not that of what it says: it was changed after it was signed"
    if public_key is not None and public_key != given:
        return "it is signed by another key than the one that is given"
    return None


def _signed_bytes(receipt: Mapping[str, Any]) -> bytes:
    return b"hf_s3t receipt\n" + canonical({name: receipt[name] for name in SIGNED})


def _private_key(file: str) -> Any:
    check_installed()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    make = "Make one: openssl genpkey -algorithm ed25519 -out FILE"
    try:
        key = load_pem_private_key(read_limited(Path(file), MAX_KEY_BYTES), password=None)
    except OSError as error:
        raise ValueError(f"Receipts are to be signed by {file}, which cannot be read ({error}). {make}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no private key without a password ({error}). {make}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{file} holds a key of another kind than Ed25519. {make}")
    return key


def check_installed() -> None:
    """Raises `ValueError` without `cryptography`."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ValueError(
            'Signatures of receipts need `cryptography`: pip install "hf-s3t[signing]". Or unset the key: '
            f"`hf-s3t state set STORE signing_key=`, and {SIGNING_VARIABLE}."
        ) from None
