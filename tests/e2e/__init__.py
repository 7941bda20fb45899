"""Real clients, unchanged, against a real server, through the whole product."""
