"""Needs, formulas and differences of recipes, from their tables alone."""

from __future__ import annotations

import itertools
import tomllib

import pytest

from sdcli import toml
from sdcli.recipe.about import difference, formula, needs, origin_of, show
from sdcli.recipe.load import load_recipe, read_recipe, recipe_names
from sdcli.recipe.merge import Override
from sdcli.recipe.schema import Ema, Recipe


class Later(Recipe):
    """A recipe as it may be one day, with tables that `needs` has never heard of."""

    crops: dict[str, dict[str, int]]
    phases: list[dict[str, int]]


def test_a_plain_recipe_needs_nothing():
    assert needs(load_recipe(["byot"])) == []


def test_other_networks_averages_and_mixed_images_are_needs():
    recipe = load_recipe(
        ["byot", "byot-modern"],
        ["networks.teacher.model=resnet50", "networks.teacher.learns=false", "batch.mixup=0.2", "ema.decay=0.999"],
    )
    assert needs(recipe) == ["network teacher (resnet50, frozen)", "mixup (alpha 0.2)", "EMA of the weights"]


def test_gradients_that_are_not_summed_are_needs():
    assert needs(load_recipe(["default"])) == ["balanced gradients"]
    assert needs(load_recipe(["byot"], ["networks.student.gradients=detached"])) == ["gradients that stay in the heads"]


def test_views_and_images_of_the_class_are_needs():
    assert needs(load_recipe(["ddgsd"])) == ["second view of each image"]
    assert needs(load_recipe(["cs-kd"])) == ["second image of the same class"]
    assert needs(load_recipe(["bake"])) == [
        "3 extra images of the same class",
        "derived predictions (propagated)",
    ]


def test_tables_that_come_later_show_as_they_are():
    tables = load_recipe(["byot"]).model_dump(exclude_none=True)
    later = Later.model_validate({**tables, "crops": {"small": {"size": 96}}, "phases": [{"epochs": 1}] * 2})
    assert needs(later) == ["2 phases", "crops small"]


def test_a_formula_has_a_line_per_loss():
    assert formula(load_recipe(["byot"])).splitlines() == [
        "       1 cross_entropy(final)",
        "+    0.7 cross_entropy(exits)",
        "+ 0.0333 kl(exits <- final, temperature 3)",
        "+   5e-7 hint(exits <- final)",
    ]


@pytest.mark.parametrize("comments", [True, False])
@pytest.mark.parametrize("name", recipe_names())
def test_what_is_shown_is_a_recipe_that_reads_as_itself(name, comments, tmp_path):
    file = tmp_path / "shown.toml"
    file.write_text(show(*read_recipe([name]), comments=comments), encoding="utf-8")
    shown = load_recipe([str(file)])
    assert shown == load_recipe([name]).model_copy(update={"networks": shown.networks})
    assert shown.student == load_recipe([name]).student


def test_every_shown_value_has_its_source(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[batch]\nsize = 64\n")
    lines = show(*read_recipe(["byot", str(mine)], ["epochs=3"])).splitlines()
    said = {line.split("=")[0].strip() + line.partition("# ")[2]: line for line in lines if "=" in line}
    assert "epochs--set" in said and f"size{mine}" in said
    assert "hflipschedules/cifar" in said and "headbyot" in said and "mixupdefault" in said
    assert all(" # " in line for line in lines if " = " in line)


def test_origins_stand_in_one_column_and_long_values_do_not_push_it():
    lines = [line for line in show(*read_recipe(["byot-journal"])).splitlines() if " = " in line]
    columns = {line.index("#") for line in lines if not line.startswith(("title", "paper"))}
    assert len(columns) == 1 and max(columns) < 50


def test_a_value_below_a_list_of_tables_has_the_lists_origin():
    assert origin_of("phases.epochs", {"phases": "recipes/later.toml", "batch": "x"}) == "later"
    assert origin_of("batch.size", {"batch": "x", "batch.mixup": "x"}) == "default"


def test_tables_are_written_with_values_before_subtables_and_lists_of_tables():
    tables = {
        "batch": {"size": 1, "augment": {"fill": 0}, "mixup": 0.5},
        "phases": [{"epochs": 1, "losses": {"a": {"w": 1}}}],
    }
    assert tomllib.loads(toml.write(tables)) == tables
    assert tomllib.loads(toml.write(tables, lambda key: key)) == tables
    assert toml.write({"a": {}, "b": 5e-7}) == "a = {}\nb = 5e-7\n"


@pytest.mark.parametrize(
    ("one", "other"), list(itertools.permutations(["byot", "byot-scan", "default", "baseline", "quick"], 2))
)
def test_the_options_of_a_difference_lead_from_one_recipe_to_the_other(one, other):
    found = difference(load_recipe([one]), load_recipe([other]))
    sets, unsets = found.overrides()
    reached = load_recipe([one], [*sets, *map(Override.unset, unsets)])
    assert not difference(reached, load_recipe([other])).rows()


def test_a_table_that_one_recipe_lacks_is_added_or_gone():
    plain, averaged = load_recipe(["byot"]), load_recipe(["byot"], ["ema.decay=0.999"])
    assert averaged.ema == Ema()
    assert difference(plain, averaged).overrides() == (["ema={}"], [])
    assert difference(averaged, plain).overrides() == ([], ["ema"])
    assert difference(plain, load_recipe(["baseline"])).gone == ["losses.exits", "losses.soft", "losses.hint"]


def test_a_recipe_does_not_differ_from_itself():
    assert difference(load_recipe(["byot"]), load_recipe(["byot"])).rows() == []


def test_origins_are_files_and_options():
    recipe, origins = read_recipe(["byot"], ["epochs=3"])
    assert recipe.epochs == 3
    assert (origins["epochs"], origins["losses.soft.kind"]) == ("--set epochs=3", "recipes/byot.toml")
