"""The stages of a recipe. One file per kind; a new kind is one file and a section in recipe/.

stage.py      the interface: plan, prepare, run, result
chain.py      the stages of a recipe, each in its folder
training.py   everything that the kinds that train have in common
"""
