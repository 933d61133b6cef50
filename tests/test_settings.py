"""One TOML file, and flags over it, to settings that are checked once."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedalt.methods import METHODS
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedalt_ablations import FedALTAblations
from fedalt.methods.fedit import FedIT
from fedalt.methods.lora import Lora
from fedalt.runs.settings import (
    DataSettings,
    ModelSettings,
    Settings,
    SettingsError,
    read_settings,
    settings_of,
    to_toml,
)

DATA = "[data]\npath = 'd'\n"


def written(folder: Path, text: str, name: str = "run.toml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_a_file_with_nothing_but_data_gives_the_defaults(tmp_path):
    settings = read_settings(written(tmp_path, DATA))
    assert settings == Settings(data=DataSettings(path=tmp_path / "d"))
    assert settings.method == FedALT()


def test_every_section_reaches_its_class(tmp_path):
    settings = read_settings(
        written(
            tmp_path,
            DATA
            + """max_length = 99
            [model]
            targets = ["q_proj", "v_proj"]
            quantise = "4bit"
            [method]
            name = "fedit"
            rank = 2
            alpha = 4
            weighting = "examples"
            [training]
            lr = 1e-2
            [rounds]
            rounds = 3
            [scoring]
            beams = 4
            """,
        )
    )
    assert settings.data.max_length == 99
    assert settings.model == ModelSettings(targets=("q_proj", "v_proj"), quantise="4bit")
    assert settings.method == FedIT(lora=Lora(rank=2, alpha=4.0), weighting="examples")
    assert (settings.training.lr, settings.rounds.rounds, settings.scoring.beams) == (0.01, 3, 4)


def test_flags_win_over_the_file_key_by_key(tmp_path):
    file = written(tmp_path, f"seed = 1\n{DATA}[training]\nlr = 0.1\nbatch_size = 2\n")
    settings = read_settings(file, {"seed": 7, "training": {"lr": 0.5}})
    assert (settings.seed, settings.training.lr, settings.training.batch_size) == (7, 0.5, 2)


def test_flags_alone_are_settings_too():
    settings = read_settings(None, {"data": {"path": "/d"}, "method": {"name": "local"}})
    assert settings.data.path == Path("/d")


def test_paths_are_relative_to_the_file_and_those_of_flags_to_the_current_folder(
    tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = written(tmp_path, "[data]\npath = 'd'\ntemplate = 't.txt'\n[model]\nname = 'model'\n")
    settings = read_settings(file)
    assert settings.data == DataSettings(path=tmp_path / "d", template=tmp_path / "t.txt")
    assert settings.model.name == str(tmp_path / "model")
    assert read_settings(file, {"data": {"path": "e"}}).data.path == tmp_path / "here" / "e"


def test_a_model_that_is_a_file_is_found_from_every_folder(tmp_path):
    (tmp_path / "tiny.gguf").touch()
    file = written(tmp_path, f"{DATA}[model]\nname = 'tiny.gguf'\n")
    assert read_settings(file).model.name == str(tmp_path / "tiny.gguf")


def test_a_hub_id_is_no_path(tmp_path):
    file = written(tmp_path, f"{DATA}[model]\nname = 'org/name'\n")
    assert read_settings(file).model.name == "org/name"


def test_the_resolved_settings_load_again_to_the_same_object(tmp_path):
    for settings in (
        Settings(data=DataSettings(path=tmp_path / "d")),
        Settings(
            data=DataSettings(path=tmp_path / "d", template=tmp_path / 't"x', client_column="who"),
            model=ModelSettings(targets=("a", "b"), device="cpu"),
            method=FedALTAblations(lora=Lora(rank=3, dropout=0.0), gate="half", train_row=True),
            seed=5,
            local_baseline=False,
        ),
        Settings(data=DataSettings(path=tmp_path / "d"), model=ModelSettings(targets="all-linear")),
    ):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        again = read_settings(written(tmp_path / "elsewhere", to_toml(settings)))
        assert again == settings
    assert again != replace(settings, seed=6)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("sed = 1\n" + DATA, "unknown key 'sed'; did you mean seed?"),
        ("[trainin]\nlr = 1.0\n", "unknown key 'trainin'; did you mean [training]?"),
        (DATA + "[training]\nlearning_rate = 1.0\n", "[training]: unknown key 'learning_rate'"),
        (DATA + "[training]\nbatchsize = 1\n", "did you mean batch_size?"),
        (DATA + "[training]\nrank = 1\n", "unknown key 'rank'; it belongs in [method]"),
        (DATA + "seed = 1\n", "'seed'; it belongs at the top of the file"),
        (DATA + "[method]\nname = 'fedlat'\n", "no method 'fedlat', only fedalt, "),
        (DATA + "[method]\nname = 'fedlat'\n", "did you mean fedalt?"),
        (DATA + "[method]\nname = 'fedit'\ngate = 'half'\n", "unknown key 'gate'"),
        (DATA + "[method]\nrank = 0\n", "[method]: rank=0, but"),
        (DATA + "[method]\nrank = '8'\n", "[method] rank: expected a whole number, got '8'"),
        (DATA + "[method]\nrank = true\n", "expected a whole number, got true"),
        (DATA + "[method]\nrank = 8.0\n", "expected a whole number, got 8.0"),
        (DATA + "[method]\ngate = 'mix'\n", "expected one of 'mixer', 'half', 'one_over_clients'"),
        (DATA + "[training]\nlr = nan\n", "expected a finite number, got nan"),
        (DATA + "[training]\nlr = 0\n", "[training]: lr=0.0, but it must be above 0"),
        (DATA + "validation = 1.0\n", "[data]: validation=1.0, but"),
        (DATA + "max_length = 1\n", "max_length=1, but"),
        (DATA + "[model]\ntargets = [1]\n", "expected a list of names or a text, got [1]"),
        (DATA + "[model]\ntargets = []\n", "expected a list of names or a text, got []"),
        (DATA + "[model]\nquantise = '3bit'\n", "expected one of '8bit', '4bit', got '3bit'"),
        ("data = 'd'\n", "[data]: expected a section, got 'd'"),
        ("seed = 1\n", "[data] path is missing"),
        ("[data]\npath = ''\n", "[data] path: expected a path, got ''"),
        ("[data\n", "not valid TOML"),
    ],
)
def test_a_mistake_is_an_error_that_names_file_and_key(tmp_path, text, complaint):
    file = written(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        read_settings(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert complaint in str(caught.value)


def test_moments_are_not_carried_over_to_what_is_something_else_in_the_next_round():
    def refused(name, **own):
        table = {"method": {"name": name, **own}, "training": {"carry_optimizer": True}}
        try:
            settings_of({"data": {"path": "/d"}, **table}, "x.toml")
        except SettingsError as error:
            return str(error)

    told = {name: error for name in METHODS if (error := refused(name))}
    drawn, chosen, alternating = {"flora", "fslora"}, {"ifca_lora"}, {"rolora", "fedlora_optimizer"}
    directions = {"flexlora", "florist", "hilora", "fedalt_select"}
    assert set(told) == drawn | chosen | alternating | directions
    for name, error in told.items():
        assert error.startswith(
            f"x.toml: [training] carry_optimizer: clients of '{name}' train something else from "
        )
    assert not refused("fedlora_optimizer", global_rounds=0)


def test_a_mistake_in_a_flag_names_the_command_line():
    with pytest.raises(SettingsError, match=r"^the command line: .*rank=0"):
        read_settings(None, {"data": {"path": "d"}, "method": {"rank": 0}})


def test_a_missing_file_and_a_file_that_is_no_text_are_errors(tmp_path):
    with pytest.raises(SettingsError, match="no such file"):
        read_settings(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="not valid TOML"):
        read_settings(tmp_path / "binary.toml")
    with pytest.raises(SettingsError, match="cannot be read"):
        read_settings(tmp_path)
