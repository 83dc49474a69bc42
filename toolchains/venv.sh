#!/bin/sh
# venv.sh FOLDER: a virtual environment with pip, also on a Debian without python3-venv, and without root.
set -eu
venv=$1
python=${PYTHON:-python3}
if "$python" -m venv "$venv" >/dev/null 2>&1; then exit 0; fi
rm -rf "$venv"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing Debian's python3-venv" >&2
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
    exec "$python" -m venv "$venv"
fi
# Without root: pip's own wheel out of Debian's package, unpacked here.
echo "python3-venv is not installed: taking pip out of Debian's python3-pip-whl" >&2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
(cd "$scratch" && apt-get download -qq python3-pip-whl && dpkg-deb -x python3-pip-whl_*.deb .) || {
    echo "no pip to be had: ask the administrator for apt install python3-venv" >&2
    exit 1
}
"$python" -m venv --without-pip "$venv"
wheel=$(echo "$scratch"/usr/share/python-wheels/pip-*.whl)
"$venv/bin/python" "$wheel/pip" install --quiet pip
