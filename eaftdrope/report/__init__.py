"""The results of a folder as one HTML page, and the model card of a trained model.

Reading order:

    page.py      entry points: `write_report`, `write_side_by_side`, `try_write_report`
    sections/    one module per kind of result: reads its JSON and returns the sections of a page
    blocks.py    the elements of a page: tables, galleries, samples, ...
    words.py     numbers and texts as a reader sees them
    figures/     matplotlib figures, drawn once for a file and for the page
    render.py    blocks and figures -> one HTML file (templates and style sheet in assets/)
    card.py      README.md of a trained folder, independent of the page

A page is built from files only: a second call on the same folder gives the same bytes.
"""
