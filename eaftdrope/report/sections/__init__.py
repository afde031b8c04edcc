"""A file for each kind of result: from its JSON to the sections of a page."""
