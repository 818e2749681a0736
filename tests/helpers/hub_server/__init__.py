"""A Hub on this machine: the part of the Hugging Face Hub's protocol that the library uses, and what goes wrong there.

It is a test part. Bare git repositories and real bytes stand behind it, and the real `huggingface_hub` talks to it.
"""

from .client import ask
from .errors import HubError
from .faults import Faults
from .repository import Entry, Repository
from .server import Server, start

__all__ = ["Entry", "Faults", "HubError", "Repository", "Server", "ask", "start"]
