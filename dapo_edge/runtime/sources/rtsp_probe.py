"""Why an RTSP stream can't be opened: FFmpeg tells its own stderr only, so the camera is asked again.

One DESCRIBE request, RFC 2326, and when it is refused a second one with the credentials, RFC 2617. Nothing that is
raised here holds a user name or a password.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import secrets
import socket
import ssl
from base64 import b64encode
from dataclasses import dataclass
from email.message import Message
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import parse_http_list, parse_keqv_list

from dapo_edge.errors import SourceError, SourceRefused

DEFAULT_PORTS = {"rtsp": 554, "rtsps": 322}
LEAST_S = 0.5  # for the answer, where opening used up nearly all of its time
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


def why_it_fails(uri: str, shown: str, left_s: float) -> SourceError:
    """What keeps `uri` from being opened; `shown` is what may be printed of it. Takes `left_s` seconds, or a bit more.

    `SourceRefused` where trying again is no use.
    """
    silent = SourceError(f"'{shown}' does not answer in time", "Check the camera and its network")
    if left_s <= 0:
        return silent
    try:
        address = urlsplit(uri)
        host, port = address.hostname, address.port or DEFAULT_PORTS[address.scheme]
        if not host:
            raise ValueError("no host")
    except ValueError:
        return SourceRefused(f"'{shown}' names no host and port", f"Write rtsp://host:554/path; {ENCODE}")
    try:
        with socket.create_connection((host, port), timeout=max(left_s, LEAST_S)) as plain:
            return _judge(_asked(_secured(plain, address), address, port), address, shown)
    except TimeoutError:
        return silent
    except ssl.SSLError as error:
        return SourceError(f"'{shown}' does not speak TLS ({error.reason})", "Try rtsp://, or another port")
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or "what answers is no RTSP server"
        return SourceError(f"'{shown}' can't be reached ({reason})", f"Check its name, port and power; {ENCODE}")


def _secured(plain: socket.socket, address: SplitResult) -> socket.socket:
    if address.scheme != "rtsps":
        return plain
    context = ssl.create_default_context()
    # As FFmpeg does: the certificates of cameras are self-signed.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(plain)


def _asked(connection: socket.socket, address: SplitResult, port: int) -> _Answer:
    """The camera's answer, with credentials when it wants them and they are there."""
    url = f"{address.scheme}://{_netloc(address, port)}{address.path}"
    url += f"?{address.query}" if address.query else ""
    with connection, connection.makefile("rb") as answers:
        answer = _describe(connection, answers, url, 1)
        if answer.status != 401 or address.username is None:
            return answer
        permission = _permission(answer, url, unquote(address.username), unquote(address.password or ""))
        return answer if permission is None else _describe(connection, answers, url, 2, permission)


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
    """The Authorization header, or None where the camera wants one that FFmpeg does not know either."""
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


def _judge(answer: _Answer, address: SplitResult, shown: str) -> SourceError:
    if answer.status == 401 and address.username is None:
        return SourceRefused(f"'{shown}' wants a user name and a password", "Write rtsp://user:password@host/path")
    if answer.status == 401:
        return SourceRefused(f"'{shown}' refuses this user name or password", f"Check both; {ENCODE}")
    if answer.status == 200:
        return SourceError(
            f"'{shown}' answers, but sends no video that can be decoded",
            "Set the camera to H.264, H.265 or MJPEG, or try dapo.latency=default or dapo.transport=udp",
        )
    cause, remedy = CAUSES.get(answer.status, (f"answers {answer.status} {answer.reason}", "See the camera's manual"))
    kind = SourceRefused if answer.status in REFUSED else SourceError
    return kind(f"'{shown}' {cause}", remedy)
