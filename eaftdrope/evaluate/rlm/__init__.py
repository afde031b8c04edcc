"""Recursive language models beside what they are compared with: `eaftdrope rlm bench`.

chat_models.py   a model reference or an endpoint -> a model that answers conversations
trials.py        one task under one arm: its answer, its score, how far it came, its cost
plan.py          arms x tasks x lengths, checked, with the number of trials of each cell
run.py           measuring the plan
results.py       its folder
table.py         its tables: shares with intervals, costs, the crossover length
"""
