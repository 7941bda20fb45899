"""The bypass suite: every known way past the gateway, tried for real. `scripts/bypass` runs it."""
