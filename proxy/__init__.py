"""The data path: wire protocols, policy, masks and recordings. Runs unprivileged, in worker processes."""
