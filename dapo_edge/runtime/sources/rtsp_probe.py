"""Whether an RTSP camera answers, and why it says no: asked before FFmpeg opens its stream.

FFmpeg tells its reasons to stderr only, and inside OpenCV all openings of the process wait for one that hangs. So one
DESCRIBE request, RFC 2326, and when it is refused a second one with the credentials, RFC 2617. Nothing that is raised
here holds a user name or a password.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import secrets
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from email.message import Message
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import parse_http_list, parse_keqv_list

from dapo_edge.errors import SourceError, SourceRefused

DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322}
ENCODE = "special characters of a password are percent-encoded, as in %40 for @"
CAUSES = {
    403: ("forbids the access", "Allow this user the stream"),
    404: ("has no stream at this path", "Check the path; the camera's manual names it"),
    461: ("does not send over this transport", "Use the other one: dapo.transport=tcp or dapo.transport=udp"),
    503: ("can't deliver the stream now", "Look at the camera's own status; it may have too many viewers"),
}
REFUSED = (403, 461)


@dataclass(frozen=True)
class _Answer:
    status: int
    reason: str
    headers: Message


@contextmanager
def describing(uri: str, shown: str, limit_s: float) -> Iterator[SourceError]:
    """Ask the camera at `uri` for its stream, for `limit_s` seconds at most; `shown` is what may be printed of `uri`.

    Gives what to say when FFmpeg can't open it all the same. Raises `SourceError` where FFmpeg need not try, because
    nothing answers or the camera says no; `SourceRefused` where trying again is no use. Stays connected meanwhile: some
    servers refuse a viewer while they clear up after the one before.
    """
    with ExitStack() as connected:
        yield _asked(uri, shown, time.monotonic() + limit_s, connected)


def _asked(uri: str, shown: str, until_s: float, connected: ExitStack) -> SourceError:
    address, host, port = server_of(uri, shown)
    try:
        plain = connected.enter_context(socket.create_connection((host, port), timeout=_left_s(until_s)))
        plain.settimeout(_left_s(until_s))
        connection = connected.enter_context(_secured(plain, address))
        answer = _answered(connection, address, port, until_s)
    except TimeoutError:
        raise silent(shown) from None
    except ssl.SSLError as error:
        return SourceError(f"'{shown}' does not speak TLS ({error.reason})", "Try rtsp://, or another port")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or "what answers is no RTSP server"
        cause = f"'{shown}' can't be reached ({reason})"
        raise SourceError(cause, f"Check its name, port and power; {ENCODE}") from None
    return _judged(answer, address, shown)


def server_of(uri: str, shown: str) -> tuple[SplitResult, str, int]:
    """The parts of an RTSP address, its host and its port. Raises `SourceRefused`; asks nobody."""
    remedy = f"Write rtsp://host:554/path; {ENCODE}"
    try:
        address = urlsplit(uri)
    except ValueError:
        raise SourceRefused(f"'{shown}' is not an address", remedy) from None
    host = address.hostname
    if not host or not host.strip():
        raise SourceRefused(f"'{shown}' names no host", remedy)
    try:
        port = DEFAULT_PORTS[address.scheme] if address.port is None else address.port
    except ValueError:
        port = 0
    if not port:
        raise SourceRefused(f"'{shown}' has a port that is not a whole number from 1 to 65535", remedy)
    return address, host, port


def silent(shown: str) -> SourceError:
    """What to say of a camera that keeps one waiting."""
    return SourceError(f"'{shown}' does not answer in time", "Check the camera and its network")


def _secured(plain: socket.socket, address: SplitResult) -> socket.socket:
    if address.scheme != "rtsps":
        return plain
    context = ssl.create_default_context()
    # As FFmpeg does: the certificates of cameras are self-signed.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(plain)


def _answered(connection: socket.socket, address: SplitResult, port: int, until_s: float) -> _Answer:
    """The camera's answer, with credentials when it wants them and they are there."""
    url = f"{address.scheme}://{_netloc(address, port)}{address.path}"
    url += f"?{address.query}" if address.query else ""
    with connection.makefile("rb") as answers:
        connection.settimeout(_left_s(until_s))
        answer = _describe(connection, answers, url, 1)
        if answer.status != 401 or address.username is None:
            return answer
        permission = _permission(answer, url, unquote(address.username), unquote(address.password or ""))
        if permission is None:
            return answer
        connection.settimeout(_left_s(until_s))
        return _describe(connection, answers, url, 2, permission)


