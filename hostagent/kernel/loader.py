"""Compiles, loads, attaches and pins the kernel programs, seeds the lineage, and exits: `python -m
hostagent.kernel.loader`.

The only importer of BCC, and a process of its own, because LLVM would otherwise stay resident (about 150 MB). One JSON
object on standard input says what to do (see `LoadRequest`). On failure one line on standard error says what and where,
and what was made is taken off again.

    pins absent                 load, attach, seed; the build number is written last and marks the set complete
    same layout, other build    new programs on the same maps; attached before the old ones go, so that no event is lost

The distribution's `bcc` is pure Python over libbpfcc. It is taken by its own path, so that this works under any
interpreter and nothing else of the distribution's packages gets onto the path; PyPI's `bcc` is something else.

Kernel headers are not needed: BCC is pointed at a tree that consists of the kernel's own BTF, as C, and empty stubs.
The tree is made in a directory of root's own; BCC would otherwise look in a predictable place that others can write to.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from hostagent.kernel import abi, bpf, headers, seed
from hostagent.kernel.pins import remove
from hostagent.kernel.settings import KernelError, LoadRequest

BTF = Path("/sys/kernel/btf/vmlinux")
BPFFS = Path("/sys/fs/bpf")
ITERATOR = "bpf_iter__task"

_BCC_GLOBS = ("python3/dist-packages/bcc", "python3*/site-packages/bcc", "python3*/dist-packages/bcc")
_STUBS = (
    "include/linux/bpf_common.h",
    "include/linux/log2.h",
    "include/linux/types.h",
    "include/linux/version.h",
    "include/uapi/linux/bpf.h",
    "include/uapi/linux/if_packet.h",
    "include/uapi/linux/bpf_common.h",
    "include/asm/page.h",
    "include/linux/compiler_types.h",
)
_KCONFIG = """\
#ifndef HOPGATE_KCONFIG_H
#define HOPGATE_KCONFIG_H
#define CONFIG_BPF_SYSCALL 1
#define _UAPI__LINUX_BPF_H__
#define BPF_NO_PRESERVE_ACCESS_INDEX
#define PAGE_SIZE {page_size}
#define LINUX_VERSION_CODE {version}
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#include "vmlinux.h"
#endif
"""


def main() -> int:
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=LoadRequest)
        load(request)
    except (KernelError, msgspec.DecodeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def load(request: LoadRequest) -> None:
    """Raises `KernelError`."""
    pins = Path(request.pins)
    require_bpffs(pins)
    require_own(Path(request.run_dir))
    bcc = import_bcc()
    if not request.replace:
        pins.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        programs = load_programs(compile_sources(bcc, request))
        write_config(pins, request, build=0)
        attach(programs, pins, Path(request.cgroup))
        if not request.replace:
            with seed.Tasks(programs[ITERATOR]) as tasks:
                seed.seed(pins, tasks)
        write_config(pins, request, build=request.build)
    except BaseException as error:
        if not request.replace:
            remove(pins)
        if isinstance(error, OSError):
            raise KernelError(f"cannot load the kernel programs: {error.strerror or error}") from error
        raise


def require_bpffs(pins: Path) -> None:
    """Mounts bpffs at its usual place if there is none, and refuses a directory that is on no bpffs."""
    if BPFFS.is_dir() and pins.is_relative_to(BPFFS) and not on_bpffs(BPFFS):
        done = subprocess.run(
            ["mount", "-t", "bpf", "-o", "nosuid,nodev,noexec,mode=0700", "bpf", str(BPFFS)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise KernelError(f"cannot mount bpffs on `{BPFFS}`: {done.stderr.strip()}")
    existing = next(parent for parent in (pins, *pins.parents) if parent.exists())
    if not on_bpffs(existing):
        raise KernelError(f"pin directory `{pins}` is not on a bpffs: choose one below `{BPFFS}`")


def require_own(directory: Path) -> None:
    """Makes the directory, and refuses one in which others could put files for the compiler."""
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise KernelError(f"`{directory}` has to belong to root and be writable by nobody else")


def on_bpffs(path: Path) -> bool:
    real = os.path.realpath(path)
    best, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4]
        inside = real == mount or real.startswith(mount.rstrip("/") + "/")
        # of two mounts on one place the later one is on top
        if inside and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind == "bpf"


# --- compile ----------------------------------------------------------------------------------------------------------


def find_bcc() -> Path:
    """The folder of the distribution's `bcc`. Raises `KernelError`."""
    for pattern in _BCC_GLOBS:
        for folder in sorted(Path("/usr/lib").glob(pattern)):
            if (folder / "libbcc.py").is_file():
                return folder
    raise KernelError(
        "no `bcc` of the distribution below `/usr/lib`: install `python3-bpfcc` (`bcc` on PyPI is another package)"
    )


