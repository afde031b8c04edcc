"""The gates a recipe can name and the options each takes, with their defaults.

A copy of `eaftdrope.loss.gates.GATES` without torch, so that a recipe is checked in a fraction of a second; a test
asserts that the two are equal.
"""

GATE_OPTIONS: dict[str, dict[str, object]] = {
    "eaft": {"alpha": 1.0, "k": 20, "divisor": None},
    "eaft-vocab": {"alpha": 1.0},
    "eaft-exact": {"alpha": 1.0, "k": 20},
    "eaft-sigmoid": {"slope": 30.0, "threshold": 0.17, "k": 20},
    "eaft-mask": {"quantile": 0.15, "k": 20},
    "conflict-mask": {"quantile": 0.15},
    "dft": {},
    "focal": {"gamma": 2.0},
    "talr": {"floor": 0.01},
    "mile": {"gamma": 1.0},
    "profit": {"threshold": 0.1, "keep": "higher"},
    "constant": {"weight": 1.0},
    "none": {},
}

ALL_GATE_OPTIONS: tuple[str, ...] = tuple(dict.fromkeys(option for table in GATE_OPTIONS.values() for option in table))
