"""What tests stand on: network namespaces, cgroups, servers, machines, a running gateway. Real ones, made and removed
here."""
