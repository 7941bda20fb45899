"""The kernel side for real: programs on a cgroup of the test's own, rules in a network namespace of the test's own."""
