"""`basler://SERIAL`: a Basler camera through pypylon, or its emulation where PYLON_CAMEMU is set.

`grab=all` is the default: frames come in order from a queue of `buffers` frames, so that what is left out is decided,
and counted, by the policy of the run alone, and no trigger loses its part. `grab=newest` is for those who read slowly
by themselves; what pylon skips then is counted as lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, ClassVar
from urllib.parse import quote

import numpy as np

from dapo_edge.errors import FrameTimeout, SourceError
from dapo_edge.extras import require
from dapo_edge.runtime.sources.features import GenApiNodes, Nodes, whole_number
from dapo_edge.runtime.sources.industrial import OPTIONS, Found, Grab, IndustrialSource, choose
from dapo_edge.runtime.sources.uri import Option
from dapo_edge.structures import Frame

TRIGGER_READY_MS = 200  # a read asks again


def _strategy(text: str) -> str:
    if text not in ("all", "newest"):
        raise ValueError(text)
    return text


class BaslerSource(IndustrialSource):
    """`basler://SERIAL?grab=&trigger=&timeout=&buffers=&ExposureTime=500&PixelFormat=BayerRG8...`

    SERIAL may also be the name that the user gave the camera, and is left out where there is only one.
    """

    own_options: ClassVar = {"grab": Option(_strategy, "all, or newest, which leaves out older frames"), **OPTIONS}

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self._camera: Any = None
        self._tick_ns = 1.0

    def _connect(self, name: str) -> Nodes:
        pylon = require("pypylon.pylon")
        factory = pylon.TlFactory.GetInstance()
        devices = factory.EnumerateDevices()
        found = [_describe(device) for device in devices]
        keys = [(device.GetSerialNumber(), device.GetUserDefinedName(), device.GetFullName()) for device in devices]
        device = devices[choose(found, name, keys, self.uri)]
        self._camera = pylon.InstantCamera(factory.CreateDevice(device))
        # Without this, opening would set triggers and frame rate back to pylon's defaults.
        self._camera.RegisterConfiguration(
            pylon.ConfigurationEventHandler(), pylon.RegistrationMode_ReplaceAll, pylon.Cleanup_Delete
        )
        self._camera.Open()
        nodes = pylon_nodes(self._camera.GetNodeMap())
        ticks_hz = whole_number(nodes, "GevTimestampTickFrequency") or 1_000_000_000
        self._tick_ns = 1e9 / ticks_hz
        return nodes

    def _start(self, buffers: int) -> None:
        pylon = require("pypylon.pylon")
        self._camera.MaxNumBuffer.Value = buffers
        newest = self._options.get("grab") == "newest"
        self._camera.StartGrabbing(pylon.GrabStrategy_LatestImageOnly if newest else pylon.GrabStrategy_OneByOne)

    def _poll(self, wait_s: float) -> Frame | None:
        pylon = require("pypylon.pylon")
        result = self._camera.RetrieveResult(round(wait_s * 1000), pylon.TimeoutHandling_Return)
        try:
            self._check_alive()  # with each frame, because a removed camera may go on delivering
            return self._deliver(self._grab(result)) if result.IsValid() else None
        finally:
            result.Release()

    def _check_alive(self) -> None:
        # Set by pylon's own heartbeat, which goes on whether frames come or not.
        if self._camera.IsCameraDeviceRemoved():
            remedy = "Check cable and power; it is opened again when it is back"
            raise SourceError(f"the camera of '{self.uri}' was removed", remedy)

    def _grab(self, result: Any) -> Grab:
        frame_id, skipped = result.BlockID, result.NumberOfSkippedImages
        if not result.GrabSucceeded():
            reason = result.ErrorDescription.rstrip(".") or f"error {result.ErrorCode:#x}"
            return Grab(np.empty(0, np.uint8), 0, 0, None, frame_id, None, skipped, reason)
        has_rows, pitch = result.GetStride()
        ticks = result.TimeStamp
        return Grab(
            data=np.frombuffer(result.GetImageMemoryView(), np.uint8),
            width=result.Width,
            height=result.Height,
            pitch=pitch if has_rows else None,
            frame_id=frame_id,
            camera_ns=round(ticks * self._tick_ns) if ticks else None,
            skipped=skipped,
        )

    def _execute_trigger(self) -> None:
        pylon = require("pypylon.pylon")
        if not self._camera.WaitForFrameTriggerReady(TRIGGER_READY_MS, pylon.TimeoutHandling_Return):
            cause = f"the camera of '{self.uri}' was not ready for a trigger within {TRIGGER_READY_MS} ms"
            raise FrameTimeout(cause, "Trigger less often, or set a shorter ExposureTime")
        self._camera.ExecuteSoftwareTrigger()

    def _disconnect(self) -> None:
        camera, self._camera = self._camera, None
        if camera is not None:
            with contextlib.ExitStack() as steps:  # each of them, even where the one before fails
                steps.callback(camera.DestroyDevice)
                steps.callback(camera.Close)
                steps.callback(camera.StopGrabbing)

    def _sdk_errors(self) -> tuple[type[Exception], ...]:
        return (require("pypylon.genicam").GenericException,)


def pylon_nodes(node_map: Any) -> GenApiNodes:
    """The features of a pylon node map."""
    genapi = require("pypylon.genicam")

    def find(name: str) -> Any:
        node = node_map.GetNode(name)
        return node if node is not None and node.IsValid() else None

    def spell(name: str) -> str:
        return "".join(word.capitalize() for word in name.split("_"))

    def names() -> Iterable[str]:
        return [node.Node.GetName() for node in node_map.GetNodes()]

    refusals = (genapi.AccessException, genapi.InvalidArgumentException, genapi.OutOfRangeException)
    return GenApiNodes(find, names, refusals, spell)


def find_cameras() -> list[Found]:
    """All Basler cameras that can be reached. Raises `DependencyMissing`."""
    pylon = require("pypylon.pylon")
    return [_describe(device) for device in pylon.TlFactory.GetInstance().EnumerateDevices()]


def _describe(device: Any) -> Found:
    serial = device.GetSerialNumber()
    return Found(f"basler://{quote(serial, safe='')}", device.GetFriendlyName(), serial)
