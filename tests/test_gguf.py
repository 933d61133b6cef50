"""A GGUF file as a base model."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from bases import letters
from commands import call
from gguf_model import tiny_llama, write_gguf
from peft import AutoPeftModelForCausalLM
from runs_for_tests import write_clients
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedalt import load
from fedalt.core.settings import Packaged
from fedalt.models.base import PACKAGED, ModelError, load_base
from fedalt.models.gguf import GGUFError, converted


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedalt" / "gguf"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", tiny_llama())


def test_a_converted_file_computes_what_the_model_computed(file):
    base = load_base(str(file))
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = base.adapted.model(input_ids=ids).logits
        expected = tiny_llama()(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert base.tokenizer.decode(base.tokenizer("cat").input_ids, skip_special_tokens=True) == "cat"
    messages = [{"role": "user", "content": "hi"}]
    assert base.tokenizer.apply_chat_template(messages, tokenize=False) == "user:hi</s>"


def test_weights_are_stored_as_a_cpu_computes_and_a_gpu_still_takes_bfloat16(file, cache):
    load_base(str(file))
    (folder,) = cache.iterdir()
    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_a_file_is_converted_once(file, cache, capsys):
    first = load_base(str(file)).fingerprint
    assert "converting tiny.gguf once into" in capsys.readouterr().err
    (folder,) = cache.iterdir()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert load_base(str(file)).fingerprint == first
    assert "converting" not in capsys.readouterr().err
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_what_lies_beside_a_file_is_no_part_of_it(file, tmp_path):
    alone = load_base(str(file)).identity
    letters().save_pretrained(tmp_path / "crowd")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "other")}
    (tmp_path / "crowd" / "adapter_config.json").write_text(json.dumps(adapter))
    copy = shutil.copy(file, tmp_path / "crowd" / "copy.gguf")
    shutil.rmtree(tmp_path / "cache")  # both have the same content, and so the same folder
    assert load_base(str(copy)).identity == alone


def test_the_same_name_with_another_content_is_another_model(file, tmp_path, cache):
    copy = tmp_path / "tiny.gguf"
    copy.write_bytes(file.read_bytes())
    before = converted(copy)
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    write_gguf(copy, other)
    assert converted(copy) != before


@pytest.mark.parametrize("kept", [0, 3, 100, 2000, -50])
def test_a_truncated_file_is_refused_in_one_sentence_and_leaves_nothing(
    file, tmp_path, cache, kept
):
    half = tmp_path / "half.gguf"
    half.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(GGUFError, match=r"half\.gguf: (cannot be made a base model|not a GGUF)"):
        converted(half)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "it lacks 1 tensor, first "),
        ({"model.norm.weight": torch.ones(8)}, "it has in another shape 1 tensor, first "),
    ],
)
def test_weights_that_a_file_does_not_give_are_never_drawn(tmp_path, cache, change, told):
    tensors = {**tiny_llama().state_dict(), **change}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    file = write_gguf(tmp_path / "part.gguf", tiny_llama(), tensors=tensors)
    with pytest.raises(GGUFError, match=told + next(iter(change))):
        converted(file)
    assert not list(cache.iterdir())


def test_an_output_layer_that_is_the_embedding_need_not_be_there(tmp_path):
    tensors = {**tiny_llama().state_dict()}
    del tensors["lm_head.weight"]
    base = load_base(str(write_gguf(tmp_path / "tied.gguf", tiny_llama(), tensors=tensors)))
    model = base.adapted.model
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def factors(model):
    """What llama.cpp's converter writes for such a model: what each frequency is divided by."""
    scaled = model.model.rotary_emb.inv_freq
    return 500000.0 ** -(torch.arange(len(scaled)) / len(scaled)) / scaled


def test_the_frequencies_of_llama_3_are_those_of_its_file(tmp_path):
    model = tiny_llama(**LLAMA3)
    beside = {"rope_freqs.weight": factors(model)}
    assert beside["rope_freqs.weight"].max() == pytest.approx(8)
    base = load_base(str(write_gguf(tmp_path / "llama3.gguf", model, beside=beside)))
    ids = torch.arange(5, 65)[None]
    with torch.no_grad():
        logits, plain = base.adapted.model(ids).logits, tiny_llama(rope_theta=500000.0)(ids).logits
        expected = model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=0, atol=1e-5)


