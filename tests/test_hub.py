"""The hub is asked once and for seconds; nothing here goes online."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from conftest import Command
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from sdcli import hub
from sdcli.cli.talk import stages


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from datasets import config

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    for function in (hub._answers, hub._note_cached):
        function.cache_clear()
    yield
    for function in (hub._answers, hub._note_cached):
        function.cache_clear()


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """The repositories that are asked for from here on."""
    asked: list[str] = []

    def repo_info(self: object, repo: str, **options: object) -> object:
        asked.append(f"{options['repo_type']} {repo}")
        return answer()

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    return asked


def raises(error: Exception) -> Any:
    def answer() -> None:
        raise error

    return answer


def status(code: int) -> HfHubHTTPError:
    request = SimpleNamespace(url="https://huggingface.co", method="GET", headers={})
    response: Any = SimpleNamespace(status_code=code, headers={}, request=request)
    return HfHubHTTPError("no", response=response)


@pytest.mark.parametrize("answer", [lambda: None, raises(status(404)), raises(status(401))])
def test_hub_that_answers_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    asked = answering(monkeypatch, answer)
    caplog.set_level(logging.INFO, "sdcli")
    for _ in range(2):
        with hub.reach("timm/some", "model") as silence:
            assert (silence, constants.HF_HUB_OFFLINE) == ("", False)
    assert asked == ["model timm/some"]
    assert caplog.messages == ["asking the Hugging Face hub for timm/some (up to 10 s)"]


@pytest.mark.parametrize("answer", [raises(OSError("no route to host")), raises(status(503)), "waits"])
def test_hub_that_does_not_answer_leaves_the_cache(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    from datasets import config

    released = Event()
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05 if answer == "waits" else 10)
    answering(monkeypatch, released.wait if answer == "waits" else answer)
    caplog.set_level(logging.INFO, "sdcli")
    with hub.reach("some/set", "dataset") as silence:
        assert silence == "the Hugging Face hub does not answer"
        assert constants.HF_HUB_OFFLINE and config.HF_HUB_OFFLINE
    released.set()
    assert not constants.HF_HUB_OFFLINE and not config.HF_HUB_OFFLINE
    assert caplog.messages[1:] == [
        "no answer from the Hugging Face hub: using some/set from the cache (HF_HUB_OFFLINE=1 skips the wait)"
    ]


def test_failure_without_the_hub_is_not_called_a_success(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answering(monkeypatch, raises(OSError()))
    caplog.set_level(logging.INFO, "sdcli")
    with pytest.raises(FileNotFoundError), hub.reach("timm/some", "model"):
        raise FileNotFoundError
    assert len(caplog.messages) == 1 and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("arguments", "repo", "wrong"),
    [
        (["--dataset", "cifar10"], "uoft-cs/cifar10", "'cifar10' is not in the cache"),
        (
            ["--dataset", "digits", "--pretrained"],
            "timm/test_resnet.r160_in1k",
            "pretrained weights of 'test_resnet' are not in the cache",
        ),
    ],
)
def test_training_without_a_network_says_what_it_waits_for_and_ends_with_one_message(
    monkeypatch: pytest.MonkeyPatch, sdcli: Command, tmp_path: Path, arguments: list[str], repo: str, wrong: str
) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    answering(monkeypatch, raises(OSError()))
    result = sdcli("train", "test_resnet", "--recipe", "quick", "--output", tmp_path / "run", *arguments)
    assert (result.code, result.out) == (2, "")
    lines = result.err.splitlines()
    assert lines[-4:-2] == [
        f"asking the Hugging Face hub for {repo} (up to 10 s) …",
        f"error: {wrong}, and the Hugging Face hub does not answer",
    ]
    assert not (tmp_path / "run").exists()


def test_offline_is_the_users_word_and_nobody_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = answering(monkeypatch, lambda: None)
    caplog.set_level(logging.INFO, "sdcli")
    with hub.reach("timm/some", "model") as silence:
        assert silence == "HF_HUB_OFFLINE is set"
    assert not asked and not caplog.messages


def test_retries_are_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    names = ("huggingface_hub", "datasets", "urllib3")
    before = [logging.getLogger(name).level for name in names]
    with hub.quiet():
        for name in (*names, "huggingface_hub.utils._http", "urllib3.connectionpool"):
            logging.getLogger(name).warning("Retrying in 1s")
    assert capfd.readouterr().err == ""
    assert [logging.getLogger(name).level for name in names] == before


def test_command_line_shows_what_is_waited_for_and_keeps_warnings_as_notes(capfd: pytest.CaptureFixture[str]) -> None:
    with stages():
        hub._LOG.info("asking [the hub]")
        hub._LOG.warning("no answer from [the hub]")
    assert tuple(capfd.readouterr()) == ("", "asking [the hub] …\nnote: no answer from [the hub]\n")
