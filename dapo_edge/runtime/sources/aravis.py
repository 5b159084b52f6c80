"""`aravis://NAME`: GigE Vision and USB3 Vision cameras without a vendor's SDK, through the LGPL library Aravis.

The second choice after a vendor's producer (`genicam://`), which is tuned to its cameras; but it is in every Debian and
Ubuntu, and it is on ARM boards for which a vendor has none.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any
from urllib.parse import quote

import numpy as np

from dapo_edge.errors import DependencyMissing, SourceError
from dapo_edge.runtime.sources.features import Nodes
from dapo_edge.runtime.sources.industrial import Found, Grab, IndustrialSource, choose
from dapo_edge.structures import Frame

PACKAGES = "apt install python3-gi gir1.2-aravis-0.8, and a venv with --system-site-packages"


def library() -> Any:
    """The Aravis namespace. Raises `DependencyMissing`."""
    try:
        importlib.import_module("gi").require_version("Aravis", "0.8")
        return importlib.import_module("gi.repository.Aravis")
    except (ImportError, ValueError) as error:  # ValueError: no such namespace
        raise DependencyMissing(f"Aravis can't be imported ({error})", f"Install it: {PACKAGES}") from error


class AravisSource(IndustrialSource):
    """`aravis://NAME?trigger=&timeout=&buffers=&ExposureTime=500&PixelFormat=BayerRG8...`

    NAME is an address (192.168.1.20), a serial number, or the id that `dapo-edge cameras list` shows; it is left out
    where there is only one camera.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._camera: Any = None
        self._nodes: AravisNodes | None = None
        self._stream: Any = None
        self._control_lost = threading.Event()

    def _connect(self, name: str) -> Nodes:
        aravis = library()
        self._control_lost.clear()
        self._camera = aravis.Camera.new(name if _is_address(name) else self._find(aravis, name))
        device = self._camera.get_device()
        if hasattr(device, "is_controller") and not device.is_controller():
            cause = f"the camera of '{self.uri}' is in use by another program"
            remedy = "Close it; where a program was killed, the camera gets free after its heartbeat of some seconds"
            raise SourceError(cause, remedy)
        device.set_range_check_policy(aravis.RangeCheckPolicy.ENABLE)
        device.set_access_check_policy(aravis.AccessCheckPolicy.ENABLE)
        device.connect("control-lost", lambda _: self._control_lost.set())
        self._nodes = AravisNodes(aravis, device, self._sdk_errors())
        return self._nodes

    def _find(self, aravis: Any, name: str) -> str:
        devices = _devices(aravis)
        keys = [(identity, serial, address) for identity, serial, address, _ in devices]
        return devices[choose([_describe(*device) for device in devices], name, keys, self.uri)][0]

    def _start(self, buffers: int) -> None:
        aravis = library()
        self._stream = self._camera.create_stream(None, None)
        payload = self._camera.get_payload()
        for _ in range(buffers):
            self._stream.push_buffer(aravis.Buffer.new_allocate(payload))
        self._camera.start_acquisition()

    def _check_alive(self) -> None:
        # Set by Aravis' own heartbeat, which goes on whether frames come or not.
        if self._control_lost.is_set():
            cause = f"the camera of '{self.uri}' does not answer any more"
            raise SourceError(cause, "Check cable, power and network; it is opened again when it is back")

    def _poll(self, wait_s: float) -> Frame | None:
        # A wait of 0 would mean a millennium in this call.
        buffer = self._stream.timeout_pop_buffer(max(1, round(wait_s * 1e6)))
        if buffer is None:
            return None
        try:
            # Nothing of a frame arrived in a cleared one, as at a start in mid-frame: ids tell whether one was lost.
            is_empty = buffer.get_status() == library().BufferStatus.CLEARED
            return None if is_empty else self._deliver(self._grab(buffer))
        finally:
            self._stream.push_buffer(buffer)

    def _grab(self, buffer: Any) -> Grab:
        status, frame_id = buffer.get_status(), buffer.get_frame_id()
        if status != library().BufferStatus.SUCCESS:
            return Grab(np.empty(0, np.uint8), 0, 0, None, frame_id, failed=status.value_nick.replace("-", " "))
        width, height = buffer.get_image_width(), buffer.get_image_height()
        assert self._reader is not None
        padding, _ = buffer.get_image_padding()
        pitch = self._reader.row_bytes(width) + padding
        data = np.frombuffer(buffer.get_image_data(), np.uint8)
        return Grab(data, width, height, pitch, frame_id, buffer.get_timestamp() or None)

    def _execute_trigger(self) -> None:
        self._camera.software_trigger()

    def _disconnect(self) -> None:
        camera, nodes = self._camera, self._nodes
        self._camera = self._nodes = self._stream = None
        if nodes is None:
            return
        device = nodes.release()
        if not self._control_lost.is_set():
            camera.stop_acquisition()
            if hasattr(device, "leave_control"):
                device.leave_control()

    def _sdk_errors(self) -> tuple[type[Exception], ...]:
        library()
        return (importlib.import_module("gi.repository.GLib").Error,)


