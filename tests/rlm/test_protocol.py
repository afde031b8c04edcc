"""What a reply means: its blocks and its finish, whatever surrounds them; and what of an output is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eaftdrope.rlm.protocol import Parsed, describe, first_messages, parse, shortened, shown
from eaftdrope.rlm.sandbox import Printed

# text without what begins or ends a block, a thought or a finish
WORDS = st.text(st.characters(exclude_characters="`<>\r", exclude_categories=["Cs"]), max_size=40)
PROSE = WORDS.filter(lambda text: "FINAL" not in text)
CODE = st.lists(PROSE.map(lambda text: text.replace("\n", " ")), min_size=1, max_size=3).map(
    lambda all_: "\n".join(all_) + "\n"
)
RUN = st.sampled_from(["repl", "python", "py", "repl  ", "python\t"])
NOT_RUN = st.sampled_from(["", "text", "json", "bash", "repl-session", "python3"])


@given(st.text())
def test_any_reply_can_be_parsed(reply):
    parsed = parse(reply)
    assert all(block in reply.replace("\r\n", "\n") + "\n" for block in parsed.blocks)
    assert parsed.final is None or parsed.variable is None
    assert parse(reply) == parsed


@given(st.lists(st.tuples(PROSE, RUN, CODE, st.sampled_from(["", " ", "\t"])), max_size=4), PROSE)
def test_the_blocks_in_order(parts, after):
    reply = "".join(f"{prose}\n{indent}```{kind}\n{code}{indent}```\n" for prose, kind, code, indent in parts) + after
    assert parse(reply) == Parsed([code for _, _, code, _ in parts])
    # as Windows writes lines
    assert parse(reply.replace("\n", "\r\n")).blocks == [code for _, _, code, _ in parts]


@given(PROSE, NOT_RUN, CODE)
def test_other_fences_are_text(prose, kind, code):
    assert parse(f"{prose}\n```{kind}\n{code}FINAL(in a fence)\n```\n") == Parsed([])


@given(PROSE, CODE, st.integers(0, 200))
def test_a_block_that_was_cut_counts(prose, code, cut):
    """The model ran out of tokens inside of its last block."""
    kept = code[: cut % (len(code) + 1)]
    (block,) = parse(f"{prose}\n```repl\nx = 1\n{kept}").blocks
    assert block.rstrip("\n") == f"x = 1\n{kept}".rstrip("\n")


@st.composite
def balanced(draw, depth=3):
    text = draw(PROSE).replace("(", "").replace(")", "")
    if depth and draw(st.booleans()):
        return f"{text}({draw(balanced(depth - 1))}){draw(balanced(depth - 1))}"
    return text


@given(PROSE, balanced(), PROSE)
def test_brackets_of_the_finish_are_balanced(prose, text, after):
    parsed = parse(f"{prose}\n  FINAL({text})\n{after}")
    stripped = text.strip()
    quoted = len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "\"'"
    assert parsed.final == (stripped[1:-1] if quoted else stripped)


@pytest.mark.parametrize(
    ("reply", "final", "variable"),
    [
        ("FINAL(f(x))", "f(x)", None),
        ("FINAL(((1), (2)))", "((1), (2))", None),
        ("FINAL('it')", "it", None),
        ('FINAL("two\nlines")', "two\nlines", None),
        ("FINAL(it's)", "it's", None),
        ("FINAL(not closed", "not closed", None),
        ("FINAL(f(not closed)\nmore", "f(not closed)\nmore", None),
        ("FINAL()", "", None),
        ("FINAL_VAR(total)", None, "total"),
        ("FINAL_VAR( 'total' )", None, "total"),
        ("FINAL_VAR(total", None, "total"),
        ("The answer: FINAL(5)", None, None),
        ("FINALLY(5)", None, None),
        ("FINAL(1)\nFINAL(2)", "1", None),
        ("```repl\nFINAL(5)\n```", None, None),
        ("```\nFINAL(5)\n```", None, None),
        ("```repl\nx = 1\n```\nFINAL(5)", "5", None),
        ("<think>FINAL(3)</think>FINAL(5)", "5", None),
        ("I think FINAL(3)\n</think>\nFINAL(5)", "5", None),
        ("<think>FINAL(3)\nand no end", None, None),
    ],
)
def test_finishes(reply, final, variable):
    parsed = parse(reply)
    assert (parsed.final, parsed.variable) == (final, variable)


@pytest.mark.parametrize(
    "reply",
    ["<think>\n```repl\nbad\n```\n</think>\n```repl\ngood\n```", "```repl\nbad\n```\n</think>\n```repl\ngood\n```"],
)
def test_thoughts_are_not_run(reply):
    assert parse(reply).blocks == ["good\n"]


@given(st.text(max_size=300), st.integers(1, 200))
def test_shortened_keeps_head_and_tail(text, chars):
    short = shortened(text, chars)
    if len(text) <= chars:
        assert short == text
        return
    head, rest = short.split("\n[... ", 1) if "\n[... " not in text else (text[: chars * 2 // 3], None)
    assert text.startswith(head) and len(head) == chars * 2 // 3
    if rest is not None:
        number, tail = rest.split(" characters not shown ...]\n", 1)
        assert text.endswith(tail) and len(head) + int(number.replace(",", "")) + len(tail) == len(text)


@given(st.lists(st.text(max_size=50), max_size=20), st.integers(1, 60))
def test_what_is_printed_in_pieces_is_shortened_as_a_whole(pieces, chars):
    printed = Printed(chars)
    for piece in pieces:
        printed("stdout", piece)
    cell = printed.cell()
    assert shown([cell.output], chars, cell.hidden) == (shortened("".join(pieces), chars) or "(no output)")
    assert len(cell.output) <= 2 * chars


def test_shown_joins_cells():
    assert shown(["a", "", "b"], 100) == "a\nb"
    assert shown(["", ""], 100) == "(no output)"


def test_the_first_messages_state_what_there_is():
    for context, kind, begins in [
        ("abc" * 100, "a str of 300 characters", "'abcab'"),
        (["first", "second"], "a list of 2 strings, 11 characters in all", "'first'"),
        ([], "a list of 0 strings, 0 characters in all", "''"),
        ("", "a str of 0 characters", "''"),
    ]:
        assert describe(context) == kind
        system, user = first_messages(
            "{kind}|{output_chars}|{window}|{lacking}",
            context,
            "Why?",
            preview_chars=5,
            output_chars=7,
            window=9,
            lacking="no del\n",
        )
        assert system == {"role": "system", "content": f"{kind}|7|9|no del\n"}
        assert user == {"role": "user", "content": f"Query: Why?\nIt begins: {begins}"}
