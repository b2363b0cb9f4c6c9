"""Who a bearer token belongs to. Knows hashes only; a token is never stored, logged or sent back.

The file is TOML or JSON lines, one entry for each token, with the hex digest of the token's UTF-8 bytes:

    [[tokens]]
    sha256 = "9f86d0…"          # or blake2b (64 bytes)
    tenant = "acme"
    role = "user"               # or "admin"

    {"sha256": "9f86d0…", "tenant": "acme", "role": "user"}
"""

import hashlib
import json
import secrets
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from server.errors import ConfigError, Unauthenticated
from server.frontend.caller import Role

HASHES: dict[str, tuple[Callable[[bytes], bytes], int]] = {
    "sha256": (lambda token: hashlib.sha256(token).digest(), 32),
    "blake2b": (lambda token: hashlib.blake2b(token).digest(), 64),
}
"""By name in the file: the function, and the length of its digest in bytes."""

SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token stands for."""

    tenant: str
    role: Role


class Credentials:
    """All tokens that are known.

    Looked up under a hash keyed anew in each process, so that the time of a lookup tells nothing of the digests.
    """

    def __init__(self, grants: Iterable[tuple[str, bytes, Grant]]) -> None:
        self._key = secrets.token_bytes(32)
        self._grants = {self._blind(name, digest): grant for name, digest, grant in grants}

    @classmethod
    def from_file(cls, path: Path) -> "Credentials":
        """Read a file of hashed tokens.

        Raises:
            ConfigError: the file cannot be read, or an entry is wrong; names the file and the entry.
        """
        try:
            text = path.read_text(encoding="utf-8")
            entries = tomllib.loads(text).get("tokens", []) if path.suffix == ".toml" else list(_json_lines(text))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"{path}: no tokens in it")
        return cls(_read_entry(path, place, entry) for place, entry in enumerate(entries, start=1))

    def find(self, authorization: str | None) -> Grant:
        """Find whom an `authorization` header stands for.

        Raises:
            Unauthenticated: there is no header, it is no bearer token, or the token is not known.
        """
        if authorization is None:
            raise Unauthenticated("no credential; send metadata `authorization: Bearer TOKEN`")
        if authorization[: len(SCHEME)].lower() != SCHEME:
            raise Unauthenticated("the credential is no bearer token; send metadata `authorization: Bearer TOKEN`")
        token = authorization[len(SCHEME) :].strip().encode()
        found = [self._grants.get(self._blind(name, digest(token))) for name, (digest, _) in HASHES.items()]
        grant = next((each for each in found if each is not None), None)
        if grant is None:
            raise Unauthenticated("the bearer token is not known")
        return grant

    def _blind(self, name: str, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._key, person=name.encode()).digest()


def _json_lines(text: str) -> Iterator[object]:
    for line in text.splitlines():
        if line.strip():
            yield json.loads(line)


def _read_entry(path: Path, place: int, entry: object) -> tuple[str, bytes, Grant]:
    where = f"{path}: token {place}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: is not a table")
    named = [name for name in HASHES if name in entry]
    if len(named) != 1 or set(entry) - {*named, "tenant", "role"}:
        raise ConfigError(f"{where}: want exactly one of {', '.join(HASHES)}, and tenant and role")
    name = named[0]
    try:
        digest = bytes.fromhex(entry[name])
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: {name} is not hexadecimal") from None
    if len(digest) != HASHES[name][1]:
        raise ConfigError(f"{where}: {name} has {len(digest)} bytes, want {HASHES[name][1]}")
    tenant = entry.get("tenant")
    if not isinstance(tenant, str) or not tenant:
        raise ConfigError(f"{where}: tenant is missing")
    try:
        return name, digest, Grant(tenant, Role(entry.get("role", "user")))
    except ValueError:
        raise ConfigError(f"{where}: role is {entry.get('role')!r}, want user or admin") from None
