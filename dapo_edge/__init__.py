"""dapo-edge: defect maps from industrial cameras, per pixel and per defect type, on a CPU or a GPU."""

__version__ = "0.1.0"
