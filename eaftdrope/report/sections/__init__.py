"""One module per kind of result, from its JSON to the sections of a page; about.py and changes.py are shared."""
