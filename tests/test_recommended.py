"""What the built-in base model recommends is used and said, unless something else is given."""

import tomllib

import pytest
from commands import call
from runs_for_tests import write_clients

from fedalt.methods.lora import Lora
from fedalt.runs.compare import jobs_of, read_comparison
from fedalt.runs.kept_settings import settings_table
from fedalt.runs.settings import (
    DataSettings,
    Settings,
    advised_settings,
    lora_of,
    read_settings,
    to_toml,
)
from fedalt.training.recommended import recommended

DATA = {"data": {"path": "d"}}


def advised(**sections):
    return advised_settings(None, {**DATA, **sections})


def values(settings):
    lora = lora_of(settings.method)
    model, training = settings.model, settings.training
    return model.targets, lora.alpha / lora.rank, training.lr, settings.rounds.rounds


USUAL = values(Settings(data=DataSettings(path="d")))
OWN = ("all-linear", 16, 5e-4, 10)


@pytest.mark.parametrize("model", [{}, {"model": {"name": "tiny"}}, {"model": {"device": "cpu"}}])
def test_the_built_in_base_has_settings_of_its_own_and_they_are_said(model):
    settings, sentence = advised(**model)
    assert values(settings) == OWN != USUAL
    for said in ("'tiny'", "targets = all-linear", "alpha = 128", "lr = 0.0005", "rounds = 10"):
        assert said in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("name", ["org/model", "minilm"])
def test_other_base_models_have_the_usual_ones(name):
    settings, sentence = advised(model={"name": name})
    assert (values(settings), sentence) == (USUAL, "")


def test_whatever_is_given_stays_also_where_it_is_the_default():
    usual = Settings(data=DataSettings(path="d"))
    given = {
        "model": {"targets": "default"},
        "method": {"alpha": lora_of(usual.method).alpha},
        "training": {"lr": usual.training.lr},
        "rounds": {"rounds": usual.rounds.rounds},
    }
    settings, sentence = advised(**given)
    assert values(settings) == USUAL
    assert "rank = 8" in sentence
    for section, table in given.items():
        (key,) = table
        one, sentence = advised(**{section: table})
        assert f"{key} = " not in sentence
        kept = getattr(one, section, None) if section != "method" else lora_of(one.method)
        wanted = getattr(usual, section, None) if section != "method" else lora_of(usual.method)
        assert getattr(kept, key) == getattr(wanted, key)


def test_another_rank_keeps_the_scale_of_an_adapter_s_output():
    settings, _ = advised(method={"rank": 2})
    assert lora_of(settings.method) == Lora(rank=2, alpha=32.0)
    settings, _ = advised(method={"rank": 2, "alpha": 4})
    assert lora_of(settings.method) == Lora(rank=2, alpha=4.0)


def test_what_is_resolved_is_never_advised_again(tmp_path):
    for given in ({}, {"model": {"targets": "default"}}, {"model": {"targets": ["q_proj"]}}):
        settings, _ = advised(**given)
        file = tmp_path / "settings.toml"
        file.write_text(to_toml(settings))
        assert advised_settings(file) == (settings, "")
        assert read_settings(file) == settings


def test_mistakes_are_told_as_ever():
    for wrong in ({"model": "tiny"}, {"training": 3}, {"method": {"rank": "8"}}, {"method": []}):
        recommended(wrong)  # whoever checks the table refuses it
        with pytest.raises(ValueError, match="command line"):
            advised(**wrong)


def test_a_run_says_it_and_keeps_it(tmp_path, capsys):
    data = write_clients(tmp_path / "d", count=4)
    small = ["--rounds", "1", "--max-length", "60", "--no-test", "--device", "cpu"]
    assert call("run", "--data", data, "--out", tmp_path / "r", *small) == 0
    said = capsys.readouterr().err
    assert "recommended for the base model 'tiny'" in said
    assert "rounds = " not in said
    kept = tomllib.loads((tmp_path / "r" / "settings.toml").read_text())
    assert kept["model"]["targets"] == "all-linear"
    assert (kept["training"]["lr"], kept["rounds"]["rounds"]) == (5e-4, 1)
    assert call("run", tmp_path / "r" / "settings.toml", "--out", tmp_path / "again") == 0
    assert "recommended" not in capsys.readouterr().err
    again = tomllib.loads((tmp_path / "again" / "settings.toml").read_text())
    assert again == kept


def test_a_comparison_takes_it_and_its_runs_keep_it(tmp_path):
    (tmp_path / "d").mkdir()
    file = tmp_path / "methods.toml"
    file.write_text(
        "[data]\npath = 'd'\n[[methods]]\nname = 'fedalt'\n[[methods]]\nname = 'fedit'\n"
        "alpha = 32\n[methods.training]\nlr = 3e-4\n"
    )
    entries, seeds = read_comparison(file)
    assert values(entries[0].settings) == OWN
    assert values(entries[1].settings) == ("all-linear", 4, 3e-4, 10)
    assert "lr = 0.0005" in entries[0].advice
    assert "lr" not in entries[1].advice
    for job in jobs_of(entries, seeds, tmp_path / "out"):
        written = tmp_path / "one.toml"
        written.write_text(to_toml(job.settings))
        assert advised_settings(written) == (job.settings, "")
        assert settings_table(job.settings)["model"]["targets"] == "all-linear"


def test_from_python_too(tmp_path, capsys):
    import fedalt

    data = write_clients(tmp_path / "d", count=4)
    table = {"data": {"path": str(data), "max_length": 60, "validation": 0.3}}
    table |= {"rounds": {"rounds": 1, "test": False}, "model": {"device": "cpu"}}
    with pytest.warns(UserWarning, match="validation"):
        fedalt.run(table, out=tmp_path / "r")
    assert "recommended for the base model 'tiny'" in capsys.readouterr().err
    assert values(read_settings(tmp_path / "r" / "settings.toml"))[:3] == OWN[:3]
