"""API keys: read from a file, compared in constant time."""

import hmac
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request

from birefnet.errors import UsageError
from birefnet.serve.errors import AuthenticationError


class ApiKeys:
    """
    The keys that open the API; without any, it is open to all who reach it.

    Args:
        keys: the keys' text.
    """

    def __init__(self, keys: list[str] = ()):
        self._hashes = [_hash(key) for key in keys]

    @classmethod
    def from_file(cls, path: str | Path) -> "ApiKeys":
        """
        One key a line; empty lines and lines that begin with `#` are left out.

        Raises:
            UsageError: the file cannot be read or has no key, or a key has fewer than 16 characters.
        """
        try:
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--api-key-file {path}: {error}") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise UsageError(f"--api-key-file {path}: the file has no key; write one a line")
        if any(len(key) < 16 for key in keys):
            raise UsageError(f"--api-key-file {path}: a key needs 16 characters or more")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def accept(self, key: str) -> bool:
        """Whether this is one of the keys. The time it takes tells nothing about them."""
        candidate = _hash(key)  # of one length whatever the key's
        found = False
        for known in self._hashes:  # all of them, also after a match
            found |= hmac.compare_digest(candidate, known)
        return found

    def check(self, request: Request) -> None:
        """
        Raises:
            AuthenticationError: keys are needed, and the request has none of them in `X-Api-Key` (remove.bg) or
                `Authorization: Bearer` (OpenAI, Prometheus).
        """
        if not self:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        if not self.accept(request.headers.get("x-api-key") or bearer):
            raise AuthenticationError("The API key is missing or unknown.", headers={"WWW-Authenticate": "Bearer"})


def _hash(key: str) -> bytes:
    return sha256(key.encode()).digest()
