"""The language of recipes: one YAML file = one run, read and checked in under a second, without torch.

Read in this order:

    load.py            text -> YAML -> overrides -> schema and combinations -> Recipe, or every problem with its line
    yaml_lines.py      YAML 1.2 with line numbers
    schema.py          Recipe, and the sections model and output
    data_section.py    data;  training_sections.py: loss, lora, train;  probe_sections.py: probes
    stage_sections.py  drope and recalibrate, and the sections that each stage reads;  ttt_section.py: ttt
    combinations.py    checks of several keys together
    dump.py            a Recipe back to YAML
    base.py, paths.py, suggest.py: strict models, files beside a recipe, did-you-mean

The work that a recipe describes is in eaftdrope/run.
"""

from .dump import dump_recipe
from .load import load_recipe, make_recipe
from .schema import Recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe", "make_recipe"]
