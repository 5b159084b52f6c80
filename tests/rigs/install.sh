#!/usr/bin/env bash
# The real parts that tests of cameras talk to: servers, emulators and SDKs, from Debian's packages and by pip.
# Usage: tests/rigs/install.sh [python of the environment, default .venv/bin/python]. Needs root for apt.
# The V4L2 rig (make test-slow) is larger: apt-get install qemu-system-x86 busybox-static cpio kmod v4l-utils, then
# python tests/rigs/v4l2_guest.py once, which fetches Debian's kernel into .cache/.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-.venv/bin/python}
as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends \
    python3-gi gir1.2-gst-plugins-base-1.0 gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-{base,good,bad,ugly} \
    openssl glib-networking aravis-tools gir1.2-aravis-0.8 >/dev/null
"$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[genicam,basler]'
