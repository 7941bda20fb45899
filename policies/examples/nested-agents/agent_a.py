"""Agent A: a Python program with psycopg. Does the one job it is told and prints what it saw, a JSON value a line.

It has a connection string without a password (SHOP_DSN), and nothing about a gateway in its code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import psycopg

HERE = Path(__file__).parent
READ = "SELECT name, email, card FROM customers ORDER BY id"


def say(**seen: object) -> None:
    print(json.dumps(seen), flush=True)


def run(statement: str) -> None:
    with psycopg.connect(os.environ["SHOP_DSN"]) as connection:
        connection.add_notice_handler(lambda notice: say(notice=notice.message_primary))
        try:
            cursor = connection.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
            say(rows=[list(row) for row in rows], tag=cursor.statusmessage)
        except psycopg.Error as error:
            say(error=error.diag.message_primary or str(error), sqlstate=error.sqlstate, hint=error.diag.message_hint)
            connection.rollback()
            say(alive=connection.execute("SELECT 1").fetchone() == (1,))


def main() -> int:
    match sys.argv[1:]:
        case ["read"]:
            run(READ)
        case ["update"]:
            run("UPDATE orders SET status = 'refunded' WHERE id = 1")
        case ["start-b", job]:
            return subprocess.run(["/bin/sh", HERE / "agent_b.sh", job], check=False).returncode
        case ["start-cleaner"]:
            return subprocess.run([sys.executable, HERE / "cleaner.py"], check=False).returncode
        case ["environment"]:
            say(environment=dict(os.environ))
        case other:
            sys.exit(f"no such job: {other}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
