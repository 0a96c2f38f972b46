"""What this machine has, what it lacks, and what to install: one line per finding.

Loads no torch itself: versions are read from the installed packages' metadata, and what needs torch (devices, ranks
that talk) is asked of `launch.probe` in processes of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TextIO

from packaging.requirements import Requirement

from pipeline.command.asking import Answer, Ask, ask
from pipeline.command.mounts import mount_of, read_mounts
from pipeline.errors import EXIT_DONE, EXIT_USER_ERROR
from pipeline.settings.paths import nearest_there
from pipeline.settings.resources import usable_cores
from pipeline.settings.strict import CHECKOUT
from pipeline.store.disk import MOVE

PROBE = "launch.probe"


PROBE_TIMEOUT_SECONDS = 120.0


MINIMUM_PYTHON = (3, 11)


ROOMY_BYTES = 20 * 2**30
"""Below this much free disk a warning is due: a checkpoint of a model of a billion parameters takes about 16 GiB."""


STALE_BUILD_SECONDS = 600.0


NAMED_LIBRARIES = ("torch", "transformers", "deepspeed")
"""The libraries that get a line of their own; the others share one where all is well."""


INSTALL = "Run `make environment`, or pip install -c constraints.txt -e ."


SHARED_FILESYSTEMS = frozenset(
    "nfs nfs4 lustre gpfs beegfs ceph glusterfs wekafs panfs orangefs pvfs2 afs cifs smb3 ocfs2 gfs2 virtiofs 9p".split()
)


PASSING_FILESYSTEMS = {
    "tmpfs": "memory: gone after a restart",
    "overlay": "a container's own layer: gone with the container",
}


OPTIONAL = {
    "flash-attn": "faster attention, and packing that keeps documents apart",
    "liger-kernel": "fused kernels",
    "bitsandbytes": "8-bit optimizers",
}
"""Parts that need a CUDA device -> what they are for. They come with the extra `cuda`."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "warn", "missing"]
    subject: str
    what: str
    hint: str = ""
    required: bool = True
    """Whether Slipway cannot do without it, in case it is missing."""

    def __str__(self) -> str:
        optional = "" if self.required or self.state != "missing" else "optional: "
        return f"{self.state:<8} {self.subject:<12} {optional}{self.what}{'. ' if self.hint else ''}{self.hint}"


def examine(found: Iterable[Finding], stream: TextIO) -> int:
    """Writes a line per finding to `stream`, each as soon as it is known. Returns 0, or 2 if something required is missing."""
    missing = 0
    for finding in found:
        print(finding, file=stream, flush=True)
        missing += finding.state == "missing" and finding.required
    verdict = (
        "nothing required is missing"
        if not missing
        else f"{missing} required {plural(missing, 'part is', 'parts are')} missing"
    )
    print(verdict, file=stream)
    return EXIT_USER_ERROR if missing else EXIT_DONE


def findings(folder: Path, ask: Ask = ask) -> Iterator[Finding]:
    """What there is to say of this machine, with a store in `folder`."""
    yield python_finding(sys.version_info[:3])
    yield from library_findings(required_libraries(), installed_version)
    probed = ask([sys.executable, "-m", PROBE, "devices"], PROBE_TIMEOUT_SECONDS)
    yield from device_findings(probed, usable_cores(), memory_bytes())
    num_devices = len(probed.value["devices"]) if probed.value else 0
    if probed.value:
        yield ranks_finding(num_devices, ask)
    yield from disk_findings(folder)
    yield filesystem_finding(folder, read_mounts())
    yield compiler_finding()
    yield from stale_build_findings(extensions_folder(), time.time())
    yield from optional_findings(num_devices, installed_version)


def findings_where_jobs_are_submitted(folder: Path) -> Iterator[Finding]:
    """Those that matter on a machine that trains nothing itself, as the login node of a cluster."""
    yield python_finding(sys.version_info[:3])
    yield from library_findings(required_libraries(), installed_version)
    yield from disk_findings(folder)
    yield filesystem_finding(folder, read_mounts())


