"""Keys: an Authorization header in, its sender's rights out."""

import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from dlp_lora.files import parse_json

API_KEY, ADMIN_KEY = "DLP_LORA_API_KEY", "DLP_LORA_ADMIN_KEY"
BACKEND_KEY = "DLP_LORA_BACKEND_KEY"  # the key of vLLM servers


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rights of a sender: to use these adapters (None for all), and to manage adapters."""

    adapters: frozenset[str] | None = None
    is_admin: bool = False


class Keys:
    """The keys of a server. Without keys, everybody may ask and nobody may manage adapters.

    Only digests are stored; a comparison always takes the same time.
    """

    def __init__(self, users: Mapping[str, Sequence[str] | None] | None = None, admin: str | None = None) -> None:
        for key in [*(users or {}), *([] if admin is None else [admin])]:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError("a key must be printable ASCII characters without spaces, and at least one")
        if admin is not None and admin in (users or {}):
            raise ValueError("the admin key is also a user's; choose another one")
        self._accesses = [
            (_digest(key), Access(adapters=None if names is None else frozenset(names)))
            for key, names in (users or {}).items()
        ]
        self.has_users = bool(self._accesses)
        self.has_admin = admin is not None
        if admin is not None:
            self._accesses.append((_digest(admin), Access(is_admin=True)))

    @property
    def names(self) -> frozenset[str]:
        """The adapters that any key is restricted to."""
        return frozenset(name for _, access in self._accesses for name in access.adapters or ())

    def access(self, authorization: str | None) -> Access | None:
        """Returns the rights of a header's sender; None if its key is missing or wrong."""
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        rights: Access | None = None
        for expected, access in self._accesses:  # all of them, whichever it is
            if hmac.compare_digest(expected, digest):
                rights = access
        return Access() if rights is None and not self.has_users else rights

    def __repr__(self) -> str:
        return f"Keys({len(self._accesses)} keys)"


def read_keys(path: str | Path) -> dict[str, list[str] | None]:
    """Reads a file of keys: a JSON object from each key to its adapters, or to null for all.

    Raises:
        ValueError: if it has another form; the message has no key.
    """
    try:
        data = parse_json(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error.msg}, line {error.lineno}); {KEYS_FORM}") from None
    except ValueError:  # a key twice: the message would have it
        raise ValueError(f"{path} holds a key twice; {KEYS_FORM}") from None
    if not isinstance(data, dict) or not data:
        raise ValueError(f"{path} holds no keys; {KEYS_FORM}")
    for number, names in enumerate(data.values(), 1):
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{path}: key number {number} has neither a list of adapters nor null; {KEYS_FORM}")
    return data


KEYS_FORM = 'expected {"key": ["adapter", ...], "another key": null}'


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