def _left_s(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _netloc(address: SplitResult, port: int) -> str:
    host = str(address.hostname)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _describe(
    connection: socket.socket, answers: io.BufferedReader, url: str, number: int, permission: str | None = None
) -> _Answer:
    lines = [f"DESCRIBE {url} RTSP/1.0", f"CSeq: {number}", "Accept: application/sdp", "User-Agent: dapo-edge"]
    lines += [f"Authorization: {permission}"] if permission else []
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    protocol, _, rest = answers.readline(1024).decode("latin-1").partition(" ")
    if not protocol.startswith("RTSP/"):
        raise ValueError(protocol)
    code, _, reason = rest.strip().partition(" ")
    headers = http.client.parse_headers(answers)
    answers.read(min(int(headers.get("Content-Length", 0)), 1 << 16))
    return _Answer(int(code), reason, headers)


def _permission(answer: _Answer, url: str, user: str, password: str) -> str | None:
    """The Authorization header, or None where the camera wants one of a kind that is not known here."""
    challenges = {
        kind.lower(): fields
        for kind, _, fields in (text.partition(" ") for text in answer.headers.get_all("WWW-Authenticate", []))
    }
    if "digest" in challenges:
        return _digest(parse_keqv_list(parse_http_list(challenges["digest"])), url, user, password)
    if "basic" in challenges:
        return "Basic " + b64encode(f"{user}:{password}".encode()).decode()
    return None


def _digest(
    challenge: dict[str, str], url: str, user: str, password: str, method: str = "DESCRIBE", cnonce: str = ""
) -> str | None:
    """RFC 2617, section 3.2.2."""
    if challenge.get("algorithm", "MD5").upper() != "MD5" or not {"realm", "nonce"} <= set(challenge):
        return None
    realm, nonce = challenge["realm"], challenge["nonce"]
    fields = {"username": user, "realm": realm, "nonce": nonce, "uri": url}
    who, what = _md5(f"{user}:{realm}:{password}"), _md5(f"{method}:{url}")
    extra = ""
    if "auth" in challenge.get("qop", "").replace(" ", "").split(","):
        cnonce = cnonce or secrets.token_hex(8)
        fields["cnonce"] = cnonce
        fields["response"] = _md5(f"{who}:{nonce}:00000001:{cnonce}:auth:{what}")
        extra = ", nc=00000001, qop=auth"
    else:
        fields["response"] = _md5(f"{who}:{nonce}:{what}")
    if "opaque" in challenge:
        fields["opaque"] = challenge["opaque"]
    return "Digest " + ", ".join(f'{name}="{value}"' for name, value in fields.items()) + extra


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _judged(answer: _Answer, address: SplitResult, shown: str) -> SourceError:
    """See `describing`."""
    if answer.status < 400:  # a camera may send its viewers to another address, where FFmpeg follows
        return SourceError(
            f"'{shown}' answers, but sends no video that can be decoded",
            "Set the camera to H.264, H.265 or MJPEG, or try dapo.latency=default or dapo.transport=udp",
        )
    if answer.status == 401 and address.username is None:
        raise SourceRefused(f"'{shown}' wants a user name and a password", "Write rtsp://user:password@host/path")
    if answer.status == 401:
        refused = SourceRefused(f"'{shown}' refuses this user name or password", f"Check both; {ENCODE}")
        if _permission(answer, "", "", "") is None:  # a kind of login that FFmpeg may know
            return refused
        raise refused
    cause, remedy = CAUSES.get(answer.status, (f"answers {answer.status} {answer.reason}", "See the camera's manual"))
    kind = SourceRefused if answer.status in REFUSED else SourceError
    raise kind(f"'{shown}' {cause}", remedy)
