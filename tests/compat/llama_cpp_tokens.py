"""Run by an interpreter that has llama.cpp: the tokens that it cuts texts into, with and without those around a text.

python llama_cpp_tokens.py TEXTS.json IDS.json MODEL.gguf ...

IDS.json has, for each model by its stem, a list of [ids, ids with special tokens around], one a text.
"""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

texts, output, *models = sys.argv[1:]
texts = json.loads(Path(texts).read_text(encoding="utf-8"))


def tokens(address: str, text: str, special: bool) -> list[int]:
    body = json.dumps({"content": text, "add_special": special}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["tokens"]


found = {}
for model in models:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 64, 1, 1, False
    server = xllamacpp.Server(params)
    found[Path(model).stem] = [
        [tokens(server.listening_address, text, special) for special in (False, True)] for text in texts
    ]
    del server
Path(output).write_text(json.dumps(found))
