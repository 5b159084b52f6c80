"""Packaging. The core runs nothing by itself: choose [cpu] or [gpu] to inspect, [build] to make packages."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "dapo_edge/__init__.py").read_text().splitlines() if "__version__" in line
)

CORE = [
    "numpy>=1.26",
    "pillow>=10.1",
    "pyyaml>=6",
    "pydantic>=2.7",
    "safetensors>=0.4.3",
    "click>=8.1",
    "rich>=13",
    "threadpoolctl>=3.1",
    "typing_extensions>=4.6",
]
REPORT = ["matplotlib>=3.8", "jinja2>=3.1"]
EXTRAS = {
    # An ARM board such as a Jetson brings its own OpenCV (with GStreamer): a second one would shadow it.
    "cpu": ["openvino>=2024.4", "opencv-python-headless>=4.8; platform_machine != 'aarch64'"],
    "build": ["torch>=2.6", "torchvision", "open_clip_torch>=3.3", "onnx>=1.16", *REPORT],
    "report": REPORT,  # the pages of `bench --report` on a device that builds nothing
    # Cameras. What comes from the system besides: apt install gir1.2-aravis-0.8 python3-gi (aravis://).
    "genicam": ["harvesters>=1.4.3,<1.5", "genicam>=1.6"],  # genicam brings a producer to try it with from 1.6 on
    "basler": ["pypylon>=26.9"],
    # TensorRT is detected, never installed from here: it belongs to the device.
    "gpu": [
        "pycuda>=2024.1",
        "onnx>=1.16",
        "nvidia-ml-py>=12.535",
        "opencv-python-headless>=4.8; platform_machine != 'aarch64'",
    ],
    "peers": ["onnxruntime>=1.20"],  # what benchmarks/peers.py compares with, besides torch and OpenVINO
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "scipy>=1.11",
        "scikit-learn>=1.4",
        "scikit-image>=0.24",
        "ruff>=0.6",
        "mypy>=1.11",
        "types-PyYAML",
        "nvidia-cuda-nvrtc-cu12==12.6.*; sys_platform == 'linux'",  # compiles the kernels as JetPack 6 does, GPU or not
    ],
}

setup(
    name="dapo-edge",
    version=VERSION,
    description="Zero-shot defect maps on edge devices: per pixel, per defect type, from a camera stream",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dapo_edge", "dapo_edge.*"]),
    package_data={
        "dapo_edge": [
            "assets/*",
            "models/configs/*.json",
            "models/*.yaml",
            "*.j2",
            "bench/*.j2",
            "evaluation/*.j2",
            "engine/*.j2",
            "data/*.yaml",
            "data/defects/*.yaml",
            "kernels/*.cu",
            "kernels/*.cuh",
            "py.typed",
        ]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dapo-edge = dapo_edge.cli_start:main"]},
)
