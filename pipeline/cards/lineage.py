"""What an artifact was made from, read from the manifests that lie beside each other in a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ArtifactError
from pipeline.recipe.recipe import HUB
from pipeline.stage import BASE_ROLES, Result
from pipeline.store.artifact import Facts, Kind, read_manifest
from pipeline.store.job import Job

OUTSIDE_ID = "sha256:"
"""How the id of a folder from outside begins, which says what it holds. That of a model of the hub begins with `HUB`."""


@dataclass(frozen=True)
class Link:
    """One artifact of a chain, or one thing from outside that it begins with."""

    id: str
    folder: Path | None = None
    """Where it lies; None where it is not on this machine."""
    stage: str | None = None
    """What made it; None from outside, or where its manifest is gone."""
    kind: Kind | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Role -> id."""
    source_digests: Mapping[str, str] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def base_role(self) -> str | None:
        """The role of the model that it goes on from."""
        return next((role for role in BASE_ROLES if role in self.inputs), None)

    @property
    def repository(self) -> tuple[str, str] | None:
        """(repository, revision) of a model of the hub."""
        name, _, revision = self.id.removeprefix(HUB).partition("@")
        return (name, revision) if self.id.startswith(HUB) else None

    @property
    def name(self) -> str:
        """What a card calls it: the same on every machine."""
        if self.repository:
            return f"{self.repository[0]} at revision {self.repository[1][:12]}"
        if self.id.startswith(OUTSIDE_ID):
            return f"a folder from outside, {self.id[: len(OUTSIDE_ID) + 12]}"
        return f"{self.stage or 'an artifact'} {self.id[:12]}"


@dataclass(frozen=True)
class Lineage:
    """An artifact and everything that it was made from."""

    own: Link
    links: Mapping[str, Link]
    """Id -> link, its own among them, each after what it was made from."""

    def base_chain(self) -> Iterator[Link]:
        """The artifact itself, the model that it goes on from, and so on back to where that begins."""
        link: Link | None = self.own
        while link is not None:
            yield link
            role = link.base_role
            link = self.links.get(link.inputs[role]) if role else None

    def base(self) -> Link | None:
        """The model that the artifact goes on from."""
        role = self.own.base_role
        return self.links.get(self.own.inputs[role]) if role else None


def lineage_of(job: Job, places: Mapping[str, Path], out: Path, result: Result) -> Lineage:
    """The lineage of what `job` has made, whose inputs lie in `places`.

    Other artifacts are looked for beside those: what is not there, or cannot be read, is a link that says nothing but its id.
    """
    own = Link(
        id=job.artifact_id,
        folder=out,
        stage=job.kind,
        kind=job.output_kind,
        params=job.params,
        inputs=dict(job.input_ids),
        source_digests=job.source_digests,
        facts=result.facts,
        metrics=result.metrics,
    )
    links: dict[str, Link] = {}
    waiting: list[tuple[Link, bool]] = [(own, False)]
    folders = {job.input_ids[role]: place for role, place in places.items()}
    while waiting:
        link, seen_inputs = waiting.pop()
        if link.id in links:
            continue
        if seen_inputs:
            links[link.id] = link
            continue
        waiting.append((link, True))
        for _, each in sorted(link.inputs.items(), reverse=True):
            if each not in links:
                beside = link.folder.parent / each if link.folder and link is not own else None
                waiting.append((read_link(each, folders.get(each) or beside), False))
    return Lineage(own, links)


def read_link(artifact_id: str, folder: Path | None) -> Link:
    """What is known of an input. A folder from outside is what it holds, also if it carries an artifact's manifest."""
    if artifact_id.startswith((HUB, OUTSIDE_ID)) or folder is None:
        return Link(artifact_id, folder)
    try:
        manifest = read_manifest(folder)
    except (ArtifactError, OSError):
        return Link(artifact_id)
    return Link(
        id=artifact_id,
        folder=folder,
        stage=manifest.stage,
        kind=manifest.artifact_kind,
        params=manifest.params,
        inputs=manifest.input_ids,
        source_digests=manifest.source_digests,
        facts=manifest.facts,
        metrics=manifest.metrics,
    )
