"""docs/rlm.md agrees with the code: limits and their defaults, rules, options, the names in the REPL."""

import re
from dataclasses import fields

from click.testing import CliRunner

from eaftdrope.cli.app import build_app
from eaftdrope.rlm import Limits
from eaftdrope.rlm.calls import SLICE
from eaftdrope.rlm.sandbox import TOOLS
from eaftdrope.rlm.strategies import RUN_RULES
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/rlm.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def test_the_table_of_limits_is_that_of_the_code():
    found = {row[0].strip("`"): row[1] for row in ROWS if row[0].strip("`") in {one.name for one in fields(Limits)}}
    assert found == {
        one.name: f"{one.default:,g}" if one.type == "float" else f"{one.default:,}" for one in fields(Limits)
    }


def test_the_rules_of_strategies_are_those_of_the_code():
    found = {row[0]: row[1] for row in ROWS if row[0] in RUN_RULES}
    assert list(found) == list(RUN_RULES)
    assert {name: rule.partition(":")[0] for name, rule in found.items()} == RUN_RULES


def test_names_and_numbers():
    assert all(f"`{name}(" in PAGE for name in TOOLS)
    assert PAGE.count(f"slice of {SLICE} calls") == 2


def test_the_options_that_are_named_exist():
    import typer

    command = typer.main.get_command(build_app("rlm"))
    known = {
        option
        for verb in command.commands["rlm"].commands.values()
        for parameter in verb.params
        for option in parameter.opts
    }
    named = set(re.findall(r"`?(--[a-z][a-z-]+)", PAGE)) - {"--output"}
    assert named and named <= known
    for verb in re.findall(r"eaftdrope rlm (\w+)", PAGE):
        assert verb in command.commands["rlm"].commands
    assert CliRunner().invoke(command, ["rlm", "ask", "--help"]).exit_code == 0
