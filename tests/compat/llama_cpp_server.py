"""Serves a GGUF with llama.cpp's server, until it is killed.

python llama_cpp_server.py MODEL NAME PORT WINDOW
"""

import sys
import threading

import xllamacpp

model, name, port, window = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = model, {name}
params.hostnames, params.port = ["127.0.0.1"], int(port)
# requests at once share the context
params.n_parallel, params.n_ctx = 2, 2 * int(window)
params.cpuparams.n_threads = 1
params.warmup = False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
