"""The sizes of the kernel's maps are the operator's, and what is in them is a metric."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from hostagent.kernel import abi, bpf
from tests.kernel.bed import PORT, bed
from tests.lab.cgroups import cgroup
from tests.lab.hopgate import gateway
from tests.lab.namespaces import namespace


def test_the_use_of_every_map_is_counted() -> None:
    with bed("counted") as made:
        used = made.pins.used()
        assert used.keys() == abi.MAPS.keys() - {"settings", "counters"}
        assert used["connects"] == (0, made.settings.sizes.connects)
        assert used["scope"] == (len(made.scope.ports) + 1, made.settings.sizes.scope)
        for number in range(7):
            made.run(made.command("connect", port=PORT, tag=f"tag-{number}"))
        assert made.pins.used()["connects"][0] == 7
        assert made.pins.used()["nodes"][0] >= 14
        for _ in range(7):
            made.attributed()
        assert made.pins.used()["connects"][0] == 0


def test_a_count_takes_more_than_one_batch() -> None:
    table = bpf.Map(bpf.map_create(1, 4, 600, 20_000), 4, 600)
    try:
        assert table.count() == 0
        for number in range(10_000):
            table.put(abi.U32.pack(number), bytes(600))
        assert table.count() == 10_000
    finally:
        table.close()


def test_the_settings_size_the_maps_and_the_metrics_show_them() -> None:
    sizes = {"map_procs": 5000, "map_nodes": 7000, "map_graveyard": 300, "map_connects": 512}
    with (
        tempfile.TemporaryDirectory(prefix="hopgate-sizes-") as directory,
        namespace() as netns,
        cgroup("sizes") as hooked,
        gateway(Path(directory), namespace=netns, cgroup=hooked, settings=sizes) as running,
    ):
        running.start()
        shown = dict(re.findall(r'^hopgate_map_entries_max\{map="(\w+)"\} (\d+)$', running.cli("metrics").stdout, re.M))
        assert (shown["procs"], shown["nodes"], shown["connects"]) == ("5000", "7000", "512")
        text = running.cli("metrics").stdout
        used = dict(re.findall(r'^hopgate_map_entries\{map="(\w+)"\} (\d+)$', text, re.M))
        assert used.keys() == shown.keys()
        assert 0 < int(used["procs"]) <= int(used["nodes"]) <= 7000
        assert re.search(r"^hopgate_workers 2$", text, re.M)
        assert re.search(r'^hopgate_kernel_events_total\{event="connects"\} \d+$', text, re.M)
        assert running.cli("doctor", check=False).stdout.count("not complete, of another version") == 0
