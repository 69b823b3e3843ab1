"""Few settings that hold every pair of two factors' values."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Settings = list[dict[str, Any]]


def pairs(setting: Mapping[str, Any]) -> set[frozenset[tuple[str, Any]]]:
    """Every two (factor, value) of a setting."""
    return {frozenset(pair) for pair in itertools.combinations(setting.items(), 2)}


def pairwise(
    values: Mapping[str, Sequence[Any]], allowed: Callable[[dict[str, Any]], bool]
) -> Settings:
    """Each setting begins with a pair that is missing; its other values hold as many more as they can.

    Args:
        allowed: Whether values may stand together; asked of settings that lack factors, too, and true
            of every pair.
    """
    items = {factor: [(factor, v) for v in choices] for factor, choices in values.items()}
    missing = {
        frozenset(pair): None
        for a, b in itertools.combinations(items.values(), 2)
        for pair in itertools.product(a, b)
    }
    found: Settings = []
    while missing:
        setting = dict(next(iter(missing)))
        for factor in [f for f in values if f not in setting]:
            free = [item for item in items[factor] if allowed(setting | dict([item]))]
            gains = [
                sum(frozenset((item, other)) in missing for other in setting.items())
                for item in free
            ]
            setting[factor] = free[gains.index(max(gains))][1]
        found.append({factor: setting[factor] for factor in values})
        for pair in pairs(setting):
            missing.pop(pair, None)
    return found
