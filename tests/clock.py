"""Processor time, which does not depend on what else the machine does."""

import resource


def seconds_of_children() -> float:
    """Of this process's children that have ended: user and system."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
