#!/bin/sh
# setup.sh run|image|demo|test: make this Debian machine able to run podlane, to build its image, or for demo or tests.
# Idempotent; says what it installs. Needs root, apt and pip; no kernel headers, no other network.
set -eu
cd "$(dirname "$0")/.."
for_what=${1:?run, image, demo or test}

# bcc with its LLVM (not on PyPI), libbpf, UAPI headers; a C library small enough for the static launcher.
packages="python3-venv python3-bpfcc libbpf1 linux-libc-dev musl-tools gcc make iproute2"
extras=
case $for_what in
run) ;;
image) packages="$packages mmdebstrap" ;;
demo)
    # A real container runtime, the loopback plugin that it insists on, and an image's worth of programs.
    packages="$packages containerd runc containernetworking-plugins busybox-static"
    extras="[demo]"
    ;;
test)
    # podman is another client of CNI, with runc as well.
    packages="$packages containerd runc containernetworking-plugins busybox-static podman
        iputils-ping iperf3 strace tcpdump prometheus clang-format bpftool iptables procps curl mmdebstrap"
    # What renders the manifests; whoever has a kubectl keeps it.
    command -v kubectl >/dev/null || packages="$packages kubernetes-client"
    extras="[demo,test,lint]"
    ;;
*) echo "setup.sh: $for_what: not one of run, image, demo, test" >&2 && exit 2 ;;
esac

missing=
for package in $packages; do
    dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    echo "setup: installing Debian packages:$missing"
    # Only the programs are wanted: no service of theirs may start on this machine.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        trap 'exit 130' INT # dash runs the EXIT trap at exit only, not when a signal ends it
        trap 'exit 143' TERM
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of words
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

# Debian's own Python, for it alone sees Debian's bcc.
python=build/venv/bin/python
[ -x $python ] || /usr/bin/python3 -m venv --system-site-packages build/venv
stamp="build/venv/.$for_what"
if [ ! "$stamp" -nt pyproject.toml ]; then
    echo "setup: installing Python packages: podlane$extras"
    $python -m pip install --quiet --disable-pip-version-check --editable ".$extras"
    touch "$stamp"
fi
