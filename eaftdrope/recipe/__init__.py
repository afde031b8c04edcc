"""One YAML file = one run: read, check, plan."""

from .dump import dump_recipe
from .load import load_recipe, make_recipe
from .schema import Recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe", "make_recipe"]
