"""What a base model cannot do is said before the first round."""

from pathlib import Path

import pytest
from commands import call
from test_clipping import deberta
from transformers import LlamaForCausalLM

from fedalt.core.settings import DataSettings, Schedule
from fedalt.methods import METHODS
from fedalt.methods.feddpa import FedDPA
from fedalt.runs.base_checks import require_weighable, warnings_of_ranks
from fedalt.runs.settings import Settings, SettingsError, settings_of
from fedalt.runs.setup import load_parts

DATA = DataSettings(path=Path("data"))


def test_gradient_checkpointing_is_refused_where_a_model_cannot_do_it(
    run_flags, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    words = ("--rounds", 1, "--gradient-checkpointing", "--out", tmp_path / "run", "--quiet")
    assert call("run", *run_flags, *words) == 2
    said = capsys.readouterr().err
    assert "[training] gradient_checkpointing=True, but the model" in said
    assert "(llama) cannot do it; expected False" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", METHODS)
def test_only_a_method_that_weighs_texts_is_refused_by_layers_that_see_few(name):
    settings = Settings(data=DATA, method=METHODS[name])
    if name != "feddpa":
        require_weighable(settings, deberta())
        return
    with pytest.raises(SettingsError) as error:
        load_parts(settings, ("a", "b", "c"), deberta())
    assert "--method feddpa weighs adapters anew for each text" in str(error.value)
    assert "query_proj' of the model 'tiny random' does not see all texts" in str(error.value)


def test_a_run_that_ends_before_it_weighs_texts_is_not_refused():
    """FedDPA's "T" has an individual phase from the second round on, "F" whenever it serves."""
    once = Schedule(rounds=1)
    require_weighable(Settings(data=DATA, method=FedDPA(), rounds=once), deberta())
    with pytest.raises(SettingsError, match="weighs adapters anew"):
        require_weighable(Settings(data=DATA, method=FedDPA(schedule="F"), rounds=once), deberta())


def test_a_rank_above_that_of_every_layer_is_told(run_flags, tmp_path, capsys):
    base = deberta()
    whole = max(min(shape) for shape in base.adapted.sites.values())

    def told(**method):
        return warnings_of_ranks(
            settings_of({"data": {"path": "data"}, "method": method}, ""), base
        )

    assert told(name="fedalt", rank=whole) == []
    (sentence,) = told(name="fedalt", rank=whole + 1)
    assert sentence.startswith(f"rank={whole + 1}, but the weights of the largest adapted layer")
    (sentence,) = told(name="flexlora", rank=2, ranks={"zoe": 9 * whole})
    assert sentence.startswith(f"rank={9 * whole}, but")
    words = ("--rounds", 1, "--rank", 100, "--out", tmp_path / "run")
    assert call("run", *run_flags, *words) == 0
    assert "rank=100, but the weights" in capsys.readouterr().err
