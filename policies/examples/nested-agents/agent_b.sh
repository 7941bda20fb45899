#!/bin/sh
# Agent B: a shell script with psql, started by agent A.
read_customers="SELECT name, email, card FROM customers ORDER BY id"

case "$1" in
read)
    exec psql -X -At -F '|' -d "$SHOP_DSN" -c "$read_customers"
    ;;
drop)
    # one session: what follows the denial shows that it went on
    exec psql -X -At -d "$SHOP_DSN" -v VERBOSITY=verbose <<SQL
DROP TABLE orders;
SELECT 'still here, ' || count(*) || ' orders' FROM orders;
SQL
    ;;
orphan)
    # double fork into a session of its own; this shell and its child are gone before the orphan connects
    ( setsid sh -c 'sleep 1; psql -X -At -F "|" -d "$SHOP_DSN" -c "$0" >"$ORPHAN_OUTPUT" 2>&1; echo "parent $(ps -o ppid= -p $$)" >>"$ORPHAN_OUTPUT"' "$read_customers" </dev/null >/dev/null 2>&1 & )
    ;;
environment)
    exec env
    ;;
esac
