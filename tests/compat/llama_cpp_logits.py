"""Run by an interpreter that has llama-cpp-python: logits of every position of a GGUF model.

python llama_cpp_logits.py MODEL.gguf TOKENS.json LOGITS.npy
"""

import json
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama

model, tokens, output = sys.argv[1:]
ids = json.loads(Path(tokens).read_text())
llama = Llama(model, n_ctx=256, n_threads=1, logits_all=True, verbose=False)
llama.eval(ids)
np.save(output, np.asarray(llama.scores[: len(ids)], dtype=np.float32))
