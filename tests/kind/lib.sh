# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that source this use the names
# Shared by tools, node-image, redis-image, up, down and check: names, versions, paths and small helpers.

: "${here:?the folder of the scripts}"
k8s_version=$(awk '$1 == "k8s.io/kubernetes" {print $2}' "$here/mod/k8s/go.mod")
cluster=${LARDER_KIND_CLUSTER:-larder-kind}
cache=${LARDER_KIND_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/larder-kind}
bin=$cache/bin
node_image=larder-kind/node:$k8s_version
export KUBECONFIG=${LARDER_KIND_KUBECONFIG:-$cache/kubeconfig}
export KIND_EXPERIMENTAL_PROVIDER=docker
usual_path=$PATH

# nodes: "built" where the cluster's nodes are made from packages, "published" where they are kind's own, as `up` found out.
nodes() { cat "$cache/nodes" 2>/dev/null || echo built; }

# use_nodes: speak to the docker that runs, or is to run, the nodes, by the tools that belong to it.
use_nodes() {
  if [[ $(nodes) == built ]]; then
    export DOCKER_BUILDKIT=0 DOCKER_HOST=${LARDER_KIND_DOCKER_HOST:-unix://$cache/docker.sock} PATH=$bin:$PATH
  fi
}
use_nodes

log() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
  log "$*"
  exit 1
}

# measure LABEL COMMAND...: run the command at low priority, then log its wall time and the
# highest sum of resident memory that was seen over its session (sampled twice a second).
measure() {
  local label=$1 start=$SECONDS peak=0 now pid status=0
  shift
  setsid nice "$@" &
  pid=$!
  trap 'kill -- -'"$pid"' 2>/dev/null || true' EXIT
  while kill -0 "$pid" 2>/dev/null; do
    now=$(ps -s "$pid" -o rss= | awk '{s += $1} END {print int(s / 1024)}') || true # it may be gone by now
    if ((now > peak)); then peak=$now; fi
    sleep 0.5
  done
  wait "$pid" || status=$?
  trap - EXIT
  log "$label: $((SECONDS - start)) s, peak ${peak} MiB, exit status $status"
  mkdir -p "$cache"
  printf '%s\t%s\t%d\t%d\t%d\n' "$(date -u +%FT%TZ)" "$label" "$((SECONDS - start))" "$peak" "$status" >>"$cache/timings.tsv"
  return "$status"
}

# mirror: the Debian mirror that this machine's own apt is configured with.
mirror() {
  # shellcheck disable=SC2016 # apt expands it
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Component: main' | head -n 1
}

# module_version MOD PATH: the version of module PATH that mod/MOD pins.
module_version() { go list -C "$here/mod/$1" -m -f '{{.Version}}' "$2"; }

# module_dir MOD PATH: where the module cache holds module PATH, one of those that mod/MOD pins.
module_dir() {
  go mod download -C "$here/mod/$1" "$2" >&2
  go list -C "$here/mod/$1" -m -f '{{.Dir}}' "$2"
}

# fetch_root SUITE DIR PACKAGE...: unpack packages of a Debian suite, and all that they depend on,
# into DIR. No maintainer script runs: this is a place to copy programs from, not a system.
fetch_root() {
  local suite=$1 dir=$2 state=$cache/apt/$1 deb name
  shift 2
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
  : >"$state/status"
  printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
    "$(mirror)" "$suite" >"$state/sources.list"
  cat >"$state/apt.conf" <<CONF
Dir::Etc::sourcelist "$state/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Sandbox::User "root";
Dir::State::lists "$state/lists";
Dir::State::status "$state/status";
Dir::Cache "$state/cache";
CONF
  APT_CONFIG=$state/apt.conf apt-get update -qq
  rm -f "$state/cache/archives/"*.deb
  APT_CONFIG=$state/apt.conf apt-get install -qq --no-install-recommends --download-only "$@" >/dev/null
  rm -rf "$dir"
  for name in bin sbin lib lib64; do
    mkdir -p "$dir/usr/$name"
    ln -s "usr/$name" "$dir/$name"
  done
  for deb in "$state/cache/archives/"*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$dir"
  done
}

# stage ROOT DIR FILE...: copy programs or libraries of ROOT into DIR, with what they link to.
stage() {
  local root=$1 dir=$2 file
  shift 2
  for file; do
    printf '%s\n' "$file"
    chroot "$root" /lib64/ld-linux-x86-64.so.2 --list "$file" | sed -nE 's|.*[[:space:]](/[^ ]+) \(0x.*|\1|p'
  done | sort -u | (cd "$root" && sed 's/^/./' | xargs cp -L --parents -t "$dir")
}

