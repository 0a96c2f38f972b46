"""What the files of an artifact are known to hold, so that each is hashed once.

A digest counts as long as the file keeps its size, times and inode. They are remembered in `proofs/` of the artifact's own
store, where all who use it know of a damage that one of them met; of a folder that lies elsewhere, beside the digests of
outside files. Nothing is lost with them but time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.store.artifact import (
    MANIFEST,
    FileEntry,
    Manifest,
    changes,
    digest_bytes,
    digest_file,
    intruders,
    seal_of,
)  # fmt: skip
from pipeline.store.digests import SETTLING_SECONDS, cache_file
from pipeline.store.durable import read_json, write_json

Signature = list[int]


def proof_file(folder: Path) -> Path:
    """Where the digests of the artifact in `folder` are remembered."""
    store = folder.parent.parent
    if folder.parent.name == "artifacts" and os.access(store, os.W_OK):
        return store / "proofs" / f"{folder.name}.json"
    return cache_file().parent / "proofs" / f"{digest_bytes(str(folder).encode())[:32]}.json"


def signature(path: Path | str) -> Signature:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@dataclass
class Proof:
    """The digests of one artifact's files: name -> (signature when it was hashed, digest)."""

    folder: Path
    known: dict[str, tuple[Signature, str]] = field(default_factory=dict)
    changed: bool = False

    @classmethod
    def read(cls, folder: Path) -> Proof:
        try:
            block = read_json(proof_file(folder))
            known = {str(name): (list(entry[0]), str(entry[1])) for name, entry in block["files"].items()}
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            known = {}
        return cls(folder, known)

    def remembered(self, path: Path) -> str | None:
        """The digest of a file that has not changed since it was hashed, else None."""
        entry = self.known.get(path.relative_to(self.folder).as_posix())
        return entry[1] if entry and entry[0] == signature(path) else None

    def proven(self, path: Path) -> str:
        """The digest of a file, hashed now unless it is remembered."""
        return self.remembered(path) or self.hashed(path)

    def hashed(self, path: Path) -> str:
        """The digest of a file, hashed now."""
        before = signature(path)
        digest = digest_file(path)
        name = path.relative_to(self.folder).as_posix()
        self.changed = self.changed or self.known.get(name) != (before, digest)
        self.known[name] = (before, digest)
        return digest

    def save(self, files: Mapping[str, FileEntry]) -> None:
        """Remembers what was hashed. A file written just now may change again within the clock's grain: that it is sound
        is not remembered, that it is damaged is."""
        if not self.changed:
            return
        settled = time.time_ns() - int(SETTLING_SECONDS * 1e9)
        kept = {
            name: entry
            for name, entry in self.known.items()
            if name in files and (entry[0][1] < settled or entry[1] != files[name].sha256)
        }
        write_proof(self.folder, kept)


def write_proof(folder: Path, known: Mapping[str, tuple[Signature, str]]) -> None:
    file = proof_file(folder)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"folder": str(folder), "files": known}, survives_power_loss=False)
    except OSError:
        # What cannot be remembered is hashed again.
        return


def remember(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Remembers the files of an artifact that has just been committed: they were hashed for its manifest."""
    write_proof(folder, {name: (signature(folder / name), entry.sha256) for name, entry in files.items()})


def unproven_bytes(folder: Path, manifest: Manifest) -> int:
    """How much `prove` must read."""
    proof = Proof.read(folder)
    return sum(
        entry.size
        for name, entry in manifest.files.items()
        if (folder / name).is_file() and proof.remembered(folder / name) is None
    )


def known_damage(folder: Path, manifest: Manifest) -> dict[str, str]:
    """File -> what is known to be wrong with it, without hashing any."""
    return manifest_changes(folder, manifest) | changes(folder, manifest.files, digest=Proof.read(folder).remembered)


def prove(folder: Path, manifest: Manifest, *, again: bool = False) -> dict[str, str]:
    """File -> what is wrong with it. Files are hashed unless their digest is remembered, or in any case to prove it `again`."""
    proof = Proof.read(folder)
    found = changes(folder, manifest.files, digest=proof.hashed if again else proof.proven)
    proof.save(manifest.files)
    return manifest_changes(folder, manifest) | found


def manifest_changes(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Whether the manifest was changed after the commit."""
    try:
        sound = manifest.seal in (None, seal_of((folder / MANIFEST).read_bytes()))
    except (OSError, ValueError):
        sound = False
    return {} if sound else {MANIFEST: "has other content than when it was written"}


def edits(folder: Path, manifest: Manifest, *, again: bool = False) -> list[str]:
    """Names of the files for which a folder with this manifest is another input than the artifact; empty if it is that."""
    return [*prove(folder, manifest, again=again), *intruders(folder, manifest.files)]


def forget_gone(store: Path, artifact_ids: set[str]) -> None:
    """Removes the digests of artifacts that the store no longer holds."""
    for file in (store / "proofs").glob("*.json"):
        if file.stem not in artifact_ids:
            file.unlink(missing_ok=True)
