"""All options of a probe: the recipe's defaults, and what a test changes."""

from eaftdrope.recipe.load import section_at
from eaftdrope.recipe.probe_sections import TARGET_PROBES


def probe_options(name, **changed):
    group = "target" if name in TARGET_PROBES else "general"
    fields = section_at(("probes", group, name)).model_fields
    assert changed.keys() <= fields.keys()
    return {option: field.default for option, field in fields.items()} | changed
