"""Real V4L2 devices where the machine has none: the kernel's `vivid` driver in a virtual machine of QEMU.

The guest boots a Debian kernel, sees the host's files read-only by 9p with a throw-away layer on top, and runs one
script there with the host's own Python. `python tests/rigs/v4l2_guest.py` fetches the kernel, 70 MB, once, and makes
the boot image, both into .cache/.
"""

from __future__ import annotations

import gzip
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "v4l2_guest"
INSTALL = "run: apt-get install -y --no-install-recommends qemu-system-x86 busybox-static cpio kmod v4l-utils"
PROGRAMS = ("qemu-system-x86_64", "busybox", "cpio", "modprobe", "v4l2-ctl")
BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
MEMORY_MB = 2048
LIMIT_S = 300.0  # 20 s on an idle machine, much more on a busy one
EXIT_MARK = "guest script ended with"

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mkdir -p /proc /sys /dev /host /layer /new
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose host /host
mount -t tmpfs tmpfs /layer; mkdir /layer/upper /layer/work
mount -t overlay overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work /new
for place in proc sys dev; do mount -o bind /$place /new/$place; done
script=$(sed 's/.*guest_script=\\([^ ]*\\).*/\\1/' /proc/cmdline)
chroot /new /bin/sh $script
echo "MARK $?"
poweroff -f
""".replace("MARK", EXIT_MARK)


@dataclass(frozen=True)
class Result:
    """What the script in the guest said."""

    code: int | None  # its exit status; None when the guest did not get so far
    output: str


def need() -> None:
    """Skip the test when a part is missing."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("the guest is made for Linux on x86-64")
    if lacking := [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]:
        pytest.skip(f"{', '.join(lacking)} not installed; {INSTALL}")
    if not (CACHE / "boot.gz").is_file():
        pytest.skip(f"no kernel with vivid; run: python {Path(__file__).resolve().relative_to(ROOT)}")


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where modprobe is


def run(script: str, folder: Path) -> Result:
    """Run a shell script in the guest as root, with `vivid` not loaded yet; `folder` is where it is put for that.

    `$MODPROBE` in the script loads the modules of the guest's kernel.
    """
    kernel, version = _kernel()
    path = folder / "guest.sh"
    path.write_text(f"export PATH={shlex.quote(_path())}\nMODPROBE='modprobe -d {kernel} -S {version}'\n{script}")
    command = [
        *("qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max", "-m", str(MEMORY_MB), "-smp", "1"),
        *("-nodefaults", "-no-reboot", "-nographic", "-serial", "stdio"),
        *("-kernel", str(kernel / "boot" / f"vmlinuz-{version}"), "-initrd", str(CACHE / "boot.gz")),
        *("-append", f"console=ttyS0 no_timer_check panic=-1 quiet guest_script={path}"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
    _, mark, rest = output.partition(EXIT_MARK)
    return Result(int(rest.split()[0]) if mark and rest.split() else None, output)


def _kernel() -> tuple[Path, str]:
    kernel = CACHE / "kernel"
    return kernel, next((kernel / "lib" / "modules").iterdir()).name


def prepare() -> None:
    """Fetch the kernel package of this Debian and make the boot image."""
    kernel = CACHE / "kernel"
    if not kernel.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        depends = subprocess.check_output(["apt-cache", "depends", "linux-image-amd64"], text=True)
        package = next(word for word in depends.split() if word.startswith("linux-image-") and word[12].isdigit())
        subprocess.run(["apt-get", "download", package], cwd=CACHE, check=True)
        archive = next(CACHE.glob("linux-image-*.deb"))
        subprocess.run(["dpkg", "-x", archive, kernel.with_suffix(".new")], check=True)
        kernel.with_suffix(".new").rename(kernel)
        archive.unlink()
    _, version = _kernel()
    environment = {**os.environ, "PATH": _path()}
    subprocess.run(["depmod", "-b", kernel, version], check=True, env=environment)
    image = CACHE / "image"
    shutil.rmtree(image, ignore_errors=True)
    for name in ("bin", "modules"):
        (image / name).mkdir(parents=True)
    shutil.copy(str(shutil.which("busybox")), image / "bin" / "busybox")
    order = []
    for module in BOOT_MODULES:
        command = ["modprobe", "--show-depends", "-d", kernel, "-S", version, module]
        for line in subprocess.check_output(command, text=True, env=environment).splitlines():
            kind, _, path = line.strip().partition(" ")
            name = Path(path.split()[0]).name
            if kind == "insmod" and name not in order:
                order.append(name)
                shutil.copy(path.split()[0], image / "modules" / name)
    (image / "modules" / "order").write_text("\n".join(order))
    (image / "init").write_text(INIT)
    (image / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(image)) for path in sorted(image.rglob("*")))
    packed = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), cwd=image, stdout=subprocess.PIPE, check=True
    ).stdout
    (CACHE / "boot.gz").write_bytes(gzip.compress(packed))


if __name__ == "__main__":
    prepare()