class AravisNodes:
    """The features of a camera. See `Nodes`."""

    def __init__(self, aravis: Any, device: Any, errors: tuple[type[Exception], ...]) -> None:
        self._aravis = aravis
        self._device = device
        self._errors = errors

    def release(self) -> Any:
        """Let go of the camera, and return it: an error that is kept somewhere must not keep the camera, too."""
        device, self._device = self._device, None
        return device

    def names(self) -> list[str]:
        """See `Nodes`."""
        found: list[str] = []
        categories = ["Root"]
        while categories:
            node = self._device.get_feature(categories.pop())
            for name in node.get_features() if isinstance(node, self._aravis.GcCategory) else ():
                is_category = isinstance(self._device.get_feature(name), self._aravis.GcCategory)
                (categories if is_category else found).append(name)
        return found

    def has(self, name: str) -> bool:
        """See `Nodes`."""
        return self._device.get_feature(name) is not None

    def get(self, name: str) -> str | None:
        """See `Nodes`."""
        node = self._device.get_feature(name)
        try:
            return None if node is None else str(node.get_value_as_string())
        except self._errors:
            return None

    def set(self, name: str, text: str) -> None:
        """See `Nodes`."""
        node = self._device.get_feature(name)
        try:
            if isinstance(node, self._aravis.GcCommand):
                node.execute()
            elif isinstance(node, self._aravis.GcBoolean):
                node.set_value(text in ("1", "true"))
            else:
                node.set_value_from_string(text)
        except self._errors as error:
            if getattr(error, "domain", "") != "arv-gc-error-quark":  # the camera did not answer
                raise
            raise ValueError(getattr(error, "message", str(error))) from error

    def valid(self, name: str) -> str:
        """See `Nodes`."""
        node, arv = self._device.get_feature(name), self._aravis
        if isinstance(node, arv.GcCommand):
            return "a command: write =1"
        if isinstance(node, arv.GcEnumeration):
            return f"one of {', '.join(self._device.dup_available_enumeration_feature_values_as_strings(name))}"
        if isinstance(node, arv.GcBoolean):
            return "0 or 1"
        bounds = (self._device.get_integer_feature_bounds, self._device.get_float_feature_bounds)
        for ask in bounds:
            try:
                low, high = ask(name)
            except self._errors:
                continue
            return f"a number from {low:g} to {high:g}"
        return "a text"


def find_cameras() -> list[Found]:
    """All GigE Vision and USB3 Vision cameras that Aravis reaches. Raises `DependencyMissing`."""
    return [_describe(*device) for device in _devices(library())]


def _devices(aravis: Any) -> list[tuple[str, str, str, str]]:
    """Id, serial number, address and model of each camera."""
    aravis.update_device_list()
    return [
        (
            aravis.get_device_id(index),
            aravis.get_device_serial_nbr(index) or "",
            aravis.get_device_address(index) or "",
            f"{aravis.get_device_vendor(index)} {aravis.get_device_model(index)}",
        )
        for index in range(aravis.get_n_devices())
    ]


def _describe(identity: str, serial: str, address: str, model: str) -> Found:
    return Found(f"aravis://{quote(identity, safe='')}", f"{model} ({address})", serial)


def _is_address(name: str) -> bool:
    """Whether `name` can be connected to at once: finding cameras takes a second."""
    parts = name.split(".")
    return len(parts) == 4 and all(part.isdigit() for part in parts)
