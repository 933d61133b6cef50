"""A handful of architectures; scripts/architectures.py tries all that transformers offers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import architectures
from bases import train
from tiny_architectures import build

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.packing import try_packing
from fedalt.adapters.reach import plain_layers
from fedalt.models.base import load_base
from fedalt.training.group import Training
from fedalt.training.orders import Fit

CAUSAL = {
    "gemma3": "a vision tower that no text reaches",
    "deepseek_v3": "dense layers and experts of the same names",
    "phimoe": "a router built on a linear layer",
    "laguna": "key names that PEFT takes for older ones",
    "gpt2": "Conv1D",
    "opt": "positions with an offset",
    "bart": "positions counted from the row's beginning",
    "mamba": "a recurrence",
    "openai-gpt": "no cache",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_model_does_what_transformers_and_peft_do(kind: str, tmp_path: Path) -> None:
    build(kind, classifies=False, folder=tmp_path)
    row = architectures.tried(kind, classifies=False, folder=tmp_path)
    assert row.right, row
    assert not row.refused
    assert row.sites


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["bart", "canine", "eurobert", "gpt2", "xlnet"])
def test_a_classifier_does_what_transformers_and_peft_do(kind: str, tmp_path: Path) -> None:
    build(kind, classifies=True, folder=tmp_path)
    row = architectures.tried(kind, classifies=True, folder=tmp_path)
    assert row.right, row
    assert not row.refused


def test_a_classifier_that_does_not_overlook_padding_is_told(tmp_path: Path) -> None:
    """XLNet classifies by a row's last token, whatever the mask says."""
    build("xlnet", classifies=True, folder=tmp_path / "xlnet")
    build("bert", classifies=True, folder=tmp_path / "bert")
    notes = {
        kind: load_base(
            str(tmp_path / kind), labels=("a", "b"), targets="all-linear", device="cpu"
        ).notes
        for kind in ("xlnet", "bert")
    }
    told = "what this model makes of a text changes with the padding behind it"
    assert [note for note in notes["xlnet"] if note.startswith(told)]
    assert not [note for note in notes["bert"] if note.startswith(told)]


@pytest.mark.parametrize("words", [["lama"], ["llama", "--write"]])
def test_no_page_is_written_of_a_few_architectures_and_no_unknown_one_passes(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architectures, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(architectures, "CAUSAL", {"llama": "LlamaForCausalLM"})
    monkeypatch.setattr(architectures, "build", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["architectures.py", *words])
    with pytest.raises(SystemExit) as ended:
        architectures.main()
    assert ended.value.code == 2


def test_what_no_text_goes_through_is_not_adapted(tmp_path: Path) -> None:
    build("gemma3", classifies=False, folder=tmp_path / "gemma3")
    gemma = load_base(str(tmp_path / "gemma3"), targets="all-linear", device="cpu").adapted
    assert not [site for site in gemma.sites if "language_model" not in site]
    build("phimoe", classifies=False, folder=tmp_path / "phimoe")
    phi = load_base(str(tmp_path / "phimoe"), targets="all-linear", device="cpu").adapted
    assert not [site for site in phi.sites if site.endswith("router")]


def test_texts_are_not_packed_where_a_state_would_go_on(tmp_path: Path) -> None:
    build("mamba", classifies=False, folder=tmp_path)
    base = load_base(str(tmp_path), targets="all-linear", device="cpu")
    assert base.adapted.packs.longest == 0
    assert try_packing(base.adapted.model).longest == 0


def test_an_expert_that_gets_some_tokens_is_told_apart() -> None:
    from tiny import llama

    model = llama()

    class Some(torch.nn.Module):
        """Sends one token of each text through a layer of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(-1, x.shape[-1])
            return x + self.experts[0](rows[:3]).sum() * 0

    model.model.layers[0].mlp = Some()
    linear = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and path != "lm_head"
    }
    found = plain_layers(model, linear)
    experts = {path: whole for path, whole in found.items() if "experts" in path}
    assert set(experts.values()) == {False}
    assert len(experts) == 2
    assert found["model.layers.1.mlp.up_proj"] is True


def test_clients_do_not_share_a_network_that_puts_tokens_first(tmp_path: Path) -> None:
    """XLNet's feed-forward layers see (tokens, texts, d): a block of rows is then no client's."""
    build("xlnet", classifies=True, folder=tmp_path)
    base = load_base(str(tmp_path), labels=("a", "b"), targets="all-linear", device="cpu")
    assert not base.adapted.shares_passes
    assert "transformer.layer.0.ff.layer_1" in base.adapted.partial


@pytest.mark.parametrize("kind", ["phimoe", "gemma3", "mamba"])
def test_gradient_checkpointing_changes_no_number(kind: str, tmp_path: Path) -> None:
    """PhiMoE's router chooses experts at random in training mode."""
    build(kind, classifies=False, folder=tmp_path)
    base = load_base(str(tmp_path), targets="all-linear", device="cpu")
    init = Initializer(base.adapted.sites, base.adapted.heads, 0)
    tree = init.adapter(architectures.PLAN.slots[0])
    order = Fit(architectures.PLAN, tree, frozenset(tree), epochs=3)
    examples = architectures._examples(base, ())
    plain, saved = (
        train(base, order, examples, Training(lr=0.01, gradient_checkpointing=saves), seed=0)
        for saves in (False, True)
    )
    assert saved.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, tensor in plain.tree.items():
        torch.testing.assert_close(saved.tree[name], tensor, rtol=0, atol=1e-5)
