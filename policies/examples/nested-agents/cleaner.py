"""The cleaner: an agent that may delete orders on its own, and may not when agent A, which may not, has started it."""

import json
import os

import psycopg

with psycopg.connect(os.environ["SHOP_DSN"], autocommit=True) as connection:
    try:
        done = connection.execute("DELETE FROM orders WHERE status = 'stale'")
        print(json.dumps({"tag": done.statusmessage}))
    except psycopg.Error as error:
        print(json.dumps({"error": error.diag.message_primary, "sqlstate": error.sqlstate}))
