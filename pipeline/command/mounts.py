"""Which filesystem a path lies on, by the kernel's table of mounts."""

from __future__ import annotations

from pathlib import Path


def read_mounts() -> str:
    """The kernel's table of mounts; empty where there is none."""
    try:
        return Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""


def mount_of(path: Path, mounts: str) -> tuple[str, str, str] | None:
    """(device, mount point, type) of the filesystem that holds `path`; the last of equally deep ones covers the others."""
    found = None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        device, point, kind = (unescape(field) for field in fields[:3])
        deeper = found is None or len(Path(point).parts) >= len(Path(found[1]).parts)
        if path.is_relative_to(point) and deeper:
            found = (device, point, kind)
    return found


def unescape(field: str) -> str:
    """A field of the table of mounts, in which blanks stand as octal numbers."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, character)
    return field
