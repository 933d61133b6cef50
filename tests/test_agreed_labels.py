"""Labels that a federation or a run has agreed on: their order counts, a client may have some."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from bases import letters
from commands import call
from data_files import write_clients
from runs_for_tests import settings_for
from tiny import _LLAMA, _seeded
from transformers import LlamaConfig, LlamaForSequenceClassification

from fedalt.data.folder import open_data
from fedalt.data.records import DataError
from fedalt.federation.agreement import Agreement, write_agreement
from fedalt.federation.client_folder import open_client
from fedalt.flower.client_model import prepare_own
from fedalt.runs.lifecycle import start_run
from fedalt.runs.membership import join
from fedalt.runs.settings import SettingsError
from fedalt.runs.setup import load_parts, prepare

AGREED = ("pos", "neg", "mixed")


def rows(*labels: str) -> list[dict[str, str]]:
    return [{"text": f"ask {at} {label}", "label": label} for at in range(6) for label in labels]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint with a head of its own, so that all who load it have the same weights."""
    folder = tmp_path / "model"
    config = LlamaConfig(**_LLAMA, num_labels=len(AGREED))
    _seeded(LlamaForSequenceClassification, config).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


def terms_of(folder: Path, model: Path, labels: tuple[str, ...] = AGREED) -> Agreement:
    settings = settings_for(model, folder / "data", rounds={"rounds": 1})
    folder.mkdir(exist_ok=True)
    return write_agreement(folder, "f", ("a", "b"), labels, load_parts(settings, labels))


@pytest.mark.parametrize("labels", [("neg", "pos"), ("mixed",), ("neg", "mixed", "pos")])
def test_a_client_has_some_of_the_agreed_labels_in_any_order(tmp_path, model, labels):
    data = write_clients(tmp_path / "data", a_train=rows(*labels), a_test=rows(labels[-1]))
    member = open_client(terms_of(tmp_path / "f", model), "a", data, tmp_path / "state")
    task = member.trainer.task
    assert task.labels == AGREED
    for split in ("train", "test"):
        for example in task.examples("a", split):
            assert AGREED[example.label] == example.answer
            assert example.options == AGREED
    assert member.parts.base.adapted.model.config.id2label == dict(enumerate(AGREED))


def test_its_owner_sees_the_labels_in_their_order_too(tmp_path, model):
    data = write_clients(tmp_path / "data", a_train=rows("neg"), a_test=rows("neg"))
    terms = terms_of(tmp_path / "f", model)
    parts = load_parts(settings_for(model, data, rounds={"rounds": 1}), terms.labels)
    prepared = prepare_own(SimpleNamespace(terms=terms), parts)
    assert prepared.task.labels == AGREED


def test_a_label_that_nobody_agreed_on_is_named_with_its_file(tmp_path, model):
    data = write_clients(tmp_path / "data", a_train=rows("pos"), a_test=rows("good"))
    with pytest.raises(DataError) as caught:
        open_client(terms_of(tmp_path / "f", model), "a", data, tmp_path / "state")
    assert str(caught.value).endswith(
        "a.test.jsonl:1: field 'label': 'good' is none of the agreed labels pos, neg, mixed"
    )


def test_text_where_labels_were_agreed_is_refused(tmp_path, model):
    data = write_clients(tmp_path / "data", a_train=[{"prompt": "p", "completion": "c"}] * 3)
    with pytest.raises(SettingsError, match=r"has the labels \(none\), but the terms of 'f' say"):
        open_client(terms_of(tmp_path / "f", model), "a", data, tmp_path / "state")


def test_without_an_agreement_the_labels_are_those_of_all_clients(tmp_path):
    data = write_clients(tmp_path / "data", a_train=rows("b"), b_train=rows("a", "b"))
    assert open_data(data).labels == ("a", "b")
    assert open_data(data, labels=("c", "b", "a")).labels == ("c", "b", "a")
    (data / "b.train.jsonl").unlink()
    with pytest.raises(DataError, match="all train records have the label 'b'; a classifier has"):
        open_data(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_trains_clients_of_one_label_and_takes_newcomers_of_some(tmp_path, model, capsys):
    data = write_clients(
        tmp_path / "data", a_train=rows("pos"), b_train=rows("neg", "mixed"), b_test=rows("pos")
    )
    settings = settings_for(model, data, rounds={"rounds": 1})
    run = start_run(prepare(settings), tmp_path / "run").path
    late = write_clients(tmp_path / "late", c_train=rows("pos"), c_test=rows("mixed"))
    lines = join(run, late)
    assert {line["client"] for line in lines} == {"c"}
    other = write_clients(tmp_path / "other", d_train=rows("new", "pos"))
    assert call("join", run, "--data", other) == 2
    assert "'new' is none of the agreed labels mixed, neg, pos" in capsys.readouterr().err
