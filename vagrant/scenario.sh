#!/bin/bash
# Runs the nested agents against the installed service, and says for each promise what is expected and what is seen. As root, on a
# machine that provision.sh has made. The last row takes Hopgate's hooks and rules off; `systemctl start hopgate` puts them back.
set -euo pipefail

agents=/opt/agents
dsn='host=192.0.2.10 dbname=shop user=agent sslmode=require'
work=$(mktemp -d)
chmod 711 "$work"
trap 'rm -rf "$work"' EXIT
wrong=0

# row NAME EXPECTED SEEN: EXPECTED is text that SEEN has to contain; `a & b` wants both, a leading `!` wants its absence.
row() {
    local name=$1 expected=$2 seen=${3//$'\n'/ } verdict=ok part
    while IFS= read -r part; do
        case $part in
            !*) [[ $seen != *"${part#!}"* ]] || verdict=WRONG ;;
            *) [[ $seen == *"$part"* ]] || verdict=WRONG ;;
        esac
    done <<<"${expected// & /$'\n'}"
    [ "$verdict" = ok ] || wrong=$((wrong + 1))
    printf '%-38s │ %-46s │ %-70s │ %s\n' "$name" "$expected" "${seen:0:${SEEN_WIDTH:-160}}" "$verdict"
}

# As the user `runner`, who has no password of anything: what a job of the pipeline prints.
job() { timeout 60 runuser -u runner -- env -i PATH=/usr/bin:/bin HOME=/home/runner LANG=C.UTF-8 SHOP_DSN="$dsn" ORPHAN_OUTPUT="$work/runner/orphan" "$@" 2>&1 || true; }
pipeline() { job "$agents/pipeline.sh" "$@"; }
shell() { job psql -X -At -d "$dsn" -c "SELECT count(*) FROM customers"; }

# until_seen PATTERN COMMAND...: the output of the command, as soon as it matches, or its last after 30 s.
until_seen() {
    local pattern=$1 output='' i
    shift
    for ((i = 0; i < 150; i++)); do
        output=$("$@" 2>&1 || true)
        [[ $output =~ $pattern ]] && break
        sleep 0.2
    done
    printf '%s' "$output"
}

# What is on the machine of Hopgate: rules, sets, pins, programs on a cgroup.
traces() {
    { iptables-save; ip6tables-save; } | grep -i -E 'hopgate|15432' || true
    ipset list -name | grep -i hopgate || true
    find /sys/fs/bpf -mindepth 1 -iname '*hopgate*' || true
    bpftool cgroup tree 2>/dev/null | grep -E 'sock_ops|connect' || true
}

held_update() {
    pipeline update >"$work/update" &
    local id
    id=$(until_seen 'hold|approval' cat "$work/update" | grep -oE 'approve [A-Za-z0-9-]+' | head -n 1 | cut -d ' ' -f 2)
    hopgate approve "$id" >"$work/approve" 2>&1 || cat "$work/approve"
    wait $!
    cat "$work/update"
}

install -d -o runner "$work/runner"
printf '%-38s │ %-46s │ %-70s │ %s\n' promise expected seen verdict

row "the service is up" "active" "$(systemctl is-active hopgate)"
row "agent A reads clear values" "Ada & ada@example.com & 4111111111111111" "$(pipeline read)"
row "agent B reads the same masked" "Ada & !ada@example.com & !4111111111111111" "$(pipeline start-b read)"
row "agent B may not drop a table" "42501 & agent-b & still here, 3 orders" "$(pipeline start-b drop)"
row "A's child may not do what A may not" "42501" "$(pipeline start-cleaner)"
row "an update waits for a human" "UPDATE 1" "$(held_update)"
pipeline start-b orphan >/dev/null
row "an orphan is still B under A" "Ada & !ada@example.com & parent 1" "$(until_seen 'parent' cat "$work/runner/orphan")"
row "a shell outside any agent is denied" "unattributed" "$(shell)"

systemctl kill -s KILL hopgate
row "killed with -9: the next is refused" "refused & !password" "$(shell)"
row "the service survives kill -9" "Ada & 4111111111111111" "$(until_seen Ada pipeline read)"
row "systemd has restarted it once" "NRestarts=1" "$(systemctl show -p NRestarts hopgate)"

systemctl reload hopgate
row "a reload keeps it serving" "Ada" "$(pipeline read)"
row "the recordings are whole" "0" "$(hopgate audit verify >"$work/verify" 2>&1 && echo 0 || cat "$work/verify")"

secret=$(sed -n 's/^password: "\(.*\)"/\1/p' /etc/hopgate/credentials/shop)
places() {
    journalctl --no-pager | grep -c "$secret" || true
    grep -rl "$secret" /var/lib/hopgate /run/hopgate /home/runner "$work" || true
    pipeline environment | grep "$secret" || true
    pipeline start-b environment | grep "$secret" || true
}
row "the password is nowhere" "0" "$(places)"

systemctl stop hopgate
row "stopped: refused, not open" "refused & !password" "$(shell)"
hopgate cleanup
row "cleanup leaves nothing" "nothing" "$(found=$(traces); echo "${found:-nothing}")"
row "and the database is there as before" "password" "$(shell)"

[ "$wrong" -eq 0 ] || { printf '\n%d promises were not kept\n' "$wrong"; exit 1; }
printf '\nevery promise was kept\n'
