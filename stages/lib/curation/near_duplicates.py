"""Finds texts that are nearly the same: MinHash with locality-sensitive hashing, through datatrove.

Two texts whose sets of word runs ("shingles") overlap by s (Jaccard similarity) fall into one bucket of b hashes out
of n/b with probability 1 - (1 - s^b)^(n/b) (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3).
"""

from __future__ import annotations

import contextlib
import io
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field

from pipeline.settings.strict import Strict


class MinHash(Strict):
    """Which texts count as near-duplicates. The first of each cluster is kept."""

    similarity: float = Field(default=0.7, ge=0.01, lt=1.0)
    """Jaccard similarity of word runs, from 0 to 1, at which about half of the pairs are found; of clearly more similar ones nearly all are."""
    shingle_words: int = Field(default=5, ge=1)
    """Words per run. Texts of fewer words are never near-duplicates."""
    hashes: int = Field(default=112, ge=2, le=4096)
    """Hashes per text, shared out to buckets: more of them make the boundary sharper, and the search slower."""


@dataclass(frozen=True)
class Buckets:
    """`count` buckets of `hashes` hashes each."""

    count: int
    hashes: int

    def chance(self, similarity: float) -> float:
        """Probability that a pair of this similarity is found."""
        return 1 - (1 - similarity**self.hashes) ** self.count


def choose_buckets(minhash: MinHash) -> Buckets:
    """The division of the hashes into buckets that finds pairs of the wanted similarity most nearly half of the time."""
    options = [Buckets(minhash.hashes // size, size) for size in range(1, minhash.hashes + 1)]
    return min(options, key=lambda buckets: (abs(buckets.chance(minhash.similarity) - 0.5), buckets.hashes))


def near_clusters(texts: Iterable[str], minhash: MinHash, scratch: Path) -> dict[int, int]:
    """Position -> cluster, of the texts that are nearly the same as another one. `scratch` is emptied and used."""
    import loguru
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    from stages.lib.curation.words import any_script_words

    buckets = choose_buckets(minhash)
    config = MinhashConfig(
        n_grams=minhash.shingle_words,
        num_buckets=buckets.count,
        hashes_per_bucket=buckets.hashes,
        # datatrove's other choice hands texts to xxhash, which from version 4 on takes bytes only.
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )
    if scratch.exists():
        shutil.rmtree(scratch)
    signatures, pairs, clusters = (str(scratch / name) for name in ("signatures", "pairs", "clusters"))
    documents = (Document(text=text, id=str(position)) for position, text in enumerate(texts))
    loguru.logger.disable("datatrove")
    # datatrove draws a progress bar for files that are read in milliseconds.
    with contextlib.redirect_stderr(io.StringIO()):
        MinhashDedupSignature(signatures, config=config, language=any_script_words()).run(documents, 0, 1)
        for bucket in range(buckets.count):
            MinhashDedupBuckets(signatures, pairs, config=config).run(None, bucket, buckets.count)
        MinhashDedupCluster(pairs, clusters, config=config, save_cluster_id=True).run(None, 0, 1)
    found = dict(sorted(read_clusters(scratch / "clusters")))
    shutil.rmtree(scratch)
    return found


def near_duplicates(
    clusters: Mapping[int, int], parts: Iterable[tuple[Sequence[str], object]], similarity: float
) -> set[int]:
    """Positions of the rows to leave out: those that an earlier row of their cluster is like in each of its `parts`, with the
    very same beside them.

    The parts of a row are what tells apart rows that share most of their text: questions about one context are near in all
    their text, and no duplicates. The first part is what is asked; paragraphs that two rows share there are their context,
    where they are most of it, and what stands beside those is compared. Nor are duplicates prompts whose completions are compared with other answers. Of rows without parts the
    first of each cluster stays, which depends on nothing but the order of the data (datatrove would keep an arbitrary one).
    """
    from stages.lib.curation.words import any_script_words

    words = any_script_words().word_tokenize
    kept: dict[int, list[tuple[list[Said], object]]] = {}
    found = set()
    for position, (texts, beside) in enumerate(parts):
        if position not in clusters:
            continue
        said = [said_in_words(text, words, is_asked=number == 0) for number, text in enumerate(texts)]
        others = kept.setdefault(clusters[position], [])
        if any(its == beside and all(map(partial(are_near, similarity), said, other)) for other, its in others):
            found.add(position)
        else:
            others.append((said, beside))
    return found


Said = Mapping[str, frozenset[str]]
"""What is said in a part of a row: paragraph -> its words."""


def said_in_words(text: str, words: Callable[[str], Iterable[str]], *, is_asked: bool) -> Said:
    """The words of a text: of what is asked by paragraph, else as a whole."""
    text = text.lower()
    paragraphs = filter(None, map(str.strip, text.split("\n\n"))) if is_asked else [text]
    return {paragraph: frozenset(words(paragraph)) for paragraph in paragraphs}


def are_near(similarity: float, one: Said, other: Said) -> bool:
    """Whether the words of two texts overlap by `similarity` (Jaccard); beside the paragraphs that they share, where these
    are most of both.
    """
    shared = [paragraph for paragraph in one if paragraph in other]
    rest, others_rest = (words_of(each[name] for name in each if name not in shared) for each in (one, other))
    common = len(words_of(one[paragraph] for paragraph in shared))
    if not common or common < max(len(rest), len(others_rest)):
        rest, others_rest = words_of(one.values()), words_of(other.values())
    return len(rest & others_rest) >= similarity * len(rest | others_rest)


def words_of(paragraphs: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*paragraphs)


def read_clusters(folder: Path) -> Iterator[tuple[int, int]]:
    """(position of a text, number of its cluster)."""
    path = folder / f"{0:06d}.clusters"
    if path.exists():
        yield from struct.iter_unpack("<2I", path.read_bytes())
