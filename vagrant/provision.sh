#!/bin/bash
# Makes a fresh Debian the machine of the scenario: Hopgate installed as on a runner, a PostgreSQL with TLS and SCRAM in the network
# namespace `database`, and the agents of policies/examples/nested-agents for the user `runner`. As root; repeatable.
#
#   provision.sh [DIRECTORY]   installs from the wheels in DIRECTORY, else builds one from this checkout
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
agents=/opt/agents
shop=/var/lib/shop

say() { printf 'provision: %s\n' "$*" >&2; }

install_packages() {
    local missing
    mapfile -t missing < <(comm -13 <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' | sed -n 's/^installed //p' | sort -u) \
        <(sort "$checkout/vagrant/packages"))
    [ "${#missing[@]}" -gt 0 ] || return 0
    say "packages: ${missing[*]}"
    if ! dpkg-query -W postgresql-common >/dev/null 2>&1; then
        mkdir -p /etc/postgresql-common
        echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    apt-get -qq -y install --no-install-recommends "${missing[@]}" >/dev/null
}

# The runner is 192.0.2.1, the database 192.0.2.10: a link between them and nothing else.
make_network() {
    cat >/etc/systemd/system/shop-network.service <<'UNIT'
[Unit]
Description=Network namespace of the shop's database
Before=network.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/ip netns add database
ExecStart=/usr/bin/ip link add shop type veth peer name eth0 netns database
ExecStart=/usr/bin/ip address add 192.0.2.1/24 dev shop
ExecStart=/usr/bin/ip link set shop up
ExecStart=/usr/bin/ip -netns database address add 192.0.2.10/24 dev eth0
ExecStart=/usr/bin/ip -netns database link set eth0 up
ExecStart=/usr/bin/ip -netns database link set lo up
ExecStop=/usr/bin/ip netns delete database

[Install]
WantedBy=multi-user.target
UNIT
    cat >/etc/systemd/system/shop-database.service <<UNIT
[Unit]
Description=The shop's database
Requires=shop-network.service
After=shop-network.service

[Service]
Type=notify
User=postgres
NetworkNamespacePath=/run/netns/database
RuntimeDirectory=shop
ExecStart=$(pg_bindir)/postgres -D $shop/data

[Install]
WantedBy=multi-user.target
UNIT
}

pg_bindir() { find /usr/lib/postgresql -mindepth 2 -maxdepth 2 -name bin | sort -V | tail -n 1; }

as_postgres() { runuser -u postgres -- "$@"; }

# A certificate authority of the shop's own; Hopgate verifies the server against it by name.
make_certificates() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj '/CN=the shop' \
        -keyout ca.key -out ca.pem
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj '/CN=db.shop.example' -keyout server.key -out server.csr
    openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 30 -out server.pem \
        -extfile <(printf 'subjectAltName = DNS:db.shop.example, IP:192.0.2.10\n')
}

make_database() {
    [ ! -d "$shop/data" ] || return 0
    say "database"
    install -d -o postgres -g postgres -m 0700 "$shop"
    (cd "$shop" && make_certificates) >/dev/null 2>&1
    chown postgres:postgres "$shop"/*
    install -D -m 644 "$shop/ca.pem" /etc/hopgate/shop-ca.pem
    as_postgres "$(pg_bindir)/initdb" -D "$shop/data" --auth=scram-sha-256 --auth-local=peer --no-locale -E UTF8 >/dev/null
    cat >>"$shop/data/postgresql.conf" <<CONF
listen_addresses = '192.0.2.10'
unix_socket_directories = '/run/shop'
password_encryption = 'scram-sha-256'
ssl = on
ssl_cert_file = '$shop/server.pem'
ssl_key_file = '$shop/server.key'
CONF
    printf '%s\n' 'local all postgres peer' 'hostssl shop shop_app 0.0.0.0/0 scram-sha-256' >"$shop/data/pg_hba.conf"
    systemctl enable --quiet --now shop-network.service shop-database.service
    local password
    password=$(openssl rand -hex 24)
    # By standard input: a command line is for everybody to read.
    as_postgres psql -q -X -v ON_ERROR_STOP=1 -h /run/shop -d postgres <<SQL
CREATE ROLE shop_app LOGIN PASSWORD '$password';
CREATE DATABASE shop OWNER shop_app;
\c shop
SET ROLE shop_app;
\i $agents/shop.sql
SQL
    (umask 077 && printf 'user: shop_app\npassword: "%s"\n' "$password" >/etc/hopgate/credentials/shop)
}

install_packages
"$checkout/scripts/install" "$@"
id runner >/dev/null 2>&1 || useradd --system --create-home --shell /bin/bash runner
rm -rf "$agents"
cp -r "$checkout/policies/examples/nested-agents" "$agents"
chmod -R a+rX "$agents"
make_network
systemctl daemon-reload
make_database
install -m 644 "$agents"/policy*.yaml /etc/hopgate/policy.d/
say "starting hopgate"
systemctl enable --quiet hopgate.service
systemctl restart hopgate.service
say "done: try $checkout/vagrant/scenario.sh"
