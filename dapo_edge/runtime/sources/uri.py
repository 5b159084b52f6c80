"""Addresses of sources: taking them apart, writing paths as URIs, and hiding passwords before anything is printed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

from dapo_edge.errors import SourceError, SourceRefused, did_you_mean

LOCAL_SCHEMES = (
    "csi",
    "dir",
    "file",
    "image",
    "synthetic",
    "v4l2",
)  # these have no host, so an "@" in them is no credential
# Parts of a key that make its value a secret: access_token, user-pw, loginpas; not so key-int-max, UserSetSelector.
_SECRET = (
    r"(?:pass|pwd|psw|(?<![a-z])pw(?![a-z])|token|secret|auth|credential|signature|login|usr|headers|cookie"
    r"|key(?![-_]?(?:int|frame))|user(?!set|output|defined))"
)
_KEY = rf"[\w.-]*{_SECRET}[\w.-]*"
_IN_QUERY = re.compile(rf"([?&;]{_KEY}=)[^&;]*", re.I)
# Some recorders have it in the path: rtsp://host/user=me_password=secret_channel=1
_IN_ADDRESS = re.compile(rf"((?:^|[?&;/]){_KEY}=)[^&;]*?(?=[&;]|_(?:channel|stream)=|$)", re.I)
_IN_WORD = re.compile(rf"([?&;/]{_KEY}=)[^&;\"']*?(?=[&;\"']|_(?:channel|stream)=|$)", re.I)
# In the text of a GStreamer pipeline: user-pw=secret, password = "a b", location=rtsp://user:secret@host/x
_QUOTED = r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'"""
_PROPERTY = re.compile(rf"((?<![\w.?&;/-]){_KEY}\s*=\s*)((?:{_QUOTED}|\\.|[^\s!\"'])+)", re.I)
_WORD = re.compile(rf"(?:{_QUOTED}|\\.|\S)+", re.S)
_PROPERTY_OF_MESSAGE = re.compile(rf"((?<![\w.?&;/=-]){_KEY}\s*=\s*)({_QUOTED}|(?:[^\s!\"']|\"[^\"]*\")+)", re.I)
_WORD_OF_MESSAGE = re.compile(r"""[^\s"']+""")
_USER = re.compile(rf"(?<![\w+.-])(?!(?:{'|'.join(LOCAL_SCHEMES)})://)([a-z][\w+.-]*://)(?!user:password@)\S*@", re.I)
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
    elif scheme.lower() == "gst":
        return f"{scheme}://{redact_pipeline(pipeline_of(rest))}"
    elif scheme.lower() in LOCAL_SCHEMES:
        return _IN_QUERY.sub(r"\1***", uri)
    head, at, tail = rest.rpartition("@")
    if at and (":" in head or (separator and "/" not in head)):
        rest = f"***@{tail}"
    secret = _IN_ADDRESS if separator else _IN_QUERY  # a file may be called pass=2.png
    return scheme + separator + secret.sub(r"\1***", rest)


def redact_message(text: str) -> str:
    """A message in which addresses may stand, as it may be printed; `user:password@` is advice, and stays.

    The last net: where an address is known as such, `redact` knows better where it ends.
    """

    def hide(word: re.Match[str]) -> str:
        if "://" not in word[0] or word[0].lower().startswith("gst://"):
            return redact(word[0])
        return _IN_WORD.sub(r"\1***", _USER.sub(r"\1***@", word[0]))

    return _WORD_OF_MESSAGE.sub(hide, _PROPERTY_OF_MESSAGE.sub(r"\1***", text))


def pipeline_of(rest: str) -> str:
    """The text of a GStreamer pipeline behind `gst://`. Percent-encoding is undone where there is no white space."""
    return rest if re.search(r"\s", rest) else unquote(rest)


def redact_pipeline(text: str) -> str:
    """A pipeline, or what GStreamer says about it, as it may be printed."""

    def hide(word: re.Match[str]) -> str:
        shown = re.sub(r"://.*@", "://***@", word[0], flags=re.S)
        return _IN_WORD.sub(r"\1***", shown)

    return _WORD.sub(hide, _PROPERTY.sub(r"\1***", text))


def secrets_of(text: str) -> list[str]:
    """What a pipeline's text holds that must not be printed, the longest first."""
    found = {match[2].strip("\"'") for match in _PROPERTY.finditer(text)}
    for word in _WORD.findall(text):
        userinfo = re.search(r"://(.*)@", word, re.S)
        if userinfo:
            found |= {userinfo[1], userinfo[1].partition(":")[2]}
    return sorted(found - {""}, key=len, reverse=True)


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


def split_query(uri: str, query: str, own: Mapping[str, Option]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Values of the keys that are `own`, and all other pairs as they are, in order. Raises `SourceRefused`."""
    pairs = parse_qsl(query, keep_blank_values=True)
    mine = urlencode([pair for pair in pairs if pair[0] in own])
    return options(uri, mine, own), [pair for pair in pairs if pair[0] not in own]


def number(low: float, high: float, unit: str) -> Option:
    """A decimal number from `low` to `high`."""

    def convert(text: str) -> float:
        if not re.fullmatch(r"[0-9]*\.?[0-9]+", text) or not low <= float(text) <= high:
            raise ValueError(text)
        return float(text)

    return Option(convert, f"{low:g} to {high:g} {unit}".strip())


def whole(low: int, high: int, unit: str = "") -> Option:
    """A whole number from `low` to `high`."""

    def convert(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return Option(convert, f"a whole number from {low} to {high} {unit}".strip())


def one_of(*names: str) -> Option:
    """One of a few words."""

    def convert(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return Option(convert, " or ".join(names))


SWITCH = Option(lambda text: one_of("0", "1").convert(text) == "1", "0 or 1")


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
