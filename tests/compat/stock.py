"""Run by another interpreter, where eaftdrope is not installed: loads converted checkpoints with stock transformers.

    python stock.py FOLDER...       one JSON line a folder: what the model does, or the error

Each folder has `ids.pt` and `logits.pt` (of the identity rotation) beside the checkpoint.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()


def measure(folder: Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids, wanted = torch.load(folder / "ids.pt"), torch.load(folder / "logits.pt")
    positions = torch.arange(ids.shape[1])[None].expand(len(ids), -1)
    with torch.no_grad():
        logits = model(ids).logits
        measured = {"difference": (logits - wanted).abs().max().item()}
        try:
            shifted = model(ids, position_ids=positions + 100_000).logits
        except IndexError:
            # a table of positions that ends
            return measured
    return measured | {"shift": (logits - shifted).abs().max().item()}


for name in sys.argv[1:]:
    folder = Path(name)
    try:
        result = measure(folder)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    result |= {"folder": folder.name, "transformers": transformers.__version__}
    print(json.dumps(result | {"eaftdrope": importlib.util.find_spec("eaftdrope") is not None}), flush=True)
