"""The settings file: strict, and every mistake is told with its line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hostagent.kernel import KernelError, MapSizes
from hostagent.settings import Settings, SettingsError, load


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    path = tmp_path / "hopgate.yaml"
    path.write_text("# nothing\n")
    settings = load(path)
    assert settings == Settings()
    assert (settings.listen_port, settings.state_dir, settings.cgroup) == (301, Path("/var/lib/hopgate"), None)
    assert settings.recordings_dir == Path("/var/lib/hopgate/recordings")
    assert settings.control_socket == Path("/run/hopgate/control.sock")


def test_every_key_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hopgate.yaml"
    path.write_text(
        "cgroup: /sys/fs/cgroup/jobs\nworker_cgroup: auto\nworker_user: gate\nworkers: 2\nlisten_port: 1234\n"
        "policy_dir: /p\nstate_dir: /s\nrun_dir: /r\npin_dir: /b\ncredentials_dir: /c\noffer_tls: false\n"
        "log_level: debug\nmap_procs: 1000\nmap_event_bytes: 8192\n"
    )
    assert load(path) == Settings(
        cgroup=Path("/sys/fs/cgroup/jobs"),
        worker_cgroup=None,
        worker_user="gate",
        workers=2,
        listen_port=1234,
        policy_dir=Path("/p"),
        state_dir=Path("/s"),
        run_dir=Path("/r"),
        pin_dir=Path("/b"),
        credentials_dir=Path("/c"),
        offer_tls=False,
        log_level="debug",
        maps={"procs": 1000, "event_bytes": 8192},
    )


def test_every_map_has_its_size_in_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "hopgate.yaml"
    sizes = dataclasses.asdict(MapSizes())
    path.write_text("".join(f"map_{name}: {size}\n" for name, size in sizes.items()))
    assert MapSizes.of(load(path).maps) == MapSizes()
    path.write_text("map_nodes: 10\nmap_graveyard: 10\n")
    with pytest.raises(KernelError, match="graveyard has to be smaller than nodes"):
        MapSizes.of(load(path).maps)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("workers: 1\nlisten-port: 2\n", 2, "unknown key `listen-port`"),
        ("workers: 1\n\nworkers: 2\n", 3, "`workers` is given twice"),
        ("workers: many\n", 1, "`workers` is `many`: expected a whole number from 0 to 256"),
        ("workers: true\n", 1, "expected a whole number"),
        ("workers: 1.5\n", 1, "expected a whole number"),
        ("listen_port: 70000\n", 1, "from 1 to 65535"),
        ("map_procs: 0\n", 1, "from 1 to 16777216"),
        ("map_proc: 1\n", 1, "unknown key `map_proc`"),
        ("state_dir: var/lib\n", 1, "expected an absolute path"),
        ("cgroup: jobs\n", 1, "expected `auto` or an absolute path"),
        ("cgroup:\n", 1, "expected `auto` or an absolute path"),
        ("offer_tls: 'no'\n", 1, "expected true or false"),
        ("log_level: loud\n", 1, "expected one of debug, info"),
        ("worker_user: Robert'); --\n", 1, "expected the name of a user"),
        ("# x\nworkers: [1]\n", 2, "`workers` has to be a single value"),
        ("- a\n", 1, "have to be a mapping"),
        ("a: b: c\n", 1, "bad YAML"),
        ("x: 'open\n\n", 3, "bad YAML"),
        ("x: \x07\n", 1, "bad YAML"),
        ("workers: !!python/object:os.system 1\n", 1, "expected a plain value"),
        ("{a}: 1\n", 1, "unknown key"),
        ("[" * 60_000, 1, "bad YAML"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = tmp_path / "hopgate.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as raised:
        load(path)
    told = str(raised.value)
    assert told.startswith(f"{path}:{line}: ")
    assert message in told
    assert "\n" not in told


def test_a_missing_or_huge_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file or directory; name the file with --config"):
        load(tmp_path / "absent.yaml")
    path = tmp_path / "huge.yaml"
    path.write_text("#" * 70_000)
    with pytest.raises(SettingsError, match="larger than"):
        load(path)
