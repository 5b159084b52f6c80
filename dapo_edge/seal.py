"""The seal of compiled targets: a TensorRT plan is executable code, so a device loads only what it compiled itself.

Whoever can write into a package can put any plan and any hash there, but can't seal them without the device's key.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import shlex
from pathlib import Path
from typing import Any

from dapo_edge.errors import OutputError
from dapo_edge.folders import NotAFile, open_file

KEY_BYTES = 32
KEY_VARIABLE = "DAPO_EDGE_DEVICE_KEY"
_PURPOSE = b"dapo-edge target 1\n"  # a key shared with something else must not make its signatures valid here
_NOT_ON_A_DISK = ("/proc/", "/sys/")  # what lies there looks like a file, and is none
_FORGEABLE = 0o026  # others may not read the key, and nobody but its owner may write it


def key_path() -> Path:
    """Where this device's key lies: DAPO_EDGE_DEVICE_KEY, else the user's data folder. Raises `OutputError`."""
    root = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    named = os.environ.get(KEY_VARIABLE)
    path = Path(os.path.expanduser(named or f"{root}/dapo-edge/device.key"))  # noqa: PTH111 (it may know no home)
    if str(path).startswith("~") or not (named or path.is_absolute()):
        raise OutputError("no home folder is known for the device key", f"Set {KEY_VARIABLE} to a file")
    return path


def seal(content: dict[str, Any]) -> str:
    """HMAC-SHA256 of JSON content with this device's key, hex; the first call makes the key. Raises `OutputError`."""
    return _hmac(_made_key(key_path()), content)


def prepare() -> None:
    """Make this device's key, or read and check it: whatever sealing would raise, raised now. Raises `OutputError`."""
    _made_key(key_path())


def key_here() -> str:
    """Where the key lies, or would be made; makes nothing. Raises `OutputError` for one that can't be used or made."""
    path = key_path()
    try:
        _read_key(path)
    except FileNotFoundError:
        folder = next((above for above in path.absolute().parents if above.exists()), Path("/"))
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(
                f"there is no device key yet, and none can be made in '{folder}'",
                f"Name a file in {KEY_VARIABLE} that can be written",
            ) from None
        return f"{path}, made by the first dapo-edge compile"
    return str(path)


def broken(content: dict[str, Any], found: object) -> str | None:
    """Why `found` is not this device's seal of `content`; None when it is. Raises nothing."""
    try:
        path = key_path()
        key = _read_key(path)
    except FileNotFoundError:
        return "compiled on another device or by another user (there is no device key here)"
    except OutputError as error:
        return f"{error.cause}: {error.remedy}"
    try:
        right = _hmac(key, content)
    except RecursionError:
        return "not compiled here: it is nested more deeply than any target"
    if isinstance(found, str) and hmac.compare_digest(right.encode(), found.encode("ascii", "replace")):
        return None
    return "compiled on another device (or edited): its seal is not of this device's key"


def _hmac(key: bytes, content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, _PURPOSE + text.encode("ascii"), hashlib.sha256).hexdigest()


def _read_key(path: Path) -> bytes:
    """The key, or `FileNotFoundError`, or `OutputError` for one that can't be trusted."""
    another = f"Remove it and compile again, or name another file with {KEY_VARIABLE}"
    try:
        if os.path.realpath(path).startswith(_NOT_ON_A_DISK):
            raise NotAFile(path)
        with open_file(path) as file:
            status, key = os.fstat(file.fileno()), os.read(file.fileno(), KEY_BYTES + 1)
    except FileNotFoundError:
        raise
    except NotAFile as error:
        raise OutputError(f"the device key '{path}' is not a file", f"Name a file in {KEY_VARIABLE}") from error
    except OSError as error:
        raise OutputError(
            f"the device key '{path}' can't be read ({error.strerror})",
            f"Compile as the user who runs, or name a file that both can read with {KEY_VARIABLE}",
        ) from error
    if status.st_mode & _FORGEABLE:
        raise OutputError(
            f"the device key '{path}' can be read or written by others (mode {status.st_mode & 0o777:o})",
            f"If nobody did: chmod 600 {shlex.quote(str(path))}. {another}",
        )
    if len(key) != KEY_BYTES:
        raise OutputError(f"the device key '{path}' has {status.st_size} bytes instead of {KEY_BYTES}", another)
    return key


def _made_key(path: Path) -> bytes:
    """The key; made if there is none. Of several processes that make one, the first wins, for all of them."""
    with contextlib.suppress(FileNotFoundError):
        return _read_key(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(beside, path)  # unlike a rename, it never replaces a key that is there
        finally:
            beside.unlink(missing_ok=True)
        return _read_key(path)
    except OSError as error:
        refused = OutputError.refused(path, error)
        raise OutputError(refused.cause, f"{refused.remedy}; {KEY_VARIABLE} names another file for the key") from error
