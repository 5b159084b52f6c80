"""Addresses of sources: taking them apart, writing paths as URIs, and hiding passwords before anything is printed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from dapo_edge.errors import SourceError, SourceRefused, did_you_mean

LOCAL_SCHEMES = ("dir", "file", "image", "synthetic")  # these have no host, so an "@" in them is no credential
_SECRET_KEY = re.compile(r"([?&;](?:password|passwd|pwd|pass|pw|token|secret|key|user|username)=)[^&;]*", re.I)
_FILE_NAME = re.compile(r"@[^@/]*\.[A-Za-z][A-Za-z0-9]{2,3}$")  # 10:30@cam1.png is a file, user:word@host is none
_RESERVED = re.compile("[\x00-\x20\x7f%?\ud800-\udfff]")


@dataclass(frozen=True)
class Address:
    """A URI in three parts: `scheme://body?query`. The body is still percent-encoded."""

    scheme: str  # lower case
    body: str
    query: str


@dataclass(frozen=True)
class Option:
    """One key of a URI's query: how its text becomes a value, and what is valid, in words."""

    convert: Callable[[str], Any]  # raises ValueError
    valid: str


def split(uri: str) -> Address | None:
    """Take a URI apart; None when `uri` has no `scheme://` and so is a plain path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if match is None:
        return None
    body, _, query = uri[match.end() :].partition("?")
    return Address(match[1].lower(), body, query)


def redact(uri: str) -> str:
    """`uri` as it may be printed or stored: user names, passwords and tokens become `***`.

    Cameras are often given passwords that hold "@", ":" or "/" unescaped, so everything up to the last "@" is hidden:
    losing a bit of an odd path is better than showing half a password.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "", uri
        if uri.startswith(("/", ".", "~")) or _FILE_NAME.search(uri):
            return uri
    elif scheme.lower() in LOCAL_SCHEMES:
        return _SECRET_KEY.sub(r"\1***", uri)
    head, at, tail = rest.rpartition("@")
    if at and (":" in head or (separator and "/" not in head)):
        rest = f"***@{tail}"
    return scheme + separator + _SECRET_KEY.sub(r"\1***", rest)


def path_of(body: str) -> Path:
    """The path that a URI's body stands for."""
    path = unquote(body, errors="surrogateescape")
    if not path or "\0" in path:
        raise SourceError(
            f"'{body}' holds no path", "Write three slashes and an absolute path, as in dir:///data/parts"
        )
    return Path(path)


def uri_of(scheme: str, path: Path) -> str:
    """`path`, made absolute, as a URI. Letters of any script stay readable; bytes that are no text are encoded."""

    def encode(match: re.Match[str]) -> str:
        return "".join(f"%{byte:02X}" for byte in os.fsencode(match[0]))

    return f"{scheme}://{_RESERVED.sub(encode, str(path.absolute()))}"


def options(uri: str, query: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """Values of the keys in `query`; a key that is not `known`, or a value that is not valid, is a `SourceRefused`."""
    values: dict[str, Any] = {}
    valid = ", ".join(f"{key} ({option.valid})" for key, option in known.items())
    remedy = f"Valid keys: {valid}" if known else "Leave out the '?' and what follows; a path's own '?' is written %3F"
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            hint = did_you_mean(key, known, cutoff=0.6)
            raise SourceRefused(f"'{redact(uri)}' has the unknown key '{key}'", hint + remedy)
        if key in values:
            raise SourceRefused(f"'{redact(uri)}' gives the key '{key}' twice", f"Keep one '{key}'")
        try:
            values[key] = known[key].convert(text)
        except ValueError as error:
            cause = f"'{redact(uri)}' has {key}={text}"
            raise SourceRefused(cause, f"The value of '{key}' is {known[key].valid}") from error
    return values


def check_path(path: Path, what: str) -> None:
    """Raise a `SourceError` with the system's reason when there is nothing at `path` that can be reached."""
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        cause = f"the {what} '{redact(str(path))}' can't be opened ({reason})"
        raise SourceError(cause, "Check the path and its permissions") from error


def is_text(path: Path) -> bool:
    """Whether `path` can be handed to OpenCV, which crashes on names that are not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