LEFT_ASIDE = {
    "other frequencies": ({"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0, 4.0])}, "rope_freqs"),
    "too few": ({"rope_freqs.weight": torch.tensor([1.0, 8.0])}, "rope_freqs.weight is not that"),
    "two lists": ({"rope_factors_long.weight": torch.ones(4)}, "rope_factors_long.weight, which"),
    "scaled": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn', expected"),
    "a bias": ({"blk.0.attn_q.bias": torch.ones(32)}, "1 biases, such as blk.0.attn_q.bias"),
}


@pytest.mark.parametrize(("beside", "told"), LEFT_ASIDE.values(), ids=LEFT_ASIDE.keys())
def test_what_transformers_leaves_aside_is_refused(tmp_path, cache, beside, told):
    file = write_gguf(tmp_path / "more.gguf", tiny_llama(), beside=beside)
    with pytest.raises(GGUFError, match=told):
        converted(file)
    assert not list(cache.iterdir())


def test_an_architecture_that_cannot_be_unpacked_is_refused_by_name(tmp_path):
    other = write_gguf(tmp_path / "other.gguf", tiny_llama(), architecture="clip")
    with pytest.raises(ModelError, match="architecture clip is not supported"):
        load_base(str(other))


def test_a_wrong_file_is_one_error_on_the_command_line(tmp_path, capsys):
    wrong = tmp_path / "wrong.gguf"
    wrong.write_text("hello")
    data = write_clients(tmp_path / "data", ("a", "b"))
    words = ["run", "--data", data, "--model", wrong, "--out", tmp_path / "run"]
    assert call(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {wrong}: not a GGUF file: it begins with b'hell', expected b'GGUF'"


@pytest.fixture
def packaged(file, tmp_path, monkeypatch):
    """The name of a model that comes in a package, and its file."""
    module = tmp_path / "packages" / "ours_in_a_package"
    module.mkdir(parents=True)
    (module / "__init__.py").touch()
    monkeypatch.syspath_prepend(module.parent)
    monkeypatch.setitem(PACKAGED, "ours", Packaged(module.name, "tiny.gguf", "no command"))
    return "ours", shutil.copy(file, module / "tiny.gguf")


@pytest.mark.parametrize("named", ["by file", "by package"])
def test_exports_lead_to_the_file_and_not_into_the_cache(
    file, packaged, named, tmp_path, cache, monkeypatch
):
    monkeypatch.chdir(file.parent)
    model, whole = (file.name, file) if named == "by file" else packaged
    data, run = write_clients(tmp_path / "data", ("a", "b")), tmp_path / "run"
    small = ("--rounds", 1, "--rank", 2, "--max-length", 60, "--max-new-tokens", 3, "--quiet")
    words = ("--method", "fedit", "--data", data, "--model", model, "--device", "cpu")
    assert call("run", *words, *small, "--out", run) == 0
    for kind in ("fedalt", "gguf", "peft"):
        out = tmp_path / kind
        assert call("export", run, "--client", "a", "--format", kind, "--out", out) == 0
    config, plain = (
        json.loads((tmp_path / kind / "adapter_config.json").read_text())
        for kind in ("fedalt", "peft")
    )
    wanted = str(file) if named == "by file" else "ours"
    assert config["base_model_name_or_path"] == wanted
    llama_cpp = (tmp_path / "gguf" / "README.md").read_text()
    assert f"llama-server --model {whole} --lora adapter.gguf\n```\n\nThe command" in llama_cpp
    # PEFT alone gets the folder, and the README says what it is.
    (folder,) = cache.iterdir()
    assert plain["base_model_name_or_path"] == str(folder)
    assert (
        f"# The base model is {wanted} as fedalt" in (tmp_path / "peft" / "README.md").read_text()
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft").float()(ids).logits
        shutil.rmtree(cache)
        monkeypatch.chdir(tmp_path)
        torch.testing.assert_close(load(tmp_path / "fedalt")(ids).logits, alone)
    assert folder.is_dir()


@pytest.mark.slow
def test_smollm2_answers_a_question():
    if find_spec(PACKAGED["smollm2"].module) is None:  # importing it takes what it depends on
        pytest.skip("`make smollm2` has not been called")
    base = load_base("smollm2")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = base.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = base.adapted.model.generate(**ids, max_new_tokens=12)
    assert "Paris" in base.tokenizer.decode(out[0])
