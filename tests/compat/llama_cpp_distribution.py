"""Run by an interpreter that has llama.cpp: its log-probabilities of the token after each of some prefixes.

python llama_cpp_distribution.py MODEL.gguf PREFIXES.json LOG_PROBS.npy [ROPE_FREQ_SCALE]
"""

import json
import sys
from pathlib import Path

import numpy as np
import xllamacpp

model, prefixes, output, *scale = sys.argv[1:]

params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
if scale:
    params.rope_scaling_type = xllamacpp.llama_rope_scaling_type.LLAMA_ROPE_SCALING_TYPE_LINEAR
    params.rope_freq_scale = float(scale[0])
server = xllamacpp.Server(params)


def log_probs(prefix: list[int]) -> np.ndarray:
    """[V], of the whole vocabulary."""
    # more than any vocabulary has: the server gives as many as there are
    asked = {"prompt": prefix, "n_predict": 1, "logprobs": 1_000_000, "temperature": 0.0, "cache_prompt": False}
    answer = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    found = np.full(len(answer), np.nan)
    for token in answer:
        found[token["id"]] = token["logprob"]
    assert not np.isnan(found).any(), "not the whole vocabulary"
    return found


np.save(output, np.stack([log_probs(prefix) for prefix in json.loads(Path(prefixes).read_text())]))
