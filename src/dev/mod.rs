//! One machine, no Kubernetes: the same manifests as real processes on loopback.
