#!/bin/bash
# The nested agents against the installed service (scenario.py), and then what only an installed service can promise. As root, on a
# machine that provision.sh has made.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wrong=0

# row PROMISE EXPECTED SEEN: SEEN has to contain EXPECTED.
row() {
    local verdict=ok
    [[ $3 == *"$2"* ]] || { verdict=WRONG; wrong=$((wrong + 1)); }
    printf '%-44s │ %-24s │ %s │ %s\n' "$1" "$2" "${3//$'\n'/ }" "$verdict"
}

# A client outside any agent; -w: it never asks for a password, so what the server itself would ask for is an error.
client() {
    timeout 30 /usr/sbin/runuser -u runner -- env -i PATH=/usr/bin:/bin \
        psql -X -At -w -d 'host=192.0.2.10 dbname=shop user=shop_app sslmode=require connect_timeout=5' -c 'SELECT 1' 2>&1 || true
}

# What there is of Hopgate on the machine: rules, sets, pins, programs on cgroups, and the tracepoint programs.
traces() {
    { iptables-save; ip6tables-save; } | grep -i -E 'hopgate' || true
    ipset list -name | grep -i hopgate || true
    find /sys/fs/bpf -mindepth 1 -iname '*hopgate*'
    bpftool cgroup tree | grep sock_ops || true
}

# As agent A: waits for a file, then lets a child of its own connect.
EARLY_AGENT='
import os, subprocess, sys, time
deadline = time.monotonic() + 60
while not os.path.exists(sys.argv[1]) and time.monotonic() < deadline:
    time.sleep(0.1)
dsn = "host=192.0.2.10 dbname=shop user=agent sslmode=require"
count = "SELECT count(*) || $$ customers$$ FROM customers"
subprocess.run(["psql", "-X", "-At", "-w", "-d", dsn, "-c", count])
'

python3 "$here/scenario.py"
echo

row "systemd has started it again" NRestarts=1 "$(systemctl show -p NRestarts hopgate)"
row "a reload leaves it running" active "$(systemctl reload hopgate && systemctl is-active hopgate)"
row "there is something to clean up" sock_ops "$(traces | grep -v -e '^-A' -e '^:')"
systemctl stop hopgate
row "stopped: closed, not open" refused "$(client)"
row "hopgate cleanup" "" "$(hopgate cleanup 2>&1)"
row "cleanup leaves nothing" nothing "$(found=$(traces); echo "${found:-nothing}")"
before=$(mktemp -d)
chmod 711 "$before"
trap 'rm -rf "$before"' EXIT
printf '%s' "$EARLY_AGENT" >"$before/agent_a.py"
/usr/sbin/runuser -u runner -- /usr/bin/python3 "$before/agent_a.py" "$before/go" >"$before/seen" 2>&1 &
row "the server is reached, and wants a password" "no password supplied" "$(client)"
systemctl start hopgate
row "started again: the gate is closed again" unattributed "$(client)"

touch "$before/go"
wait
row "an agent that was there before is known" "2 customers" "$(cat "$before/seen")"

[ "$wrong" -eq 0 ] || { printf '%d promises of the service were not kept\n' "$wrong"; exit 1; }
printf 'all promises of the service were kept\n'
