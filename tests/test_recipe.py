"""Reading, extending, overriding and checking recipes."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sdcli.errors import UserError
from sdcli.recipe.about import difference
from sdcli.recipe.check import check_recipe
from sdcli.recipe.headers import parse_header
from sdcli.recipe.load import load_recipe, read_recipe, recipe_folder, recipe_names, to_toml
from sdcli.recipe.merge import Override
from sdcli.recipe.schema import RENAMED, BatchTable, Optimizer, Recipe

TASK = '[losses.task]\nkind = "cross_entropy"\non = "final"\n'


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def message(names: list[str], overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(names, overrides or [])
    return str(error.value)


def test_every_recipe_that_comes_with_sdcli_is_valid():
    names = recipe_names()
    assert {"byot", "byot-journal", "byot-scan", "deep-supervision", "baseline", "quick", "default"} <= set(names)
    for name in names:
        assert load_recipe([name]).title, name


def test_every_recipe_says_where_its_numbers_come_from():
    files = list(recipe_folder().rglob("*.toml"))
    assert files
    for file in files:
        header = parse_header(file.read_text())
        assert header.idea and header.sources, file
        if file.parent == recipe_folder():
            assert header.commands and header.differs and header.sections["measured"], file


def test_extends_refines_table_by_table(tmp_path):
    write(tmp_path, "epochs = 7\n[optimizer]\nlr = 0.3\nmomentum = 0.5\n" + TASK, "parent.toml")
    recipe = load_recipe([write(tmp_path, 'extends = "./parent.toml"\n[optimizer]\nlr = 0.2\n')])
    assert (recipe.epochs, recipe.optimizer.lr, recipe.optimizer.momentum) == (7, 0.2, 0.5)


def test_a_list_of_extends_refines_from_left_to_right(tmp_path):
    write(tmp_path, "epochs = 7\n[optimizer]\nlr = 0.3\nmomentum = 0.5\n" + TASK, "one.toml")
    write(tmp_path, "[optimizer]\nlr = 0.4\n[batch]\nsize = 9\n", "two.toml")
    recipe = load_recipe([write(tmp_path, 'extends = ["./one.toml", "./two.toml"]\n[batch]\nsize = 5\n')])
    assert (recipe.epochs, recipe.optimizer.lr, recipe.optimizer.momentum, recipe.batch.size) == (7, 0.4, 0.5, 5)


@pytest.mark.parametrize("extends", ["3", "[3]", '["byot", ["default"]]', "{ name = 3 }"])
def test_what_is_neither_a_name_nor_a_list_of_names_extends_nothing(extends, tmp_path):
    file = write(tmp_path, f"extends = {extends}\n")
    assert message([file]).endswith("expected: the name of a recipe, or its path, or a list of these")


def test_lists_of_extends_that_double_with_every_step_are_refused(tmp_path):
    write(tmp_path, TASK, "0.toml")
    for number in range(1, 40):
        write(tmp_path, f'extends = ["./{number - 1}.toml", "./{number - 1}.toml"]\n', f"{number}.toml")
    assert message([str(tmp_path / "39.toml")]).endswith("leads to over 100 files\n  expected: fewer recipes")


def test_the_cosine_schedule_leaves_only_the_method_between_default_and_baseline():
    found = difference(load_recipe(["default"]), load_recipe(["baseline", "schedules/cosine"]))
    tables = {key.split(".")[0] for key in [*found.changed, *found.removed, *found.added]}
    assert tables == {"networks", "losses"}


@pytest.mark.parametrize("name", recipe_names())
def test_any_recipe_takes_the_cosine_schedule_over(name):
    mine, wanted = load_recipe([name, "schedules/cosine"]), load_recipe(["default"])
    assert (mine.optimizer, mine.schedule, mine.epochs) == (wanted.optimizer, wanted.schedule, wanted.epochs)


def test_recipes_given_together_refine_from_left_to_right(tmp_path):
    mine = write(tmp_path, "epochs = 3\n")
    assert load_recipe(["byot", mine]).epochs == 3
    assert load_recipe([mine, "byot"]).epochs == 200


def test_set_overrides_everything_else():
    recipe = load_recipe(["byot"], ["losses.soft.weight=0.5", "networks.student.head=linear", "epochs=2"])
    assert (recipe.losses["soft"].weight, recipe.student.head, recipe.epochs) == (0.5, "linear", 2)


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_reads_as_itself(name, tmp_path):
    recipe = load_recipe([name])
    assert load_recipe([write(tmp_path, to_toml(recipe))]) == recipe
    assert check_recipe(recipe.model_dump(exclude_none=True)) == recipe


def test_a_recipe_cannot_be_changed_once_it_is_read():
    recipe = load_recipe(["byot"])
    with pytest.raises(ValueError, match="frozen"):
        recipe.epochs = 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("batch.siez=3", "batch: unknown key 'siez'\n  expected: one of augment, cutmix, mates, mixup, mixup_prob, size, views\n  fix:      did you mean 'size'?"),
        ("epoch=3", "recipe: unknown key 'epoch'\n  expected: one of batch, best, ema, epochs, extends, losses, networks, optimizer, "
         "paper, phases, random_weights, rules, schedule, signals, title, updates\n  fix:      did you mean 'epochs'?"),
        ("epochs=abc", "epochs = 'abc'\n  expected: a valid integer\n  fix:      the default is 200"),
        ("epochs=0", "epochs = 0\n  expected: greater than or equal to 1\n  fix:      the default is 200"),
        ("batch.augment.crop=padd", "batch.augment.crop = 'padd'\n  expected: 'auto', 'pad', 'resized' or 'none'\n  fix:      did you mean 'pad'?"),
        ("optimizer.lr=-1.0", "optimizer.lr = -1.0\n  expected: greater than 0\n  fix:      the default is 0.1"),
        ("optimizer=3", "optimizer = 3\n  expected: a table"),
        ("losses.task.kind=3", "losses.task.kind = 3\n  expected: a valid string"),
        ("losses.task.on=exit0", "losses.task.on = 'exit0'\n  expected: 'final', 'exits', 'all', 'exit1', 'exit2', … or a list of these\n"
         "  fix:      did you mean 'exits'?"),
        ("losses.task.target=exits", "losses.task.target = 'exits'\n  expected: 'label', 'next' (the next deeper point), "
         "'final', or one exit such as 'exit1'\n  fix:      did you mean 'exit1'?"),
        ("losses.new.weight=1", "losses.new.kind is missing\n  expected: a value: it has no default"),
        ("losses.task.weight=-1", "losses.task.weight = -1\n  expected: greater than or equal to 0, or a table, or a valid list\n  fix:      the default is 1.0"),
        ('losses.task.weight={ value = 1.0, warmup = "3" }', "losses.task.weight.warmup = '3'\n  expected: a valid number\n  fix:      without quotes: warmup = 3"),
        ("losses.task.weight={ warmpu = 3 }", "losses.task.weight: unknown key 'warmpu'\n  expected: one of decay, of, share, sigmoid, start, stop, to, value, warmup\n  fix:      did you mean 'warmup'?"),
        ("networks.student.exits=some", "networks.student.exits = 'some'\n  expected: 'auto' or 'none', or a valid integer, or a valid list\n  fix:      the default is 'auto'"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_source_key_value_and_what_was_expected(override, expected):
    assert message(["byot"], [override]) == f"--set {override}: {expected}"


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    file = write(tmp_path, TASK + "[schedule]\nwarm = 3\n")
    assert message([file]).startswith(f"{file}: schedule: unknown key 'warm'\n")


def test_a_mistake_in_a_parent_names_the_parent(tmp_path):
    parent = write(tmp_path, TASK + "[batch]\nsize = 0\n", "parent.toml")
    assert message([write(tmp_path, 'extends = "./parent.toml"\n')]).startswith(f"{parent}: batch.size = 0\n")


def test_another_network_needs_a_model():
    assert message(["byot"], ["networks.teacher.head=linear"]) == (
        "--set networks.teacher.head=linear: networks.teacher.model is missing\n"
        "  expected: the name of a timm model; only the student's comes from the command line\n"
        '  fix:      add model = "resnet18" to [networks.teacher]'
    )


def test_the_students_model_is_the_command_lines():
    assert message(["byot"], ["networks.student.model=resnet50"]) == (
        "--set networks.student.model=resnet50: networks.student.model = 'resnet50'\n"
        "  expected: nothing: the command line names the student's model\n"
        "  fix:      sdcli train resnet50 …"
    )


def test_an_unknown_recipe_gets_the_nearest_name():
    said = message(["byott"])
    assert said.startswith("unknown recipe 'byott'\n  expected: one of byot, byot-auto, byot-nohint, byot-dkd, ")
    assert said.endswith("\n  fix:      did you mean 'byot'?")


def test_a_missing_recipe_file_is_named(tmp_path):
    assert message([str(tmp_path / "no.toml")]).startswith(f"recipe file '{tmp_path / 'no.toml'}' does not exist\n")


def test_a_circle_of_extends_is_refused(tmp_path):
    write(tmp_path, 'extends = "./b.toml"\n', "a.toml")
    write(tmp_path, 'extends = "./a.toml"\n', "b.toml")
    assert "forms a circle: a.toml -> b.toml -> a.toml" in message([str(tmp_path / "a.toml")])


def test_a_file_that_is_not_toml_says_where(tmp_path):
    assert message([write(tmp_path, "epochs = \n")]).startswith(f"{tmp_path / 'mine.toml'} is not TOML: Invalid value")


def test_a_repeated_key_is_an_error(tmp_path):
    assert "is not TOML" in message([write(tmp_path, "epochs = 1\nepochs = 2\n" + TASK)])


@pytest.mark.parametrize("text", ["epochs", "", "losses.soft"])
def test_an_override_without_a_value_is_refused(text):
    assert (
        message(["byot"], [text])
        == f"--set '{text}'\n  expected: KEY=VALUE\n  fix:      for example --set losses.soft.weight=0.5"
    )


@pytest.mark.parametrize("key", ["", "a b", "losses..weight", "[/]"])
def test_an_override_of_what_is_no_key_is_refused(key):
    assert message(["byot"], [f"{key}=3"]).startswith(
        f"--set {key}=3: {key!r} is not a key\n  expected: names with dots"
    )


# Taking away what another recipe has set


def test_false_takes_a_loss_away(tmp_path):
    recipe = load_recipe([write(tmp_path, 'extends = "byot"\n[losses]\nhint = false\n')])
    assert list(recipe.losses) == [name for name in load_recipe(["byot"]).losses if name != "hint"]
    assert load_recipe(["byot"], ["losses.hint=false"]) == recipe


def test_false_takes_a_value_away_that_may_be_absent():
    assert load_recipe(["default"]).optimizer.clip_grad is not None
    assert load_recipe(["default"], ["optimizer.clip_grad=false"]).optimizer.clip_grad is None
    assert load_recipe(["born-again"], ["phases=false"]).phases == []
    assert load_recipe(["ema-teacher"], ["ema=false", "losses.soft=false"]).ema is None


def test_false_stays_false_where_a_truth_is_asked_for():
    assert load_recipe(["baseline"], ["optimizer.decay_norm_and_bias=false"]).optimizer.decay_norm_and_bias is False


def test_unset_brings_the_default_back_and_takes_tables_away():
    unset = [Override.unset("losses.hint"), Override.unset("optimizer.weight_decay"), Override.unset("batch")]
    recipe = load_recipe(["byot"], unset)
    assert "hint" not in recipe.losses
    assert (recipe.optimizer.weight_decay, recipe.batch) == (Optimizer().weight_decay, BatchTable())
    again = read_recipe(["byot"], unset)[1]
    assert not any(key.startswith(("losses.hint", "batch")) for key in again), "what is gone has no source"


def test_unsetting_a_value_of_one_phase_leaves_the_others():
    before, after = (load_recipe(["born-again"], given).phases for given in ([], [Override.unset("phases.1.fresh")]))
    assert (before[1].fresh, after[1].fresh) == (True, False) and before[0] == after[0]


def test_taking_away_what_is_not_there_is_refused():
    assert message(["byot"], [Override.unset("losses.hnt")]) == (
        "--unset losses.hnt: the recipe does not set losses.hnt\n"
        "  expected: one of losses.task, losses.exits, losses.soft, losses.hint\n"
        "  fix:      did you mean 'losses.hint'?"
    )
    assert message(["byot"], ["losses.hnt=false"]) == (
        "--set losses.hnt=false: losses.hnt = false, and there is no losses.hnt\n"
        "  expected: one of losses.task, losses.exits, losses.soft, losses.hint\n"
        "  fix:      did you mean 'losses.hint'?"
    )


# Keys that had another name


def test_an_old_key_is_answered_with_the_new_one():
    samples = {"batch.views": "batch.also.view.of=itself"}
    for (table, old), new in RENAMED.items():
        place = table.replace("NAME", "soft")
        text = samples.get(
            f"{table}.{new}", f"{place}.{old}=0.5" if table != "losses.NAME.weight" else f"{place}={{ {old} = 1 }}"
        )
        said = message(["byot"], [text])
        assert f": {place}: unknown key '{old}'\n" in said and said.endswith(
            f"\n  fix:      {old} is called {new} now"
        ), text
    assert len(RENAMED) == 10


# Files and values that are no recipe


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("epochs = " + "9" * 5000, "an integer is too large"),
        (f"epochs = {2**63}", "an integer is too large"),
        ("title = " + "[" * 3000, "nested too deeply"),
        (f"[{'.'.join('a' * 40)}]\nb = 1", "tables are nested more than 16 deep"),
        ('"" = 1', "recipe: unknown key ''"),
        ('"a b" = 1', "recipe: unknown key 'a b'"),
        ('[losses."[/]"]\nkind = "kl"\non = "final"', "losses: '[/]' is not a name"),
        ('[losses.""]\nkind = "kl"\non = "final"', "losses: '' is not a name"),
        ('[networks."peer.x"]\nmodel = "resnet18"', "networks: 'peer.x' is not a name"),
        ('[batch.views."a-b"]\nof = "itself"', "batch.views: 'a-b' is not a name"),
        ('[signals.exit1]\nkind = "mean"\nof = "all"', "signals.exit1: this is the name of a point"),
        ("[networks.student]\nbranches = 100000000", "networks.student.branches = 100000000"),
        ("epochs = 10000000000", "epochs = 10000000000"),
        ("phases = 1", "phases = 1"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_message(tmp_path, text, wrong):
    file = write(tmp_path, f'extends = "byot"\n{text}\n')
    said = message([file])
    assert said.startswith(f"{file}") and wrong in said.split("\n")[0]
    assert len(said) < 600


def test_phases_that_are_no_tables_say_how_to_write_them():
    assert message(["byot"], ["phases=1"]).endswith('\n  fix:      [[phases]] tables, each with losses = ["NAME"]')


def test_a_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(b"\xef\xbb\xbf" + b'extends = "byot"\nepochs = 3\n')
    assert load_recipe([str(file)]).epochs == 3


def test_a_recipe_whose_path_has_an_emoji_is_read(tmp_path):
    folder = tmp_path / "\N{SNOWMAN} and \N{DOG FACE}"
    folder.mkdir()
    assert load_recipe([write(folder, 'extends = "byot"\nepochs = 3\n')]).epochs == 3


@pytest.mark.parametrize(
    "name", ["x" * 5000, "x" * 5000 + ".toml", "./" + "y/" * 3000 + "x.toml", "a\0b.toml", "~nobody-at-all/x.toml"]
)
def test_a_name_that_can_be_no_path_is_one_message(name):
    assert len(message([name])) < 1000


def test_extends_never_quotes_a_file_that_is_no_recipe(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("password hunter2\n")
    said = message([write(tmp_path, f'extends = "{secret}"\n')])
    assert "hunter2" not in said and said.endswith(
        "is not a .toml file\n  expected: a recipe: a TOML file whose name ends in .toml"
    )


def test_a_pipe_that_is_called_like_a_recipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    assert message([str(tmp_path / "pipe.toml")]).startswith(f"{tmp_path / 'pipe.toml'} is not a regular file\n")


@pytest.mark.parametrize("name", ["x.yaml", "conf/x.json"])
def test_a_recipe_in_another_format_is_answered_with_toml(name):
    assert message([name]).endswith(
        "fix:      recipes are TOML files: sdcli recipes copy default mine.toml makes one to change"
    )


def test_a_recipe_without_losses_says_how_to_get_some(tmp_path):
    assert message([write(tmp_path, "epochs = 3\n")]) == (
        "losses is missing\n  expected: a value: it has no default\n"
        '  fix:      add a [losses.NAME] table, or extends = "baseline"'
    )


def test_recipe_files_are_short():
    lengths = []
    for file in recipe_folder().glob("*.toml"):
        lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
        lengths.append(len(lines))
    assert sorted(lengths)[len(lengths) // 2] < 25


def test_defaults_are_valid():
    assert Recipe.model_validate(tomllib.loads(TASK)).epochs == 200


def test_reading_a_recipe_loads_neither_torch_nor_timm():
    code = "import sys; from sdcli.recipe.load import load_recipe; load_recipe(['byot']); print({'torch', 'timm'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )
