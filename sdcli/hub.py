"""Checks once, for a few seconds, whether the Hugging Face hub answers; if not, its libraries use their caches only."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Thread
from types import ModuleType
from typing import Literal

CLIENTS = ("huggingface_hub", "datasets", "urllib3")
"""The loggers of the libraries that talk to the hub."""

_LOG = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings of the hub's libraries, such as retries, off stderr: real errors arrive as exceptions."""
    loggers = [logging.getLogger(name) for name in CLIENTS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def reach(repo: str, kind: Literal["dataset", "model"]) -> Iterator[str]:
    """Asks the hub for `repo` and yields "" if it answers. If it does not, or if the user has set HF_HUB_OFFLINE, its
    libraries use only their caches within the block, without retries, and the reason is yielded.

    Logs what it waits for. The hub is asked once per repository.
    """
    switches = _switches(kind)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    with quiet():
        silence = "HF_HUB_OFFLINE is set" if any(before) else ""
        if not silence and not _answers(repo, kind):
            silence = "the Hugging Face hub does not answer"
        try:
            for switch in switches:
                switch.HF_HUB_OFFLINE = bool(silence)  # type: ignore[attr-defined]
            yield silence
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
    if silence and not any(before):
        _note_cached(repo)


def _switches(kind: str) -> list[ModuleType]:
    """The modules that hold HF_HUB_OFFLINE: the hub's client and `datasets`, which may have a setting of its own."""
    from huggingface_hub import constants

    if kind == "model":
        return [constants]
    from datasets import config

    return [constants, config]


@cache
def _answers(repo: str, kind: str) -> bool:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The libraries themselves would wait this long for each of up to six tries, for every file.
    patience_s = constants.HF_HUB_ETAG_TIMEOUT
    _LOG.info("asking the Hugging Face hub for %s (up to %s s)", repo, patience_s)
    answers: list[bool] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repo, repo_type=kind, timeout=patience_s)
        except HfHubHTTPError as error:
            # A wrong name is reported by the download. Proxies answer 502 to 504 if they cannot reach the hub.
            answers.append(error.response.status_code < 500)
        except HFValidationError:
            answers.append(True)
        except Exception:  # the HTTP library, and with it the error types, changes between releases
            answers.append(False)
        else:
            answers.append(True)

    # In a thread, because the timeout applies to each of the hub's addresses and not to the DNS lookup.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience_s)
    return bool(answers) and answers[0]


@cache
def _note_cached(repo: str) -> None:
    _LOG.warning("no answer from the Hugging Face hub: using %s from the cache (HF_HUB_OFFLINE=1 skips the wait)", repo)