def import_bcc() -> ModuleType:
    folder = find_bcc()
    spec = importlib.util.spec_from_file_location(
        "bcc", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise KernelError(f"cannot import `{folder}`: reinstall `python3-bpfcc`")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        spec.loader.exec_module(module)
    except (ImportError, OSError, SyntaxError) as error:
        raise KernelError(f"cannot import `{folder}`: {error}; reinstall `python3-bpfcc` and `libbpfcc`") from error
    return module


def kernel_types() -> str:
    """The running kernel's types, as C. Raises `KernelError`."""
    if not BTF.exists():
        raise KernelError(f"`{BTF}` is missing: the kernel needs CONFIG_DEBUG_INFO_BTF")
    bpftool = shutil.which("bpftool", path="/usr/sbin:/usr/bin:/sbin:/bin")
    if bpftool is None:
        raise KernelError("`bpftool` is missing: install it")
    done = subprocess.run([bpftool, "btf", "dump", "file", str(BTF), "format", "c"], capture_output=True)
    if done.returncode:
        raise KernelError(f"`bpftool btf dump` failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode()


def make_kernel_source(root: Path, types: str) -> None:
    for stub in _STUBS:
        path = root / stub
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (root / "include/linux/vmlinux.h").write_text(types)
    numbers = [int(part) for part in platform.release().split("-")[0].split(".")[:3] if part.isdigit()]
    major, minor, patch = [*numbers, 0, 0, 0][:3]
    version = (major << 16) + (minor << 8) + min(patch, 255)
    kconfig = _KCONFIG.format(page_size=os.sysconf("SC_PAGE_SIZE"), version=version)
    (root / "include/linux/kconfig.h").write_text(kconfig)


def compile_sources(bcc: ModuleType, request: LoadRequest) -> Any:
    """BCC's module. Creates and pins the maps, or takes those that are pinned already."""
    sizes = request.sizes
    flags = [
        f'-DPINS="{request.pins}"',
        f"-DPROCS_MAX={sizes.procs}",
        f"-DNODES_MAX={sizes.nodes}",
        f"-DGRAVEYARD_MAX={sizes.graveyard}",
        f"-DCONNECTS_MAX={sizes.connects}",
        f"-DSCOPE_MAX={sizes.scope}",
        f"-DEXEMPT_MAX={sizes.exempt}",
        f"-DPASSING_MAX={sizes.passing}",
        f"-DDECLARED_MAX={sizes.declared}",
        f"-DEVENTS_BYTES={sizes.event_bytes}",
        f"-DAGENT_FILES_MAX={sizes.agent_files}",
        f"-DSPARED_MAX={sizes.spared}",
        f"-DUNWATCHED_MAX={sizes.unwatched}",
        "-Wno-everything",
    ]
    source, types = abi.sources(), kernel_types()
    with tempfile.TemporaryDirectory(prefix="kernel-source-", dir=request.run_dir, ignore_cleanup_errors=True) as root:
        os.environ["BCC_KERNEL_SOURCE"] = root
        make_kernel_source(Path(root), headers.shortened(types, source))
        try:
            return _compiled(bcc, source, flags)
        except KernelError:
            # what another kernel or another BCC needs beside, all of it has
            make_kernel_source(Path(root), types)
            return _compiled(bcc, source, flags)


def _compiled(bcc: ModuleType, source: str, flags: list[str]) -> Any:
    try:
        return bcc.BPF(text=source, cflags=flags)
    except OSError:
        raise
    except Exception as error:
        # BCC has no narrower type for it; the compiler's own words are on standard error
        raise KernelError(f"BCC cannot compile the kernel programs: {error}") from error


# --- load and attach --------------------------------------------------------------------------------------------------


def load_programs(module: Any) -> dict[str, int]:
    kinds = dict.fromkeys([*abi.TRACEPOINTS, *abi.TELLING_TRACEPOINTS], module.RAW_TRACEPOINT)
    of_hooks = {bpf.CGROUP_SOCK_OPS: module.SOCK_OPS, bpf.CGROUP_INET_SOCK_CREATE: module.CGROUP_SOCK}
    kinds |= {name: of_hooks[hook] for name, hook in abi.CGROUP_HOOKS.items()}
    kinds |= dict.fromkeys(abi.PACKET_HOOKS, module.CGROUP_SKB)
    kinds[abi.MATCHED] = module.SOCKET_FILTER
    kinds[ITERATOR] = module.TRACING
    programs: dict[str, int] = {}
    for name, kind in kinds.items():
        try:
            programs[name] = module.load_func(name, kind).fd
        except Exception as error:
            # BCC has no narrower type for it
            raise KernelError(f"the kernel refuses program `{name}`: {error}; {_NEEDS[name]}") from error
    return programs


_NEEDS = {
    **dict.fromkeys(
        [*abi.TRACEPOINTS, *abi.TELLING_TRACEPOINTS],
        "it needs CONFIG_BPF_EVENTS and capabilities CAP_BPF and CAP_PERFMON",
    ),
    **dict.fromkeys(
        [*abi.CGROUP_HOOKS, *abi.PACKET_HOOKS],
        "it needs CONFIG_CGROUP_BPF, bpf_get_netns_cookie (Linux 5.15) and CAP_NET_ADMIN",
    ),
    abi.MATCHED: "it needs CONFIG_BPF_SYSCALL and CAP_BPF",
    ITERATOR: "it needs BPF iterators (CONFIG_BPF_EVENTS, CONFIG_DEBUG_INFO_BTF)",
}


def attach(programs: dict[str, int], pins: Path, cgroup: Path) -> None:
    for name, tracepoint in {**abi.TRACEPOINTS, **abi.TELLING_TRACEPOINTS}.items():
        pin(programs[name], pins / f"program_{name}")
        pin(bpf.raw_tracepoint_open(tracepoint, programs[name]), pins / f"link_{name}")
    pin(programs[abi.MATCHED], pins / f"program_{abi.MATCHED}")
    try:
        target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KernelError(f"cannot open cgroup `{cgroup}`: {error.strerror}") from error
    try:
        for name, hook in abi.CGROUP_HOOKS.items():
            pin(programs[name], pins / f"program_{name}")
            pin(bpf.link_create(programs[name], target, hook), pins / f"link_{name}")
        for name, hook in abi.PACKET_HOOKS.items():
            pin(programs[name], pins / f"program_{name}")
            if (pins / f"link_{name}").exists():
                pin(bpf.link_create(programs[name], target, hook), pins / f"link_{name}")
    except OSError as error:
        raise KernelError(f"cannot attach to `{cgroup}`: {error.strerror}; it has to be a cgroup2 directory") from error
    finally:
        os.close(target)


def pin(fd: int, path: Path) -> None:
    """Pins in the place of what was pinned there: for a link this attaches the new before the old is detached."""
    fresh = path.with_name(f"new_{path.name}")
    fresh.unlink(missing_ok=True)
    bpf.object_pin(fd, fresh)
    os.rename(fresh, path)


def write_config(pins: Path, request: LoadRequest, build: int) -> None:
    config = bpf.Map.pinned(pins / "settings", *abi.MAPS["settings"])
    former = abi.Config.from_buffer_copy(config.get(abi.U32.pack(0)) or bytes(ctypes.sizeof(abi.Config)))
    value = abi.Config(
        build=build,
        layout=request.layout,
        netns=request.netns,
        abi=abi.ABI,
        mark=request.mark,
        intercept=former.intercept,
    )
    config.put(abi.U32.pack(0), bytes(value))
    config.close()


if __name__ == "__main__":
    sys.exit(main())
