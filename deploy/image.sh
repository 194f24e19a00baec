#!/bin/sh
# Builds one of the Dockerfile's images: deploy/image.sh TARGET [more arguments of the engine's build].
# TARGET is serve, serve-gpu or train; the image is convoy:cpu, convoy:gpu or convoy:train. bulk is serve
# with Ray, for `convoy bulk`: convoy:bulk.
#
# ENGINE is docker, podman or buildah; the default is the first that is installed. Packages come from
# where pip has them from here (its files and PIP_* variables), and a proxy's certificate is taken
# along; both reach the build as secrets, which no layer keeps.
set -eu
cd "$(dirname "$0")/.."
target=$1
shift
engine=${ENGINE:-$(basename "$(command -v docker || command -v podman || command -v buildah ||
    { echo 'one of docker, podman and buildah is needed' >&2; echo none; })")}
case $target in
serve) tag=cpu ;;
serve-gpu) tag=gpu ;;
bulk)
    target=serve tag=bulk
    set -- --build-arg 'SERVE_LOCKS=-r cpu.txt -r bulk.txt' "$@"
    ;;
*) tag=$target ;;
esac
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

secrets=$(mktemp -d)
trap 'rm -rf "$secrets"' EXIT
# name='value' for each setting; the environment's come first. Folders here are not there.
"${PYTHON:-python3}" -m pip config list |
    sed -nE "s/^(:env:|[a-z]+)\.(index-url|extra-index-url|trusted-host|timeout|cert)='(.*)'\$/\2 = \3/p" |
    grep -v 'file:' | awk '!seen[$1]++' >"$secrets/all"
ca=$(sed -n 's/^cert = //p' "$secrets/all")
ca=${ca:-${SSL_CERT_FILE:-}}
{
    echo '[global]'
    grep -v '^cert = ' "$secrets/all" || true
    if [ -n "$ca" ]; then echo 'cert = /run/secrets/ca'; fi
} >"$secrets/pip.conf"

case $engine in
docker) build='docker build' ;;
podman) build='podman build --format docker --layers' ;; # OCI's own format has no HEALTHCHECK
buildah) build='buildah build --format docker --layers' ;;
*) exit 1 ;;
esac
# shellcheck disable=SC2086
$build --target "$target" --tag "convoy:$tag" --tag "convoy:$version-$tag" \
    --secret "id=pip,src=$secrets/pip.conf" ${ca:+--secret "id=ca,src=$ca"} \
    --build-arg "VERSION=$version" --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
    "$@" .
