"""Every kernel once at small and odd sizes, by the driver alone: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python tests/gpu/sanitize.py

Each buffer is an allocation of its own and of the exact size, so that a read or a write beyond its end is seen.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # the machine may have no install

import checks
from driver import DriverMachine, Machine

from dapo_edge.kernels.pixels import FORMATS
from dapo_edge.kernels.resample import upsample

# Patch rows and columns, width and height of the map: one for each of the map's kernels.
MAPS = {
    "defect_map_4": ((5, 7), (83, 61), 0.5),
    "defect_map_6": ((9, 9), (45, 38), 1.5),
    "defect_map_8": ((12, 12), (50, 33), 2.5),
    "defect_map_any": ((20, 24), (31, 9), 4.0),
}


def run_all(machine: Machine) -> set[str]:
    """Run and compare everything; the names of the kernels that ran. Raises `AssertionError`."""
    ran = set()
    for shape, types in (((1, 4, 49, 64), 20), ((2, 3, 17, 40), 64), ((1, 8, 33, 136), 1), ((1, 2, 40, 32), 3)):
        work, difference = checks.run_patch(machine, shape, types)
        assert difference <= checks.PROBABILITY, (shape, difference)
        ran.add(work.launch.kernel)
    for name, ((rows, columns), (width, height), sigma) in MAPS.items():
        tables = (
            upsample(rows, height, align_corners=True, sigma=sigma),
            upsample(columns, width, align_corners=True, sigma=sigma),
        )
        for batch, types in ((1, 3), (2, 64)):
            maps, found = checks.run_map(machine, checks.random_probs((batch, types + 1, rows, columns)), tables)
            assert found.holds(), (name, batch, types, found)
            ran.add(maps.launch.kernel)
    views = [checks.random_view(pixel_format, (53, 61)) for pixel_format in FORMATS]
    views += [checks.random_view(pixel_format, (120, 91), crop=(1, 3, 119, 88)) for pixel_format in FORMATS]
    for side in (32, 70):
        for dtype in (np.float32, np.float16):
            _, levels = checks.run_preprocess(machine, views, side, dtype)
            assert levels <= checks.GREY_MAX, (side, dtype, levels)
    return {*ran, "preprocess"}


if __name__ == "__main__":
    opened = DriverMachine()
    names = run_all(opened)
    opened.close()
    print(f"all kernels are right: {', '.join(sorted(names))}")
