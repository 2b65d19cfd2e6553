# Larder's image: both binaries, built beforehand, on a base that is empty unless an argument says otherwise.
#
#   docker build --build-arg BASE=REPOSITORY:TAG -f Dockerfile DIRECTORY
#
# DIRECTORY holds `larder` and `larderd`. On an empty base they must be linked statically (each by
# `cargo rustc --release --bin NAME -- -C target-feature=+crt-static`; larderd, which runs in every pod, is smaller with
# `--no-default-features --features data-plane`), and there are no public certificate authorities: origins whose certificates such
# an authority signed need a base that brings them.
ARG BASE=scratch
FROM ${BASE}
# Not at /larder: pods of servers mount the directory there into which `larderd agent install` copies the agent.
COPY larder /bin/larder
COPY larderd /larderd
# Not root, and a number, so that runAsNonRoot can be checked. Nothing is written: the root may be mounted read-only.
USER 65532:65532
ENTRYPOINT ["/bin/larder"]
