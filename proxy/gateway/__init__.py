"""The only sockets of the data path: worker process, listener, session, upstream, TLS, and the link to the host
agent."""
