"""The host agent: kernel side, attribution, credentials, approvals, audit; supervises the proxy workers. Runs as
root."""
