"""`sdcli recipes`, and losses of one's own, as a user types them."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import Command, refused
from processes import finished

from sdcli.cli.tables import GROUPS
from sdcli.method.catalogue import SHELVES, completed
from sdcli.method.losses import LOSSES
from sdcli.network.heads import HEADS
from sdcli.recipe.about import overview
from sdcli.recipe.load import load_recipe, recipe_folder, recipe_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_losses_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (LOSSES, HEADS):
        monkeypatch.setattr(registry, "entries", dict(registry.entries))
    for name in [name for name in sys.modules if name.startswith("sdcli_import_")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_list_has_every_recipe_with_what_it_is(sdcli: Command) -> None:
    listed = sdcli("recipes", "list").out
    assert all(name in listed for name in recipe_names())
    assert "Be your own teacher" in listed and "1905.08094" in listed
    measured = re.search(r"ensemble \d+\.\d+ %", overview("quick").header.measured)
    assert measured and measured[0] in listed and "1 seed" not in listed


def test_the_list_groups_every_recipe_once_and_says_where_to_start(sdcli: Command) -> None:
    grouped = [name for _, names in GROUPS.values() for name in names]
    assert sorted(grouped) == recipe_names()
    lines = sdcli("recipes", "list").out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(" Start here"))
    assert "quick, then default; finetune for your photos" in lines[start]
    end = next(number for number, line in enumerate(lines) if line.startswith(" BYOT"))
    names = [line.split()[0] for line in lines[start + 1 : end] if line[1:2].strip()]
    assert names == ["quick", "default", "finetune"]


def test_the_list_as_json_has_all_that_the_headers_say(sdcli: Command) -> None:
    listed = {recipe["name"]: recipe for recipe in json.loads(sdcli("recipes", "list", "--json").out)}
    assert list(listed) == recipe_names()
    byot = listed["byot"]
    assert byot["paper"] == "https://arxiv.org/abs/1905.08094" and byot["needs"] == []
    assert byot["measured"].startswith("CIFAR-100, test split")
    assert byot["idea"].startswith("Be your own teacher") and byot["sources"] and byot["differs"]
    assert byot["commands"] == ["sdcli train resnet18 --dataset cifar100 --recipe byot"]
    assert listed["quick"]["measured"].endswith("version 0.1.0)")


def test_what_show_prints_is_a_recipe_with_origins_or_without(sdcli: Command, tmp_path: Path) -> None:
    text = sdcli("recipes", "show", "byot", "schedules/transformer", "--set", "epochs=7").out
    assert re.search(r"^epochs = 7 +# --set$", text, re.M)
    assert re.search(r'^opt = "adamw" +# schedules/transformer$', text, re.M)
    assert re.search(r"^reprob = 0.0 +# default$", text, re.M)
    plain = sdcli("recipes", "show", "byot", "schedules/transformer", "--set", "epochs=7", "--plain").out
    assert "#" not in plain
    recipes = []
    for number, said in enumerate((text, plain)):
        file = tmp_path / f"{number}.toml"
        file.write_text(said, encoding="utf-8")
        recipes.append(load_recipe([str(file)]))
    assert recipes == [completed(load_recipe(["byot", "schedules/transformer"], ["epochs=7"]))] * 2
    assert recipes[0].losses["soft"].options["direction"] == "forward"


def test_a_resolved_recipe_differs_from_its_source_in_nothing(sdcli: Command, tmp_path: Path) -> None:
    resolved = tmp_path / "recipe.toml"
    resolved.write_text(sdcli("recipes", "show", "bake", "--plain").out, encoding="utf-8")
    assert json.loads(sdcli("recipes", "diff", resolved, "bake", "--json").out) == {
        "changed": {},
        "removed": {},
        "added": {},
    }


def test_a_copy_is_the_file_as_it_is_and_is_never_written_over(sdcli: Command, tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    assert sdcli("recipes", "copy", "byot", mine).code == 0
    assert mine.read_text() == (recipe_folder() / "byot.toml").read_text()
    assert load_recipe([str(mine)]) == load_recipe(["byot"])
    refused(
        sdcli("recipes", "copy", "quick", mine),
        f"'{mine}' exists already\n  expected: a file that does not exist: nothing is overwritten\n"
        "  fix:      another name",
    )


def test_a_copy_still_finds_what_it_extends_by_path(sdcli: Command, tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_text('extends = "byot"\nepochs = 7\n')
    (tmp_path / "child.toml").write_text('# Mine.\nextends = "./parent.toml"  # near\n')
    (tmp_path / "elsewhere").mkdir()
    sdcli("recipes", "copy", tmp_path / "child.toml", tmp_path / "elsewhere" / "copy.toml")
    assert load_recipe([str(tmp_path / "elsewhere" / "copy.toml")]).epochs == 7


def test_a_copy_still_finds_a_list_that_it_extends(sdcli: Command, tmp_path: Path) -> None:
    (tmp_path / "parent.toml").write_text("epochs = 7\n")
    (tmp_path / "child.toml").write_text('extends = [\n  "byot",\n  "./parent.toml",\n]\n[batch]\nsize = 3\n')
    (tmp_path / "elsewhere").mkdir()
    sdcli("recipes", "copy", tmp_path / "child.toml", tmp_path / "elsewhere" / "copy.toml")
    recipe = load_recipe([str(tmp_path / "elsewhere" / "copy.toml")])
    assert (recipe.epochs, recipe.batch.size, "hint" in recipe.losses) == (7, 3, True)


@pytest.mark.parametrize("place", ["no-folder/mine.toml"])
def test_a_copy_to_where_nothing_can_be_written_is_refused(place: str, sdcli: Command, tmp_path: Path) -> None:
    result = sdcli("recipes", "copy", "byot", tmp_path / place)
    assert result.code == 2 and f"'{tmp_path / place}' cannot be written: No such file or directory" in result.err


def test_every_recipe_is_right_with_a_model(sdcli: Command) -> None:
    result = sdcli("recipes", "check", *recipe_names(), "--model", "test_resnet", "--image-size", 64)
    # It is `byot` with its hint turned off: what the note says is what it is for.
    notes = {("byot-nohint", "losses.hint has no effect: its weight is 0")}
    for name in recipe_names():
        for network in load_recipe([name]).awaited:
            how = "--teacher RUN" if network == "teacher" else f"--set networks.{network}.weights=RUN"
            notes.add((name, f"networks.{network} is to be named: {how}"))
    assert result.code == 0 and set(result.err.splitlines()) == {f"note: {name}: {text}" for name, text in notes}
    lines = result.out.splitlines()
    assert [line.split(":")[0] for line in lines] == recipe_names()
    assert (
        "byot: ok  4 losses (cross_entropy, kl, hint), 200 epochs, batch size 128, momentum, learning rate 0.1, multistep; "
        in (result.out)
    )
    assert lines[recipe_names().index("byot")].endswith("test_resnet: exit1, exit2, exit3, final")


BYOT = 'extends = "byot"\n'
MISTAKES = {
    "a key that is misspelt": (
        BYOT + "epoch = 30\n",
        "FILE: recipe: unknown key 'epoch'\n"
        "  expected: one of batch, best, ema, epochs, extends, losses, networks, optimizer, paper, phases, "
        "random_weights, rules, schedule, signals, title, updates\n"
        "  fix:      did you mean 'epochs'?",
    ),
    "a key in the wrong table": (
        BYOT + "[optimizer]\nwarmup_epochs = 5\n",
        "FILE: optimizer: unknown key 'warmup_epochs'\n"
        "  expected: one of clip_grad, decay_norm_and_bias, head_lr, layer_decay, lr, momentum, nonfinite, opt, weight_decay\n"
        "  fix:      warmup_epochs belongs in [schedule]",
    ),
    "a table in the wrong place": (
        BYOT + '[augment]\npolicy = "trivial"\n',
        "FILE: recipe: unknown key 'augment'\n"
        "  expected: one of batch, best, ema, epochs, extends, losses, networks, optimizer, paper, phases, "
        "random_weights, rules, schedule, signals, title, updates\n"
        "  fix:      [batch.augment]",
    ),
    "a loss under another name": (
        BYOT + '[losses.soft]\nkind = "kl_div"\n',
        "FILE: losses.soft.kind: unknown loss 'kl_div'\n"
        f"  expected: one of kl, dkd, nkd, dist, tf_nkd, similarity, …; {len(LOSSES.entries)} in all: sdcli recipes losses\n"
        "  fix:      did you mean 'kl'?",
    ),
    "a key of another loss": (
        BYOT + "[losses.task]\ntemperature = 3.0\n",
        "FILE: losses.task: unknown key 'temperature'\n"
        "  expected: one of smooth_over, smoothing, standardize\n"
        "  fix:      kinds that have temperature: crd, virtual_teacher, kl, soft_cross_entropy, balanced_kl, dkd, nkd, dist",
    ),
    "a number in quotes": (
        BYOT + '[losses.soft]\nweight = "0.5"\n',
        "FILE: losses.soft.weight = '0.5'\n"
        "  expected: a valid number, or a table, or a valid list\n"
        "  fix:      without quotes: weight = 0.5",
    ),
    "a point that there is not": (
        BYOT + '[losses.exits]\non = "exit"\n',
        "FILE: losses.exits.on = 'exit'\n"
        "  expected: 'final', 'exits', 'all', 'exit1', 'exit2', … or a list of these\n"
        "  fix:      did you mean 'exits'?",
    ),
    "a loss without its target": (
        '[losses.task]\nkind = "cross_entropy"\non = "all"\n[losses.soft]\nkind = "kl"\non = "exits"\n',
        "FILE: losses.soft: kind = 'kl' compares with another point, but no target is set\n"
        "  expected: target = 'final', 'next' or an exit\n"
        '  fix:      add target = "final" to [losses.soft]',
    ),
    "a value out of its range": (
        BYOT + "[optimizer]\nmomentum = 9\n",
        "FILE: optimizer.momentum = 9\n  expected: less than 1\n  fix:      the default is 0.9",
    ),
    "a head under another name": (
        BYOT + '[networks.student]\nhead = "bottleneck-attention"\n',
        "FILE: networks.student.head: unknown head 'bottleneck-attention'\n"
        "  expected: one of bottleneck, bottleneck+attention, linear, patch, sepconv, sepconv+attention, tokens\n"
        "  fix:      did you mean 'bottleneck+attention'?",
    ),
    "a policy under another name": (
        BYOT + '[batch.augment]\naa = "randaugment"\n',
        "FILE: batch.augment.aa: unknown augmentation policy 'randaugment'\n"
        "  expected: none, cifar10, trivial, or timm's rand, augmix, original, originalr, v0, v0r, 3a with their "
        "options (rand-m9-mstd0.5-inc1)\n"
        "  fix:      did you mean 'rand'?",
    ),
    "text without quotes": (
        BYOT + "[optimizer]\nopt = adamw\n",
        "FILE is not TOML: Invalid value (at line 3, column 7)\n"
        "  expected: [TABLE] and KEY = VALUE\n"
        '  fix:      text stands in quotes: opt = "adamw"',
    ),
    "a table that is not closed": (
        BYOT + "[optimizer\nlr = 0.1\n",
        "FILE is not TOML: Expected ']' at the end of a table declaration (at line 2, column 11)\n"
        "  expected: [TABLE] and KEY = VALUE\n"
        "  fix:      look at line 2: [optimizer",
    ),
    "a parent that there is not": (
        'extends = "byot-jurnal"\n',
        "FILE: extends = 'byot-jurnal': unknown recipe 'byot-jurnal'\n"
        "  expected: one of byot-journal, byot-modern, byot-auto, byot-scan, byot-nohint, byot, …; "
        f"{len(recipe_names())} in all: sdcli recipes list\n"
        "  fix:      did you mean 'byot-journal'?",
    ),
    "losses without names": (
        '[losses]\nkind = "cross_entropy"\non = "all"\n',
        "FILE: losses.kind = 'cross_entropy'\n  expected: a table\n  fix:      [losses.NAME], with a name of your own",
    ),
    "one number where a list is due": (
        BYOT + "[schedule]\ndecay_milestones = 100\n",
        "FILE: schedule.decay_milestones = 100\n  expected: a valid list\n  fix:      in brackets: decay_milestones = [100]",
    ),
    "an optimizer under another name": (
        BYOT + '[optimizer]\nopt = "adam_w"\n',
        "FILE: optimizer.opt: unknown optimizer 'adam_w'\n"
        "  expected: one of adamw, cadamw, nadamw, radamw, adam, cnadamw, …; 101 in all\n"
        "  fix:      did you mean 'adamw'?",
    ),
    "a teacher that there is not": (
        BYOT + '[losses.soft]\ntarget = "teacher.final"\n',
        "FILE: losses.soft.target = 'teacher.final': there is no networks.teacher\n"
        "  expected: one of student\n"
        "  fix:      add a [networks.teacher] table, or a phase with teacher = true",
    ),
    "a warm-up as long as the run": (
        BYOT + "epochs = 5\n[schedule]\nwarmup_epochs = 5\n",
        "FILE: schedule.warmup_epochs = 5 lasts as long as the run (epochs = 5)\n"
        "  expected: fewer epochs than the run, or a fraction of the run (below 1)\n"
        "  fix:      --set schedule.warmup_epochs=0.05",
    ),
    "a part that is no recipe of its own": (
        "epochs = 30\n",
        "FILE: losses is missing\n  expected: a value: it has no default\n"
        '  fix:      add a [losses.NAME] table, or extends = "baseline"',
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_file_key_value_and_what_to_do(mistake: str, sdcli: Command, tmp_path: Path) -> None:
    text, message = MISTAKES[mistake]
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    refused(sdcli("recipes", "check", file), message.replace("FILE", str(file)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.yaml", "unknown recipe 'mine.yaml'\n"
         f"  expected: one of fitnet, default, baseline, finetune, exits-then-all, dml, …; {len(recipe_names())} in all: sdcli recipes list\n"
         "  fix:      recipes are TOML files: sdcli recipes copy default mine.toml makes one to change"),
        ("./byott.toml", "recipe file 'byott.toml' does not exist\n"
         "  expected: a .toml file, or a name of sdcli recipes list\n"
         "  fix:      did you mean 'byot'?"),
        ("./mina.toml", "recipe file 'mina.toml' does not exist\n"
         "  expected: a .toml file, or a name of sdcli recipes list\n"
         "  fix:      did you mean 'mine.toml'?"),
        ("my-recipe", "unknown recipe 'my-recipe'\n"
         f"  expected: one of mixup, baseline, random-weights, byot-scan, one-exits, prue, …; {len(recipe_names())} in all: sdcli recipes list\n"
         "  fix:      for your own file write its path: ./my-recipe.toml"),
    ],
)  # fmt: skip
def test_a_recipe_that_there_is_not_is_explained(
    name: str, message: str, sdcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(BYOT, encoding="utf-8")
    Path("mine.yaml").write_text("extends: byot\n", encoding="utf-8")
    refused(sdcli("recipes", "check", name), message)


def test_training_tells_the_same_mistake_before_it_looks_for_data(sdcli: Command, tmp_path: Path) -> None:
    text, message = MISTAKES["a policy under another name"]
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    result = sdcli("train", "test_resnet", "--dataset", "no-such-data", "--recipe", file, "--device", "cpu")
    refused(result, message.replace("FILE", str(file)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BYOT + '[losses.soft]\non = "exit9"\n',
            "FILE: losses.soft.on = 'exit9': the network has no such point\n"
            "  expected: one of exit1, exit2, exit3, final\n  fix:      did you mean 'exit3'?",
        ),
        (
            '[losses.task]\nkind = "cross_entropy"\non = "final"\n',
            "FILE: no loss teaches the classifier of exit1\n  expected: a loss on the logits of every point\n"
            '  fix:      add a loss with on = "all", or set networks.student.exits = "none"',
        ),
        (
            BYOT + '[networks.student]\nhead = "linear"\n',
            "FILE: recipes/byot.toml: losses.hint at exit1: the embeddings have different widths: 32 and 96\n"
            "  expected: embeddings of the same width\n"
            '  fix:      adapt = "auto", or a head whose embedding has the target\'s width, such as head = "bottleneck"',
        ),
    ],
)
def test_a_model_shows_points_widths_and_exits_that_nothing_teaches(
    text: str, message: str, sdcli: Command, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8")
    assert sdcli("recipes", "check", file).code == 0
    refused(sdcli("recipes", "check", file, "--model", "test_resnet"), message.replace("FILE", str(file)))


@pytest.mark.parametrize("file", ["./nofile.safetensors", "/no/such/file.safetensors"])
def test_starting_weights_that_do_not_exist_are_missed_by_the_check(
    file: str, sdcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(BYOT + f'[networks.student]\nweights = "{file}"\n', encoding="utf-8")
    refused(
        sdcli("recipes", "check", "./mine.toml"),
        f"{tmp_path / 'mine.toml'}: networks.student.weights: checkpoint '{Path(file)}' does not exist\n"
        "  expected: a run folder, or a file such as RUN/best.safetensors",
    )


def test_starting_weights_of_another_format_are_refused_with_the_lines_that_convert_them(
    sdcli: Command, tmp_path: Path
) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "old.pth")
    file = write(tmp_path, BYOT + f'[networks.student]\nweights = "{tmp_path / "old.pth"}"\n', "mine.toml")
    result = sdcli("recipes", "check", file)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(
        f"error: {file}: networks.student.weights: '{tmp_path / 'old.pth'}' cannot be read as "
    )
    code = result.err.partition("fix:      convert it in Python: ")[2]
    exec(f"import torch, safetensors.torch; {code}")
    assert (tmp_path / "old.safetensors").is_file()


def test_what_has_no_effect_is_noted(sdcli: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(BYOT + "epochs = 100\n[schedule]\ndecay_milestones = [75, 130]\n[losses.hint]\nweight = 0\n")
    said = " ".join(sdcli("recipes", "check", file).err.split())
    assert "schedule.decay_milestones: the run ends at epoch 100 without reaching 130" in said
    assert "losses.hint has no effect: its weight is 0" in said


def test_a_difference_is_a_table_options_or_json(sdcli: Command) -> None:
    table = sdcli("recipes", "diff", "byot", "byot-modern").out
    assert "byot → byot-modern" in table and re.search(r'optimizer.opt +"momentum" +"sgd"', table)
    assert re.search(r"optimizer.clip_grad +- +5.0", table)
    options = sdcli("recipes", "diff", "byot", "byot-modern", "--as-set").out
    assert "--set optimizer.opt=sgd\n" in options and "--set 'schedule.decay_milestones=[]'\n" in options
    found = json.loads(sdcli("recipes", "diff", "byot", "byot-modern", "--json").out)
    assert found["changed"]["optimizer.opt"] == {"from": "momentum", "to": "sgd"}
    assert found["added"] == {"optimizer.clip_grad": 5.0} and found["removed"] == {}
    same = sdcli("recipes", "diff", "byot", "byot")
    assert same.out == "" and "byot and byot do not differ" in same.err


@pytest.mark.parametrize("shelf", ["losses", "signals"])
def test_every_loss_and_signal_has_its_formula(shelf):
    for item in SHELVES[shelf].items():
        assert item.formula, item.name


@pytest.mark.parametrize("shelf", list(SHELVES))
def test_a_shelf_tells_every_name_with_its_keys(shelf: str, sdcli: Command) -> None:
    items = SHELVES[shelf].items()
    assert items and all(item.summary for item in items)
    table = sdcli("recipes", shelf).out
    assert [item["name"] for item in json.loads(sdcli("recipes", shelf, "--json").out)] == [i.name for i in items]
    for item in items:
        assert item.name in table
        assert all(f"{key.name} = " in table for key in item.keys)


def test_a_loss_is_told_with_types_ranges_defaults_and_paper(sdcli: Command) -> None:
    (kl,) = json.loads(sdcli("recipes", "losses", "kl", "--json").out)
    assert (kl["reads"], kl["against"], kl["papers"][0]) == ("logits", "target", "1503.02531")
    assert kl["keys"][0] == {"name": "temperature", "type": "number > 0", "default": 4.0, "required": False}
    assert kl["keys"][2]["type"] == '"forward" or "reverse"'
    assert kl["summary"].startswith("KL divergence") and "et al. 2015, arXiv:1503.02531" in kl["summary"]
    said = sdcli("recipes", "losses", "kl").out
    assert "A higher `temperature`" in said and "https://arxiv.org/abs/1503.02531" in said
    assert "did you mean 'kl'?" in sdcli("recipes", "losses", "kll").err


def test_docs_methods_is_what_its_script_makes() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_methods import FOLDER, keys, methods
    finally:
        sys.path.pop(0)
    for name, made in (("methods", methods()), ("recipes", keys())):
        assert (FOLDER / f"{name}.md").read_text(encoding="utf-8") == made, "run python docs/make_methods.py"
    rows = [line.split(" | ") for line in keys().splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    assert all(row[1] and row[-1].strip(" |") for row in rows), "every key has a type, and words"


# Losses of one's own

MINE = (
    "from sdcli import LOSSES\n"
    '@LOSSES.register("mine", reads="logits")\n'
    "def mine(student, teacher, batch, *, scale: float = 1.0):\n"
    '    """Mine (Me 2024, arXiv:2401.00001)."""\n'
    "    return (student - teacher).abs().mean(dim=1) * scale\n"
)


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_an_imported_loss_is_listed_and_checked_like_ours(sdcli: Command, tmp_path: Path) -> None:
    file = write(tmp_path, MINE)
    assert "scale = 1.0  number" in sdcli("recipes", "losses", "mine", "--import", file).out
    recipe = write(tmp_path, BYOT + '[losses.soft]\nkind = "mine"\nscale = 2.0\n', "mine.toml")
    # What byot gave its kl is no key of this loss.
    assert "unknown key 'temperature'" in sdcli("recipes", "check", recipe, "--import", file).err
    recipe.write_text(BYOT + '[losses.more]\nkind = "mine"\non = "exits"\ntarget = "final"\nscale = "2"\n')
    refused(
        sdcli("recipes", "check", recipe, "--import", file),
        f"{recipe}: losses.more.scale = '2'\n  expected: a valid number\n  fix:      without quotes: scale = 2",
    )


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (None, ": there is no such file"),
        ("x = 1\nimport no_such_module\n", ", line 2: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:\n", ", line 1: SyntaxError: invalid syntax (mine.py, line 1)"),
        (MINE.replace('"mine"', '"kl"'), ": loss 'kl' is registered twice"),
        (MINE + MINE, ": loss 'mine' is registered twice"),
        ("raise SystemExit(1)\n", ", line 1: SystemExit: 1"),
    ],
)
def test_an_import_that_fails_says_where_and_why(text: str | None, wrong: str, sdcli: Command, tmp_path: Path) -> None:
    file = write(tmp_path, text) if text else tmp_path / "mine.py"
    for command in (["losses"], ["check", "byot"]):
        result = sdcli("recipes", *command, "--import", file)
        assert (result.code, result.out) == (2, "") and "Traceback" not in result.err
        assert result.err.startswith(f"error: --import {file}{wrong}\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (', reads="logits"', "", "loss 'mine' is registered with reads=''\n  expected: one of features, embedding, logits, signal\n"
         '  fix:      @LOSSES.register("mine", reads="logits")'),
        ("teacher, batch, *,", "target, batch, *,", "loss 'mine' takes (student, target, batch)\n"
         "  expected: (student, batch) or (student, teacher, batch), with these names; recipe keys follow a *\n"
         "  fix:      def mine(student, teacher, batch, *, …)"),
        ("batch, *,", "batch,", "loss 'mine' takes (student, teacher, batch, scale)\n"
         "  expected: (student, batch) or (student, teacher, batch), with these names; recipe keys follow a *\n"
         "  fix:      def mine(student, teacher, batch, *, …)"),
    ],
)  # fmt: skip
def test_an_imported_loss_of_another_form_is_refused(
    old: str, new: str, message: str, sdcli: Command, tmp_path: Path
) -> None:
    file = write(tmp_path, MINE.replace(old, new))
    recipe = write(tmp_path, BYOT + '[losses.more]\nkind = "mine"\non = "exits"\ntarget = "final"\n', "mine.toml")
    refused(sdcli("recipes", "check", recipe, "--import", file), f"{recipe}: {message}")


def test_an_imported_loss_that_raises_is_named_with_its_line(
    sdcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        'from sdcli import LOSSES\n@LOSSES.register("raises", reads="logits")\ndef raises(student, batch):\n'
        '    return {}["weight"]\n'
    )
    result = sdcli(
        "train", "test_vit", "--dataset", "digits", "--recipe", "baseline", "--device", "cpu", "--limit-train", 48,
        "--set", "losses.task.kind=raises", "--import", "own.py", "--output", "run",
    )  # fmt: skip
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.endswith(
        f"error: {tmp_path}/own.py, line 4: KeyError: 'weight'\n"
        "  expected: losses, signals and heads that run on what this network returns\n"
        f"  fix:      correct it, then: sdcli train --resume run --import {tmp_path}/own.py\n"
    )


def test_an_imported_head_without_a_classifier_is_refused(sdcli: Command, tmp_path: Path) -> None:
    file = write(tmp_path, HEAD.replace("self.classifier", "self.last"))
    recipe = write(tmp_path, 'extends = "deep-supervision"\n[networks.student]\nhead = "flat"\n', "mine.toml")
    refused(
        sdcli("recipes", "check", recipe, "--import", file, "--model", "test_resnet"),
        f"{recipe}: head 'flat' has no linear classifier\n"
        "  expected: a module whose classifier is an nn.Linear that reads the embedding\n"
        "  fix:      self.classifier = nn.Linear(embedding_dim, num_classes)",
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("super().__init__()", "super().__init__(); [][1]",
         "head 'flat' cannot be built after layer1, whose map is 32x40x40: IndexError: list index out of range\n"
         "  expected: a head that fits every stage: HEAD(plan, stage, num_classes), called with (features, prefix)"),
        ("features.mean(dim=(2, 3))", "features.mean(dim=(2, 4))",
         "head 'flat' does not run after layer1, whose map is 32x40x40: IndexError: Dimension out of range (expected to "
         "be in range of [-4, 3], but got 4)\n"
         "  expected: a head that fits every stage: HEAD(plan, stage, num_classes), called with (features, prefix)"),
        ("return embedding, ", "return ",
         "head 'flat' after layer1 returns [2, 1000] for 2 images\n"
         "  expected: a tuple: the embedding that its classifier reads [2, 32] and the logits [2, 1000]\n"
         "  fix:      return embedding, self.classifier(embedding)"),
        ("return embedding, ", "return features, ",
         "head 'flat' after layer1 returns [2, 32, 40, 40] and [2, 1000] for 2 images\n"
         "  expected: a tuple: the embedding that its classifier reads [2, 32] and the logits [2, 1000]\n"
         "  fix:      return embedding, self.classifier(embedding)"),
    ],
)  # fmt: skip
def test_an_imported_head_that_fails_is_named_with_its_stage_before_any_data(
    old: str, new: str, message: str, sdcli: Command, tmp_path: Path
) -> None:
    assert old in HEAD
    file = write(tmp_path, HEAD.replace(old, new))
    recipe = write(tmp_path, 'extends = "deep-supervision"\n[networks.student]\nhead = "flat"\n', "mine.toml")
    refused(sdcli("recipes", "check", recipe, "--import", file, "--model", "test_resnet"), f"{recipe}: {message}")
    result = sdcli("train", "test_resnet", "--dataset", "no-such-data", "--recipe", recipe, "--import", file)
    refused(result, message)


def documented(heading: str, folder: Path) -> tuple[Path, Path]:
    """The code and the recipe of a section of docs/extending.md, as files."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    code, recipe = (re.sub(r"(?m)^    ", "", block) for block in re.findall(r"\n\n((?:    .*\n|\n)+)", section)[:2])
    return write(folder, code), write(folder, recipe, "mine.toml")


