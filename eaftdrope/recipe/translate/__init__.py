"""`eaftdrope recipes from`: a configuration of LLaMA-Factory, Axolotl or the TRL command line as a recipe.

Every key of the configuration ends in one of three ways, which the recipe's header and a table report: it becomes a key of
the recipe; nothing has to be written for it; or it cannot be translated, with the reason. A configuration whose purpose a
recipe does not have (preference pairs, rewards, frozen layers) is refused. Nothing of the other tools is imported.

Read in this order:

    draft.py           the configuration with a record of what was read, and the recipe that is being written
    detect.py          which tool a configuration is for
    hf_arguments.py    the keys that all three share: those of transformers' TrainingArguments
    llamafactory.py    LLaMA-Factory 0.9.5, with its dataset_info.json in llamafactory_data.py
    axolotl.py         Axolotl 0.21, with its datasets in axolotl_data.py
    trl_cli.py         TRL 1.16
    leftovers.py       keys that need nothing, or that have no translation, by pattern and with the reason
    recipe_text.py     the recipe with its comments, and the table
"""

from .detect import TOOLS, translate
from .draft import Translation

__all__ = ["TOOLS", "Translation", "translate"]