def plural(number: int, one: str, several: str) -> str:
    return one if number == 1 else several


def gibibytes(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# Python and libraries


def python_finding(version: tuple[int, ...]) -> Finding:
    text = ".".join(str(part) for part in version)
    if version[:2] < MINIMUM_PYTHON:
        return Finding("missing", "Python", f"{text} is too old", "Install 3.11 or newer.")
    return Finding("ok", "Python", f"{text} at {sys.executable}")


def required_libraries() -> list[Requirement]:
    """What pyproject.toml asks for: the one place where the versions stand."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(line) for line in project["dependencies"]]
    return [r for r in requirements if r.marker is None or r.marker.evaluate()]


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def library_findings(requirements: Sequence[Requirement], version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    """A line for each library that is named above, missing, or outside its window; one for all the others."""
    others = 0
    for requirement in sorted(requirements, key=lambda r: r.name not in NAMED_LIBRARIES):
        name, version = requirement.name, version_of(requirement.name)
        window = ",".join(sorted(map(str, requirement.specifier), reverse=True)) or "any version"
        if version is None:
            yield Finding("missing", name, f"is not installed; needed: {window}", INSTALL)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding("missing", name, f"{version} is there; needed: {window}", INSTALL)
        elif name in NAMED_LIBRARIES:
            yield Finding("ok", name, f"{version} (needed: {window})")
        else:
            others += 1
    if others:
        yield Finding("ok", "libraries", f"{others} more, each within the versions that pyproject.toml names")


# Devices and ranks


def device_findings(answer: Answer, num_cores: int, memory: int) -> Iterator[Finding]:
    cpu = f"{num_cores} cores, {gibibytes(memory)} of memory" if memory else f"{num_cores} cores"
    if answer.value is None:
        yield Finding("missing", "devices", f"torch cannot be loaded: {answer.error}", INSTALL)
        return
    build, devices = answer.value["built_for_cuda"], answer.value["devices"]
    if devices:
        names = "; ".join(f"{device['name']}, {gibibytes(device['memory_bytes'])}" for device in devices)
        precision = "bfloat16" if answer.value["bfloat16"] else "no bfloat16: use float16 or float32"
        yield Finding("ok", "devices", f"{len(devices)} x CUDA {build}: {names}; {precision}; {cpu}")
    elif Path("/dev/nvidiactl").exists() and build is None:
        hint = "Install a CUDA build of torch: see its website's selector."
        yield Finding(
            "warn", "devices", f"there is an NVIDIA driver, and this torch is built for CPUs only; {cpu}", hint
        )
    elif Path("/dev/nvidiactl").exists():
        hint = "Look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES."
        yield Finding(
            "warn", "devices", f"there is an NVIDIA driver, and torch (CUDA {build}) finds no device; {cpu}", hint
        )
    else:
        yield Finding("ok", "devices", f"no CUDA device, training runs on the CPU: {cpu}")


def ranks_finding(num_devices: int, ask: Ask) -> Finding:
    """Whether two processes can add up their ranks: with nccl where there are two GPUs, else with gloo."""
    backend = "nccl" if num_devices >= 2 else "gloo"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    answer = ask([*torchrun, "-m", PROBE, "ranks", backend], PROBE_TIMEOUT_SECONDS)
    if answer.value == {"rank": 0, "size": 2, "sum": 1}:
        return Finding("ok", "ranks", f"two processes added up a number with {backend} in {answer.seconds:.1f} s")
    wrong = answer.error or f"two processes added 0 and 1 to {answer.value}"
    hints = {
        "gloo": "Does this host's name resolve (`getent hosts $(hostname)`)? If not, set GLOO_SOCKET_IFNAME=lo.",
        "nccl": "Run with NCCL_DEBUG=INFO to see why; NCCL_P2P_DISABLE=1 tells whether it is the link between the GPUs.",
    }
    return Finding("missing", "ranks", f"two processes cannot talk with {backend}: {wrong}", hints[backend])


def memory_bytes() -> int:
    """The machine's memory, or what a container may use of it; 0 where that cannot be told."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
    try:
        return min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return size


# Disk


def disk_findings(folder: Path) -> Iterator[Finding]:
    place = nearest_there(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding("missing", "disk", f"the store {folder} cannot be written", MOVE)
        return
    free = shutil.disk_usage(place).free
    if free < ROOMY_BYTES:
        hint = "Enough for small models only: `slipway gc` makes room, --store names another place."
        yield Finding("warn", "disk", f"{gibibytes(free)} free for the store {folder}", hint)
    else:
        yield Finding("ok", "disk", f"{gibibytes(free)} free for the store {folder}")


def filesystem_finding(folder: Path, mounts: str) -> Finding:
    mount = mount_of(nearest_there(folder).resolve(), mounts)
    if mount is None:
        return Finding(
            "warn", "filesystem", "its kind cannot be told here", "Several nodes need a store that all of them see."
        )
    device, point, kind = mount
    if kind.removeprefix("fuse.") in SHARED_FILESYSTEMS or kind.startswith("fuse."):
        return Finding("ok", "filesystem", f"{kind} at {point} from {device}: shared, if the other nodes mount it too")
    what = f"{kind} at {point}: {PASSING_FILESYSTEMS.get(kind, 'local to this machine')}"
    return Finding("warn", "filesystem", what, "Enough for one node; several need a store that all of them see.")


# What DeepSpeed compiles


def compiler_finding() -> Finding:
    """DeepSpeed compiles its own kernels at their first use. No packaged memory layout uses one; other layouts may."""
    lacking = []
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "c++", "clang++")):
        lacking.append("a C++ compiler (Debian: g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        lacking.append("Python's headers (Debian: python3-dev)")
    if not (shutil.which("ninja") or Path(sys.executable).with_name("ninja").exists()):
        lacking.append("ninja (pip install ninja)")
    if lacking:
        needed = "Only memory layouts of your own that use DeepSpeed's compiled kernels need it."
        return Finding("missing", "compiler", f"not there: {', '.join(lacking)}", needed, required=False)
    return Finding("ok", "compiler", "C++ compiler, ninja and Python's headers, should DeepSpeed compile a kernel")


def extensions_folder() -> Path:
    """Where torch keeps what it compiles: as for torch, `~` stays as it is where nobody knows whose home that is."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions"))


def stale_build_findings(folder: Path, now: float) -> Iterator[Finding]:
    """A build that was killed leaves its lock behind, and every later one waits for it without a word."""
    for lock in sorted(folder.glob("**/lock")) if folder.is_dir() else []:
        age = now - lock.stat().st_mtime
        if age > STALE_BUILD_SECONDS:
            what = f"{lock} is {age / 3600:.1f} h old: a build was killed, and whoever needs its result waits for ever"
            yield Finding("warn", "compiler", what, "Remove the file.")


# Optional parts


def optional_findings(num_devices: int, version_of: Callable[[str], str | None]) -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        if version := version_of(name):
            yield Finding("ok", name, f"{version} ({purpose})")
        elif num_devices:
            yield Finding("missing", name, f"{purpose}; no stage uses it yet", required=False)
        else:
            yield Finding("missing", name, f"{purpose}; of use with a CUDA device only", required=False)
    if version := version_of("vllm"):
        yield Finding("ok", "vllm", f"{version} (serving)")
    else:
        hint = "Install it in an environment of its own: it wants another compressed-tensors than llmcompressor."
        yield Finding("missing", "vllm", "serves the models that are made here", hint, required=False)
    if version := version_of("trl"):
        yield Finding("ok", "trl", f"{version} (the tests compare losses with it)")
    else:
        hint = "pip install -c constraints.txt -e '.[dev]'"
        yield Finding("missing", "trl", "the tests compare losses with it", hint, required=False)
