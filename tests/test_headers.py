"""The opening comment of a recipe file."""

from __future__ import annotations

import pytest

from sdcli.recipe.headers import Header, parse_header
from sdcli.recipe.load import recipe_file, recipe_names

TEXT = """\
# One network teaches itself:
# the deep part the shallow ones.
#
#   sdcli train resnet18 --dataset cifar100 \\
#     --recipe mine
#   sdcli eval runs/mine/best.safetensors
#
# Sources   a paper,
#           and its code
# Differs   -
# Measured  76.3 % (1 seed)
title = "Mine"
# Sources   not the header's any more
"""


def test_a_header_has_an_idea_commands_and_sections_each_on_one_line():
    header = parse_header(TEXT)
    assert header.idea == "One network teaches itself: the deep part the shallow ones."
    assert header.commands == (
        "sdcli train resnet18 --dataset cifar100 --recipe mine",
        "sdcli eval runs/mine/best.safetensors",
    )
    assert header.sections == {"sources": "a paper, and its code", "differs": "-", "measured": "76.3 % (1 seed)"}
    assert (header.sources, header.differs, header.measured) == ("a paper, and its code", "-", "76.3 % (1 seed)")


def test_other_sections_are_kept_by_their_names():
    assert parse_header("# An idea.\n#\n# Formula   a + b\n").sections == {"formula": "a + b"}


def test_what_has_not_been_measured_is_empty():
    assert parse_header("# Measured  not yet\n").measured == ""


@pytest.mark.parametrize("text", ["", 'title = "Mine"\n', "\n# An idea.\n"])
def test_a_file_without_a_header_has_an_empty_one(text):
    assert parse_header(text) == Header()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_an_idea_a_command_that_names_it_and_all_sections(name):
    header = parse_header(recipe_file(name).read_text(encoding="utf-8"))
    assert header.idea and header.sources and header.differs and header.sections.get("measured")
    assert any(f"--recipe {name}" in command or name == "default" for command in header.commands)
    assert all(command.startswith("sdcli ") for command in header.commands)
