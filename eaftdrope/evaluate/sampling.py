"""Which rows a probe takes when it may not take all: the same ones before and after, in every run."""


def evenly(items, limit: int | None) -> list:
    """At most `limit` of `items`, spread evenly from the first on, in order (None: all)."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]