# shell ROOT DIR: put busybox and a link for each of its commands into DIR.
shell() {
  local command
  mkdir -p "$2/bin"
  cp "$1/bin/busybox" "$2/bin/busybox"
  "$2/bin/busybox" --list | while read -r command; do
    [[ -e $2/bin/$command ]] || ln -s busybox "$2/bin/$command"
  done
}

# image NAME DIR [CHANGE]...: make DIR a one-layer image. A CHANGE is a Dockerfile instruction.
image() {
  local name=$1 dir=$2 change flags=()
  shift 2
  for change in 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' "$@"; do
    flags+=(--change "$change")
  done
  tar -C "$dir" --numeric-owner -c . | docker import "${flags[@]}" - "$name" >/dev/null
}

# docker_up: start a dockerd of our own when none answers at DOCKER_HOST. It is not the machine's
# usual one, because it needs the runtime runc-fit; it makes no docker0 bridge, and takes its
# networks from a range that another dockerd does not use by default.
docker_up() {
  local i
  if [[ $(nodes) == published ]] || docker info >/dev/null 2>&1; then return; fi
  mkdir -p "$cache"
  install "$here/runc-fit" "$cache/runc-fit" # dockerd outlives a checkout
  for ((i = 0; i < 60; i++)); do # one that is stopping must be gone first
    if ! kill -0 "$(cat "$cache/dockerd.pid" 2>/dev/null || true)" 2>/dev/null; then break; fi
    sleep 0.5
  done
  log "starting dockerd, log $cache/dockerd.log"
  # Not with the tools' own containerd and shim anywhere in the PATH: they are of another version than Debian's.
  PATH=${PATH//"$bin:"/} setsid dockerd --host "$DOCKER_HOST" --data-root "$cache/docker" --exec-root "$cache/docker-exec" \
    --pidfile "$cache/dockerd.pid" --bridge none --default-address-pool base=172.30.0.0/16,size=24 \
    --add-runtime "fit=$cache/runc-fit" --default-runtime fit \
    </dev/null >"$cache/dockerd.log" 2>&1 &
  for ((i = 0; i < 60; i++)); do
    if docker info >/dev/null 2>&1; then return; fi
    sleep 0.5
  done
  die 'dockerd did not start'
}

have_image() { docker image inspect "$1" >/dev/null 2>&1; }

# image_of NAME DOCKERFILE FILE...: build larder-kind/NAME from a Dockerfile and the files that it copies, as :dev and under a tag
# that changes with the content, so that nodes take the new one; load both into the cluster, and print the latter name.
image_of() {
  local name=larder-kind/$1 dockerfile=$2 context tag
  shift 2
  tag=$(cat "$dockerfile" "$@" | sha256sum | cut -c 1-12)
  if ! have_image "$name:$tag"; then
    context=$(mktemp -d)
    cp "$@" "$context/"
    docker build --quiet --file "$dockerfile" --tag "$name:$tag" --tag "$name:dev" "$context" >/dev/null
    rm -r "$context"
  fi
  load "$name:$tag" "$name:dev"
  printf '%s\n' "$name:$tag"
}

# load IMAGE...: put images into the cluster's nodes, unless LARDER_KIND_LOAD=no.
load() {
  if [[ ${LARDER_KIND_LOAD:-yes} != no ]]; then
    kind load docker-image --quiet --name "$cluster" "$@" >&2
  fi
}

# python_root DIR REQUIREMENT...: make DIR a root with Debian's Python, a shell and packages from the index, for user 10001.
python_root() {
  local dir=$1 pip=$cache/pip
  shift
  fetch_root bookworm "$dir" python3 busybox-static
  ln -sf busybox "$dir/bin/sh"
  mkdir -p "$dir"/{etc,tmp,app}
  chmod 1777 "$dir/tmp"
  printf 'root:x:0:0:root:/:/bin/sh\nuser:x:10001:10001::/app:/bin/sh\n' >"$dir/etc/passwd"
  printf 'root:x:0:\nuser:x:10001:\n' >"$dir/etc/group"
  rm -rf "$dir"/usr/share/{doc,man,info,lintian,locale}
  [[ -x $pip/bin/pip ]] || python3 -m venv "$pip"
  # For the Python of the root, whatever the one here is; async-timeout is what redis needs before 3.11.3, which pip judges by the one here.
  "$pip/bin/pip" install --quiet --disable-pip-version-check --target "$dir/usr/lib/python3/dist-packages" --only-binary :all: \
    --implementation cp --python-version 3.11 --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 async-timeout "$@" >&2
}
