"""The order of a recipe's stages: pure functions of which stage stands on which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def in_order(names: Sequence[str], upstream: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """(the stages, each after those it stands on, otherwise as written; a cycle, or nothing where there is none).

    `upstream` maps a stage to stages among `names`. Where some wait for each other, they stand at the end, as written.
    """
    done: dict[str, None] = {}
    waiting = list(names)
    while waiting:
        ready = next((name for name in waiting if all(step in done for step in upstream.get(name, ()))), None)
        if ready is None:
            return [*done, *waiting], cycle_among(waiting, upstream)
        done[ready] = None
        waiting.remove(ready)
    return list(done), []


def cycle_among(waiting: Sequence[str], upstream: Mapping[str, Sequence[str]]) -> list[str]:
    """Stages that stand on each other, the first of them again at the end. Each of `waiting` stands on another of them."""
    path = [waiting[0]]
    while True:
        ahead = next(step for step in upstream[path[-1]] if step in waiting)
        if ahead in path:
            return [*path[path.index(ahead) :], ahead]
        path.append(ahead)


def needed_for(names: Iterable[str], upstream: Mapping[str, Sequence[str]]) -> set[str]:
    """The stages themselves and everything they stand on."""
    needed: set[str] = set()
    ahead = list(names)
    while ahead:
        name = ahead.pop()
        if name not in needed:
            needed.add(name)
            ahead += upstream.get(name, ())
    return needed
