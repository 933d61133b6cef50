"""A setting is declared once: TOML, flags, help and the documents' table follow by themselves.

Nothing here names a setting that it tests: every test walks the declarations.
"""

import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Literal, get_args, get_origin

import click
import pytest
import typer.main
from commands import call

from fedalt.cli import app
from fedalt.cli.flags import default_of, flag_of, given, setting_flags
from fedalt.core.declared import SettingsError
from fedalt.runs.settings import all_declared, read_settings, to_toml

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import settings_page

DECLARED = [
    pytest.param(section, item, id=f"{section}.{item.name}") for section, item in all_declared()
]
every_setting = pytest.mark.parametrize(("section", "item"), DECLARED)
# A robust mean needs a method that averages.
WHOLE = {"data": {"path": "/d"}, "method": {"name": "fedit"}}
# Most of [privacy] means something only together; of noise and epsilon one is given.
SOLVED = ("noise", "epsilon")
PRIVATE = {"unit": "example", "noise": 1.0, "clip": 1.0}


def another(item):
    """A value other than the default that the setting may have."""
    kind = item.types[0]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != item.default)
    if get_origin(kind) is tuple:
        return ["q_proj", "v_proj"]
    if item.name == "name":
        return "fedit" if item.default == "fedalt" else "org/model"
    default = 3 if item.default in (MISSING, None) else item.default
    return {
        bool: lambda: not item.default,
        int: lambda: default + 1,
        float: lambda: default * 0.75 if item.default else 0.5 if "below" in item.limits else 1.5,
        str: lambda: "something",
        Path: lambda: "/some/place",
    }[kind]()


def table_with(section, item, value):
    if section == "privacy":
        others = {key: each for key, each in PRIVATE.items() if (key, item.name) != SOLVED}
        others |= {"unit": "client"} if item.name == "quantile" else {}
        return {**WHOLE, "rounds": {"select": "last"}, section: {**others, item.name: value}}
    part = {**WHOLE.get(section, {}), item.name: value}
    section, _, name = section.partition(".")
    part = {name: part} if name else part
    return {**WHOLE, section: part} if section else {**WHOLE, item.name: value}


def value_in(settings, section, item):
    method = settings.method
    if (section, item.name) == ("method", "name"):
        return "fedalt" if type(method).__name__.startswith("FedALT") else "fedit"
    if section == "clients.NAME":
        return getattr(settings.clients["NAME"], item.name)
    place = {"": settings, "method": vars(method)["lora"]}.get(section) or getattr(
        settings, section
    )
    return getattr(place, item.name)


@every_setting
def test_a_setting_is_read_from_toml_and_written_to_it(tmp_path, section, item):
    value = another(item)
    settings = read_settings(None, table_with(section, item, value))
    plain = value_in(settings, section, item)
    assert plain == (tuple(value) if isinstance(value, list) else plain.__class__(value))
    assert plain != item.default
    file = tmp_path / "settings.toml"
    file.write_text(to_toml(settings))
    assert f"{item.name} = " in file.read_text()
    assert read_settings(file) == settings


def test_a_setting_has_a_flag_with_its_help_and_default_or_is_for_toml_only():
    flags = {flag.opts[0]: flag for flag in setting_flags() if not flag.hidden}
    for section, item in all_declared():
        if item.flag is None:
            continue
        flag = flags.pop(item.flag)
        assert flag.help == item.help
        assert flag.show_default == (default_of(item, section) or False)
        assert item.default in (MISSING, None) or str(item.default).lower() in flag.show_default
    assert not flags


def words_for(item, value):
    flag, _, negated = flag_of(item).partition("/")
    if isinstance(value, bool):
        return [flag if value else negated]
    return [flag, ",".join(value) if isinstance(value, list) else str(value)]


def flags_read(*words):
    command = typer.main.get_command(app).commands["run"]
    with command.make_context("run", list(words)) as context:
        return given(context)


@every_setting
def test_a_flag_says_what_the_key_says(section, item):
    if item.flag is None:
        return
    value = another(item)
    expected = {section: {item.name: value}} if section else {item.name: value}
    assert flags_read(*words_for(item, value)) == expected
    assert flags_read() == {}


def test_the_older_name_of_the_baseline_is_understood_and_not_shown(tmp_path, capsys):
    assert flags_read("--no-yardstick") == {"local_baseline": False}
    file = tmp_path / "old.toml"
    file.write_text("yardstick = false\n[data]\npath = 'd'\n")
    assert read_settings(file).local_baseline is False
    assert call("run", "--help") == 0
    assert "yardstick" not in capsys.readouterr().out


@every_setting
def test_a_number_outside_its_limits_is_refused_by_name(section, item):
    outside = {"at least": -1, "above": 0, "below": 0, "at most": 1}
    if not item.limits:
        return
    for limit in item.limits.split(" and "):
        word, _, bound = limit.rpartition(" ")
        value = item.types[0](float(bound) + outside[word])
        with pytest.raises(SettingsError, match=f"{item.name}={value}, but it .*{limit}|negative"):
            read_settings(None, table_with(section, item, value))


@every_setting
def test_a_value_of_another_type_is_refused_by_its_key(section, item):
    with pytest.raises(SettingsError, match=rf"{item.name}: expected .*, got \{{'x': 1\}}"):
        read_settings(None, table_with(section, item, {"x": 1}))


def test_the_page_of_settings_is_what_the_declarations_give():
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page()


def test_a_flag_of_the_wrong_type_is_refused(capsys):
    with pytest.raises(click.BadParameter):
        flags_read("--rank", "many")
