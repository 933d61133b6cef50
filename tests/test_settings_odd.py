"""Settings, surroundings and streams that nobody expects: each is one sentence, or does no harm."""

from pathlib import Path

import pytest
from commands import call

from fedalt.models.base import load_tokenizer
from fedalt.models.errors import ModelError
from fedalt.runs.compare import default_workers, read_comparison
from fedalt.runs.settings import SettingsError, read_settings

NOBODY = "~nobody-of-this-name/data"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'[data]\npath = "{NOBODY}"', f"\\[data\\] path: '{NOBODY}': no such user's home"),
        (f'[data]\npath = "."\n[model]\nname = "{NOBODY}"', "no such user's home"),
        (f"seed = {'1' * 5000}", "odd.toml: not valid TOML: .*4300"),
        (f"x = {'[' * 20000}{']' * 20000}", "odd.toml: nested deeper"),
    ],
)
def test_odd_settings_are_refused_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "odd.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=said):
        read_settings(file)


def test_a_model_in_nobody_s_home_is_refused_in_a_sentence() -> None:
    with pytest.raises(ModelError, match="no such user's home"):
        load_tokenizer(NOBODY)


def test_a_section_of_a_comparison_that_is_none_is_named(tmp_path: Path) -> None:
    file = tmp_path / "compare.toml"
    own = '[[methods]]\nname = "fedit"\ntraining = {lr = 0.1}'
    file.write_text(f'training = 5\n[data]\npath = "."\n{own}')
    with pytest.raises(SettingsError, match=r"\[training\]: expected a section, got 5"):
        read_comparison(file)


def test_as_many_runs_go_on_as_a_scheduler_has_left_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert default_workers([]) == 3


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_stream_that_is_closed_ends_no_command(
    monkeypatch: pytest.MonkeyPatch, finished_run: Path, stream: str
) -> None:
    monkeypatch.setattr(f"sys.{stream}", None)
    assert call("generate", finished_run, "--client", "a", *(["x"] * (stream != "stdin"))) == 0
    assert call("resume", finished_run) == 0
