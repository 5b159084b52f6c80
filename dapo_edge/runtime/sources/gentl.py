"""GenTL producers: a vendor's .cti, through which its cameras are found and opened, whatever cable they hang on.

A process may load a producer only once, so cameras share it. What had to be worked round in harvesters:
- `update()` of its Harvester closes all open cameras, so with any of them open the interfaces are asked one by one;
- waiting inside genicam holds Python's lock, which stops every other camera for that long: nothing here waits there;
- `fetch` throws incomplete buffers away unseen and trusts the wall clock, so events are taken from the stream itself;
- it takes Ctrl-C over, prints traces, and finds no cameras where a .cti is missing or damaged, without an error.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dapo_edge.errors import SourceError, SourceRefused
from dapo_edge.extras import require

PATH_VARIABLE = "GENICAM_GENTL64_PATH"  # by the GenTL standard: folders that hold producers
DISCOVERY_MS = 300  # an interface's cameras answer within this; Python stands still for as long as it takes
_PRODUCERS: dict[Path, Producer] = {}
_REGISTRY = threading.Lock()  # of _PRODUCERS: never held while a producer does anything


def producer_paths(given: Iterable[Path] = ()) -> list[Path]:
    """The .cti files to look into: those `given`, else all in the folders of GENICAM_GENTL64_PATH.

    Raises `SourceRefused` for one that can't be loaded, and when there is none.
    """
    paths = [Path(path) for path in given]
    for path in paths:
        _check(path)
    if paths:
        return paths
    folders = [Path(folder) for folder in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if folder]
    paths = sorted(path for folder in folders for path in folder.glob("*.cti"))
    if not paths:
        where = f"{PATH_VARIABLE}={os.environ[PATH_VARIABLE]} holds none" if folders else f"{PATH_VARIABLE} is not set"
        remedy = "Name your camera vendor's GenTL producer, as in genicam://?cti=/opt/vendor/producer.cti"
        raise SourceRefused(f"no GenTL producer (.cti) is known: {where}", remedy)
    return paths


def _check(path: Path) -> None:
    """Raise `SourceRefused` when `path` is no producer: genicam crashes when it opens another library as one."""
    remedy = "Install your camera vendor's GenTL producer, and give the path of its .cti file"
    if not path.is_file():
        raise SourceRefused(f"the GenTL producer '{path}' is not there", remedy)
    try:
        library = ctypes.CDLL(str(path.absolute()))
    except OSError as error:
        raise SourceRefused(f"the GenTL producer '{path}' can't be loaded ({error})", remedy) from error
    if not hasattr(library, "GCInitLib"):
        raise SourceRefused(f"'{path}' is a library, but no GenTL producer", remedy)


def _harvesters() -> Any:
    with warnings.catch_warnings():  # importing it changes the filters of the whole process
        return require("harvesters.core")


class Producer:
    """A .cti, loaded while somebody has it: shared by all who `acquire` it until the last one calls `release`.

    `lock` is held while a camera is found, opened or closed. Each producer has its own, so that one whose driver waits
    for a network holds up its own cameras only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self._users = 0
        self._open: list[Any] = []
        self._harvester: Any = None

    @classmethod
    def acquire(cls, path: Path) -> Producer:
        """The producer at `path`. Raises `SourceRefused` and `DependencyMissing`."""
        path = path.absolute()
        with _REGISTRY:
            producer = _PRODUCERS.setdefault(path, cls(path))
        with producer.lock:
            if producer._harvester is None:
                producer._harvester = producer._loaded()
            producer._users += 1
        return producer

    def _loaded(self) -> Any:
        _check(self.path)
        core = _harvesters()
        quiet = logging.getLogger("dapo_edge.harvesters")
        quiet.disabled = True
        key = core.ParameterKey
        periods = {key.LOGGER: quiet, key.TIMEOUT_PERIOD_ON_MODULE_ENUMERATION: DISCOVERY_MS}
        harvester = core.Harvester(config=core.ParameterSet(periods))
        harvester.add_file(str(self.path))
        return harvester

    def release(self) -> None:
        """Say that it is no longer needed; the last one unloads it."""
        with self.lock:
            self._users -= 1
            if not self._users:
                harvester, self._harvester = self._harvester, None
                harvester.reset()

    def devices(self) -> list[Any]:
        """The cameras that it reaches now, in use or not: harvesters' `DeviceInfo`, valid until they are asked again.

        Whoever opens one holds `lock` from here on.
        """
        with self.lock:
            harvester = self._harvester
            if not self._open:
                harvester.update()
                if not harvester._systems:
                    cause = f"the GenTL producer '{self.path}' can't be started"
                    raise SourceError(cause, "Check its licence and its vendor's requirements")
            else:
                harvester.device_info_list[:] = self._asked_again()
            return list(harvester.device_info_list)

    def _asked_again(self) -> list[Any]:
        info = _harvesters().DeviceInfo
        found = []
        for interface in self._harvester._ifaces:
            interface.update_device_info_list(DISCOVERY_MS)
            found += [info(module=device, parent=interface) for device in interface.device_info_list]
        return found

    def open(self, device: Any) -> Any:
        """A camera of `devices`, exclusively: harvesters' `ImageAcquirer`. Raises genicam's exceptions."""
        core = _harvesters()
        with self.lock:
            handler = signal.getsignal(signal.SIGINT)
            config = core.ParameterSet({core.ParameterKey.ENABLE_AUTO_CHUNK_DATA_UPDATE: False})
            try:
                camera = self._harvester.create(device, config=config)
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGINT, handler)
            self._open.append(camera)
            return camera

    def close(self, camera: Any) -> None:
        """Stop a camera and give it free."""
        with self.lock:
            self._open.remove(camera)
            try:
                camera.destroy()
            finally:
                self._harvester.image_acquirers.remove(camera)


def text_of(device: Any, name: str) -> str:
    """A property of a `DeviceInfo`; '' where the producer does not know it."""
    try:
        return str(getattr(device, name) or "")
    except Exception:  # genicam raises its own kinds for "not available" and "not implemented"
        return ""
