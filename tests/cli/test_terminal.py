"""Nothing that is shown can control the terminal."""

from rich.table import Table
from rich.text import Text

from eaftdrope.cli.terminal import echo, make_console

HOSTILE = "\x1b]0;title\x07 \u202eevil"


def test_a_console_escapes_what_it_shows(capsys):
    """Plain text, markup, a Text and the cells of a table alike; its own colours stay."""
    console = make_console(120)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    for shown in (HOSTILE, f"[bold]{HOSTILE}[/]", Text(HOSTILE), table):
        console.print(shown)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out
    # a cell is as wide as it would be without
    assert out.count("\\x1b]0;title") == 6 and out.count("\\u202eevil") >= 4


def test_colours_are_the_consoles_own(capsys):
    console = make_console(120)
    with console.capture() as captured:
        console._force_terminal, console._color_system = True, None
        console.print(Text("a\tb\nc \u200d d"))
    assert captured.get() == "a       b\nc \u200d d\n"


def test_an_echo_escapes_what_it_shows(capsys):
    echo(HOSTILE + "\nnext")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 \\u202eevil\nnext\n"
