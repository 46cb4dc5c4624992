"""The option parser's errors in the form of all others: what was wrong, what was expected, how to fix it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sdcli.cli.timm_flags import ELSEWHERE, OTHERS, TIMM
from sdcli.errors import UserError, did_you_mean

# typer shows few of its parser's classes: the base of all its errors is reached through one that it does show.
_UsageError: Any = typer.BadParameter.__bases__[0]


class _Help:
    """Shows `--help` as the flag that it is."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        option.metavar = ""
        return option


class Command(_Help, TyperCommand):
    """One command."""


class Group(_Help, TyperGroup):
    """A command that has commands."""


class Commands(Group):
    """All of `sdcli`; raises UserError for a command line that cannot be parsed."""

    _typed: Sequence[str] = ()

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        self._typed = list(args)
        with self._user_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with self._user_errors():
            return super().invoke(ctx)

    @contextmanager
    def _user_errors(self) -> Iterator[None]:
        try:
            yield
        except _UsageError as error:
            # Without arguments a group of commands prints its help.
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            raise _explained(error, self, self._typed) from None


def _explained(error: Any, root: Any, typed: Sequence[str]) -> UserError:
    kind = type(error).__name__
    command, name = _command(root, typed)
    if kind == "NoSuchOption":
        return _unknown_option(error.option_name, root, typed)
    if kind == "BadOptionUsage":
        param = next((param for param in command.params if error.option_name in param.opts), None)
        if param is None or param.is_flag:
            return UserError(f"{error.option_name} takes no value", error.option_name)
        return UserError(f"{error.option_name} has no value", _expected(param))
    if kind == "MissingParameter":
        return UserError(f"{_label(error.param)} is missing", _expected(error.param), _example(command, name))
    if kind == "BadParameter":
        return _bad_value(error)
    if found := re.match(r"No such command (['\"])(.*?)\1", error.message):
        names = list(command.commands)
        fix = did_you_mean(found[2], names) or f"{name} --help"
        return UserError(f"{name} has no command '{found[2]}'", f"one of {', '.join(names)}", fix)
    if found := re.search(r"unexpected extra argument.*?\((?!s\))(.*)\)$", error.message):
        word = found[1].split()[0]
        taken = " ".join([name, *(_label(param) for param in command.params if param.param_type_name == "argument")])
        return misplaced(word, command, name) or UserError(f"unexpected argument '{word}'", taken, f"{name} --help")
    return UserError(error.message, f"a command line as {name} --help shows it")


def _unknown_option(typed_name: str, root: Any, typed: Sequence[str]) -> UserError:
    command, name = _command(root, typed)
    # Of "-epochs" the parser names "-e" alone.
    word = next((w for w in typed if w.startswith(typed_name)), typed_name).partition("=")[0]
    flag = "--" + word.lstrip("-").replace("_", "-")
    expected = f"an option that {name} --help lists"
    if flag not in _options(command) and (found := _replacement(flag, command, _value_of(word, typed))):
        whose, answer = found
        return UserError(f"{whose}: {answer}", expected)
    others = [other.name for other in root.commands.values() if flag in _options(other)]
    fix = did_you_mean(flag, _options(command))
    if others and flag not in _options(command):
        fix = f"{flag} is an option of sdcli {others[0]}"
    return UserError(f"{name} has no option {word}", expected, fix)


def _replacement(flag: str, command: Any, value: str | None) -> tuple[str, str] | None:
    """Whose option it is and what `sdcli` has in its place; None where the table does not know it."""
    answer = ELSEWHERE.get(command.name, {}).get(flag) or TIMM.get(flag) or OTHERS.get(flag)
    if answer is None:
        return None
    who = "sdcli"
    if option := re.match(r"--[\w-]+", answer):
        who = "sdcli" if option[0] in _options(command) else "sdcli train"
        answer = f"has {answer}"
    if value is not None:
        answer = answer.replace("VALUE", shlex.quote(value))
    return f"{flag} is timm's" if flag in TIMM else f"no option {flag}", f"{who} {answer}"


def misplaced(word: str, command: Any, name: str) -> UserError | None:
    """The error for a KEY=VALUE that is no option's value; None for any other word."""
    from sdcli.recipe.explain import keys_at, table_of

    found = re.fullmatch(r"([A-Za-z][\w.-]*)=(.*)", word)
    if not found:
        return None
    key, value = found[1], found[2]
    flag = "--" + key.replace("_", "-")
    if flag in _options(command):
        fix = f"{flag} {shlex.quote(value)}"
    elif "." not in key and (replacement := _replacement(flag, command, value)):
        fix = replacement[1].partition(" has ")[2] or replacement[1].rpartition(": ")[2]
    elif "." in key or key in keys_at([]):
        fix = f"--set {shlex.quote(word)}"
    elif place := table_of(key).replace("networks.NAME", "networks.student"):
        fix = f"--set {shlex.quote(f'{place}.{word}')}"
    else:
        fix = f"{name} --help"
    return UserError(
        f"unexpected argument '{word}'", "options as --NAME VALUE, keys of the recipe as --set KEY=VALUE", fix
    )


def _bad_value(error: Any) -> UserError:
    """A value of the wrong type or out of range; the parser's own words leave out what was typed."""
    param, cause = error.param, error.__cause__
    problems = cause.errors(include_url=False) if hasattr(cause, "errors") else []
    typed = f" {problems[0]['input']}" if problems else ""
    choices = _choices(param)
    return UserError(f"invalid value: {_label(param)}{typed}", _expected(param), did_you_mean(typed.strip(), choices))


def _expected(param: Any) -> str:
    """What an option takes, in words."""
    if choices := _choices(param):
        return f"one of {', '.join(choices)}"
    annotation = param.type_descriptor.annotation
    what = {int: "an integer", float: "a number"}.get(annotation)
    if what is None:
        words = param.help.partition(" [default")[0].rstrip(".")
        words = words[:1].lower() + words[1:]
        return words if param.param_type_name == "argument" else f"{param.metavar}: {words}"
    if param.min is None:
        return what
    least = _plain(param.min)
    return f"{what} of {least} or more" if param.max is None else f"{what} from {least} to {_plain(param.max)}"


def _plain(number: float) -> str:
    """1 for 1.0, and all digits of an integer."""
    return str(int(number)) if number == int(number) else str(number)


def _choices(param: Any) -> list[str]:
    return [str(choice) for choice in param.type_descriptor.choices or ()] if param.type_descriptor.is_choice else []


def _label(param: Any) -> str:
    """An option by its long name, an argument by what the help calls it."""
    return max(param.opts, key=len) if param.param_type_name == "option" else str(param.metavar or param.name.upper())


def _options(command: Any) -> list[str]:
    return [name for param in command.params for name in param.opts if name.startswith("--")]


def _value_of(word: str, typed: Sequence[str]) -> str | None:
    """What was typed as the value of an option, behind it or after its "="."""
    for place, other in enumerate(typed):
        if other.startswith(f"{word}="):
            return other.partition("=")[2]
        if other == word and place + 1 < len(typed) and not typed[place + 1].startswith("-"):
            return typed[place + 1]
    return None


def _command(root: Any, typed: Sequence[str]) -> tuple[Any, str]:
    """The command that was typed, and how it is typed, also where it was started as `python -m sdcli`."""
    command, names = root, ["sdcli"]
    for word in typed:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
        names.append(word)
    return command, " ".join(names)


def _example(command: Any, name: str) -> str:
    """The first example of a command's help."""
    found = re.search(r"Example: +(.*)", command.epilog or "")
    return found[1] if found else f"{name} --help"