@pytest.mark.parametrize("heading", ["A loss", "A head", "A signal"])
def test_the_examples_of_extending_sdcli_train_and_are_scored(heading: str, sdcli: Command, tmp_path: Path) -> None:
    code, recipe = documented(heading, tmp_path)
    checked = sdcli("recipes", "check", recipe, "--import", code, "--model", "test_resnet")
    assert checked.code == 0, checked.err
    few = ("--limit-train", 32, "--limit-val", 16, "-j", 0, "--device", "cpu", "--epochs", 1, "--set", "batch.size=16")
    trained = sdcli(
        "train", "test_resnet", "--dataset", "digits", "--recipe", recipe, "--import", code, *few,
        "--output", tmp_path / "run",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    scored = sdcli("eval", tmp_path / "run", "--import", code, "--limit", 16, "-j", 0, "--device", "cpu", "--json")
    assert [row["point"] for row in json.loads(scored.out)["exits"]] == ["exit1", "exit2", "exit3", "final"]


def test_a_loss_of_ones_own_resumes_and_is_scored_without_its_file(tmp_path: Path) -> None:
    (folder := tmp_path / "work").mkdir()
    documented("A loss", folder)
    quick = [
        "--set",
        "epochs=1",
        "--set",
        "batch.size=16",
        "--limit-train",
        32,
        "--limit-val",
        16,
        "-j",
        0,
        "--device",
        "cpu",
    ]
    trained = finished(
        "train", "test_resnet", "--dataset", "digits", "--recipe", "mine.toml", "--import", "mine.py", *quick,
        "--output", "runs/mine", cwd=folder,
    )  # fmt: skip
    assert trained.wait() == 0, trained.err
    assert json.loads((folder / "runs/mine/run.json").read_text())["imports"] == [str(folder / "mine.py")]
    again = finished("train", "--resume", folder / "runs/mine", "--epochs", 2, cwd=tmp_path)
    assert again.wait() == 2
    assert again.err == (
        f"error: the run in '{folder / 'runs/mine'}' was started with --import {folder / 'mine.py'}\n"
        "  expected: the same --import again: for safety, files named in a run folder are not imported automatically\n"
        f"  fix:      if you trust these files: sdcli train --resume {folder / 'runs/mine'} --import {folder / 'mine.py'}\n"
    )
    resumed = finished("train", "--resume", "work/runs/mine", "--epochs", 2, "--import", "work/mine.py", cwd=tmp_path)
    assert resumed.wait() == 0, resumed.err
    assert len((folder / "runs/mine/log.jsonl").read_text().splitlines()) == 2
    assert "has changed" not in resumed.err

    moved = (folder / "mine.py").rename(tmp_path / "moved.py")
    scored = finished("eval", "runs/mine/last.safetensors", "--limit", 16, "-j", 0, "--device", "cpu", cwd=folder)
    assert scored.wait() == 0, scored.err
    moved.write_text(moved.read_text() + "# A remark.\n")
    moved = moved.rename(tmp_path / "mine.py")
    again = finished("train", "--resume", "runs/mine", "--epochs", 3, "--import", moved, cwd=folder)
    assert again.wait() == 0, again.err
    assert f"{moved} has changed since the run was last saved; the run resumes with the new version" in again.err


HEAD = """
from torch import nn
from sdcli import HEADS

@HEADS.register("flat")
class Flat(nn.Module):
    \"\"\"A linear layer on the pooled map.\"\"\"

    def __init__(self, plan, stage, num_classes):
        super().__init__()
        self.classifier = nn.Linear(stage.num_chs, num_classes)

    def forward(self, features, prefix):
        embedding = features.mean(dim=(2, 3))
        return embedding, self.classifier(embedding)
"""


def test_a_checkpoint_with_an_imported_head_needs_its_file(
    sdcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = write(tmp_path, HEAD), tmp_path / "run"
    trained = sdcli(
        "train", "test_resnet", "--dataset", "digits", "--recipe", "deep-supervision", "--import", file,
        "--set", "networks.student.head=flat", "--epochs", 1, "-b", 16, "--limit-train", 16, "--limit-val", 8, "-j", 0,
        "--device", "cpu", "--output", run,
    )  # fmt: skip
    assert trained.code == 0, trained.err
    short = ("--limit", 8, "-j", 0, "--device", "cpu")
    assert sdcli("eval", run / "last.safetensors", *short, "--import", file).code == 0
    monkeypatch.setattr(HEADS, "entries", {name: entry for name, entry in HEADS.entries.items() if name != "flat"})
    refused(
        sdcli("eval", run / "last.safetensors", *short),
        f"'{run / 'last.safetensors'}': the head of exit1 is 'flat', which this sdcli does not have\n"
        "  expected: the file that registers it, which it was trained with\n"
        "  fix:      add --import FILE.py to the command; in Python, import that file first",
    )


def test_a_difference_is_shown_between_recipes_that_are_joined(sdcli: Command, tmp_path: Path) -> None:
    result = sdcli("recipes", "diff", "default", "baseline+schedules/cosine", "--json")
    assert result.code == 0 and "optimizer" not in result.out and "networks.student.exits" in result.out
    (tmp_path / "a+b.toml").write_text('extends = "baseline"\n')
    assert "do not differ" in sdcli("recipes", "diff", "baseline", tmp_path / "a+b.toml").err
    wrong = sdcli("recipes", "diff", "default", "baseline+schedules/cosin")
    assert wrong.code == 2 and wrong.err.startswith("error: unknown recipe 'schedules/cosin'\n")


def test_the_options_of_a_difference_lead_from_one_recipe_to_the_other(sdcli: Command) -> None:
    for one, other in [("byot", "default"), ("ps-kd", "baseline"), ("born-again", "baseline"), ("default", "one")]:
        options = shlex.split(sdcli("recipes", "diff", one, other, "--as-set").out)
        there = sdcli("recipes", "show", one, *options, "--plain")
        wanted = sdcli("recipes", "show", other, "--plain")
        assert there.code == 0, there.err
        alike = [tomllib.loads(text.out) for text in (there, wanted)]
        for tables in alike:
            tables.pop("title"), tables.pop("paper", None)
        assert alike[0] == alike[1], (one, other)
