"""`genicam://SERIAL?cti=PATH`: any vendor's camera through its GenTL producer."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np

from dapo_edge.errors import SourceError, SourceRefused
from dapo_edge.extras import require
from dapo_edge.runtime.sources.features import GenApiNodes, Nodes, reason_of
from dapo_edge.runtime.sources.gentl import Producer, producer_paths, text_of
from dapo_edge.runtime.sources.industrial import OPTIONS, Found, Grab, IndustrialSource, choose
from dapo_edge.runtime.sources.uri import Option
from dapo_edge.structures import Frame

POLL_S = 0.001  # waiting inside genicam would hold Python's lock; a look costs 50 us, so 5 % of a core
IMAGE, CHUNK_DATA, MULTI_PART = 1, 4, 10  # PAYLOADTYPE_INFO_IDS of the GenTL standard
_Named = tuple[Found, tuple[str, ...]]  # a camera, and all the names that it goes by
_NAME_KEYS = ("serial_number", "id_", "user_defined_name", "display_name")


def _producer(text: str) -> Path:
    if not text:
        raise ValueError(text)
    return Path(text)


class GenicamSource(IndustrialSource):
    """`genicam://SERIAL?cti=PATH&trigger=&timeout=&buffers=&ExposureTime=500&PixelFormat=BayerRG8...`

    SERIAL may also be the camera's id or the name that the user gave it, and is left out where there is only one
    camera. Without `cti` every producer in GENICAM_GENTL64_PATH is asked.
    """

    own_options: ClassVar = {"cti": Option(_producer, "the path of a GenTL producer"), **OPTIONS}

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._producer: Producer | None = None
        self._camera: Any = None
        self._events: Any = None
        self._pulse: Any = None  # a feature to read, to see whether the camera answers

    def _connect(self, name: str) -> Nodes:
        require("harvesters")
        gentl = require("genicam.gentl")
        given = self._options.get("cti")
        paths = producer_paths([given] if given else [])
        path = paths[0] if len(paths) == 1 else self._producer_of(name, paths)
        self._producer = Producer.acquire(path)
        try:
            with self._producer.lock:
                devices = self._producer.devices()
                self._camera = self._producer.open(devices[self._choice(name, _named(devices, path))])
        except (gentl.ResourceInUseException, gentl.AccessDeniedException) as error:
            cause = f"the camera of '{self.uri}' is in use, here or by another program ({reason_of(error)})"
            remedy = "Close it; where a program was killed, the camera gets free after its heartbeat of some seconds"
            raise SourceError(cause, remedy) from error
        node_map = self._camera.remote_device.node_map
        self._pulse = node_map.get_node("Width") if node_map.has_node("Width") else None
        return genapi_nodes(node_map)

    def _check_alive(self) -> None:
        # Past the cache of features, so that the camera has to answer. Where it does not, Python stands still for as
        # long as its producer waits: once, because then it is lost.
        if self._pulse is not None:
            self._pulse.get_value(ignore_cache=True)

    def _producer_of(self, name: str, paths: list[Path]) -> Path:
        """Of several producers, the one that has the camera."""
        named = [(path, camera) for path in paths for camera in _asked(path)]
        return named[self._choice(name, [camera for _, camera in named])][0]

    def _choice(self, name: str, named: list[_Named]) -> int:
        return choose([found for found, _ in named], name, [names for _, names in named], self.uri)

    def _start(self, buffers: int) -> None:
        self._camera.num_buffers = max(buffers, self._camera.min_num_buffers)
        # Harvesters keeps its events to itself; its own loop over them is what gentl.py speaks of.
        self._events = next(iter(self._camera._new_buffer_event_monitor_dict.values()))
        self._camera.start()

    def _poll(self, wait_s: float) -> Frame | None:
        timeout = require("genicam.gentl").TimeoutException
        end_s = time.monotonic() + wait_s
        while True:
            try:
                self._events.update_event_data(0)
                break
            except timeout:
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return None
                time.sleep(min(POLL_S, left_s))
        buffer = self._events.buffer
        try:
            return self._deliver(self._grab(buffer))
        finally:
            buffer.parent.queue_buffer(buffer)

    def _grab(self, buffer: Any) -> Grab:
        camera_ns = _optional(buffer, "timestamp_ns")
        frame_id = _optional(buffer, "frame_id")
        if not buffer.is_complete():
            return Grab(np.empty(0, np.uint8), 0, 0, None, frame_id, camera_ns, failed="data is missing")
        kind = buffer.payload_type
        if kind not in (IMAGE, CHUNK_DATA, MULTI_PART):
            cause = f"the camera of '{self.uri}' sends no plain pictures (GenTL payload type {kind})"
            raise SourceRefused(cause, "Switch GenDC and compression off in the URI, as in ?GenDCStreamingMode=Off")
        data = np.frombuffer(buffer.raw_buffer, np.uint8)
        if kind == MULTI_PART:  # of a 3D camera, for instance: the first part is the picture
            part = buffer.parts[0]
            image = data[part.data_offset : part.data_offset + part.data_size]
            width, height, padding = part.width, part.height, part.x_padding
        else:
            image = data[_optional(buffer, "image_offset") or 0 :]
            width, height, padding = buffer.width, buffer.height, _optional(buffer, "padding_x") or 0
        assert self._reader is not None
        return Grab(image, width, height, self._reader.row_bytes(width) + padding, frame_id, camera_ns)

    def _execute_trigger(self) -> None:
        self._camera.remote_device.node_map.TriggerSoftware.execute()

    def _disconnect(self) -> None:
        producer, camera = self._producer, self._camera
        self._producer = self._camera = self._events = self._pulse = None
        if producer is None:
            return
        try:
            if camera is not None:
                producer.close(camera)
        finally:
            producer.release()

    def _sdk_errors(self) -> tuple[type[Exception], ...]:
        return (require("genicam.gentl").GenericException, require("genicam.genapi").GenericException)


def genapi_nodes(node_map: Any) -> GenApiNodes:
    """The features of a genicam node map."""
    genapi = require("genicam.genapi")
    refusals = (genapi.AccessException, genapi.InvalidArgumentException, genapi.OutOfRangeException)
    return GenApiNodes(
        find=lambda name: node_map.get_node(name) if node_map.has_node(name) else None,
        names=lambda: [node.node.name for node in node_map.nodes],
        errors=refusals,
        spell=str,
    )


def find_cameras(given: Iterable[Path] = ()) -> list[Found]:
    """Cameras of the producers `given`, else of all in GENICAM_GENTL64_PATH.

    Raises `DependencyMissing`, `SourceRefused` (no producer) and `SourceError`.
    """
    require("harvesters")
    return [found for path in producer_paths(given) for found, _ in _asked(path)]


def _asked(path: Path) -> list[_Named]:
    """The cameras of a producer."""
    producer = Producer.acquire(path)
    try:
        with producer.lock:
            return _named(producer.devices(), path)
    finally:
        producer.release()


def _named(devices: list[Any], path: Path) -> list[_Named]:
    return [(_describe(device, path, devices), tuple(text_of(device, key) for key in _NAME_KEYS)) for device in devices]


def _describe(device: Any, path: Path, all_devices: list[Any]) -> Found:
    serial, name = text_of(device, "serial_number"), text_of(device, "id_")
    is_unique = [text_of(other, "serial_number") for other in all_devices].count(serial) == 1
    uri = f"genicam://{quote(serial if serial and is_unique else name, safe='')}?cti={quote(str(path))}"
    model = f"{text_of(device, 'vendor')} {text_of(device, 'model')}".strip() or name
    in_use = text_of(device, "access_status") in ("4", "5", "6")  # busy, or open here: DEVICE_ACCESS_STATUS_LIST
    return Found(uri, f"{model} ({name})", serial, "in use" if in_use else "")


def _optional(buffer: Any, name: str) -> int | None:
    """A property that not every producer knows."""
    try:
        return int(getattr(buffer, name))
    except require("genicam.gentl").GenericException:
        return None
