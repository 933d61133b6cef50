"""Whole transformers models with bound adapters: against PEFT, the base, and each client alone."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tiny import client_of, gradients, random_tree, stacked, tokens, trained
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

from fedalt.adapters.binding import DropoutSeeds
from fedalt.adapters.layer import AdaptedModel
from fedalt.adapters.plan import HEAD, Layout, Mixer, Plan, Router, Shape, Slot, single
from fedalt.adapters.sites import ALL_LINEAR
from fedalt.core.tree import Name, Tree, select

Model = Callable[[], PreTrainedModel]
ONE = single(Slot("shared", 4, 8.0))
FEDALT = Plan((Slot("individual", 4, 8.0), Slot("rest_of_world", 4, 8.0)), Mixer())
DROPPED = Plan(FEDALT.slots, Mixer(), dropout=0.5)
EXPERTS = tuple(Slot(f"expert_{number}", 2 + number, 8.0) for number in range(3))
each_model = pytest.mark.parametrize("build", tiny.ALL.values(), ids=tiny.ALL)
each_classifier = pytest.mark.parametrize("build", tiny.CLASSIFIERS.values(), ids=tiny.CLASSIFIERS)


def some_loss(logits: Tensor) -> Tensor:
    """Differs for every element, so that no gradient is zero by symmetry."""
    weights = torch.linspace(-1, 1, logits[0].numel()).reshape(logits.shape[1:])
    return (logits.log_softmax(-1) * weights.to(logits.dtype)).sum()


def with_gradients(
    adapted: AdaptedModel,
    plan: Plan,
    tree: Tree,
    ids: Tensor,
    dropout: DropoutSeeds | None = None,
) -> tuple[Tensor, Tree]:
    """Logits and the gradient of some loss with respect to every tensor."""
    leaves = trained(tree)
    with adapted.bound(plan, leaves, dropout) as model:
        logits = model(ids).logits
        return logits.detach(), gradients(some_loss(logits), leaves)


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    """Within the tolerance of the largest number."""
    error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_trees_near(got: Tree, wanted: Tree, tolerance: float = 1e-6) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].abs().max() > 1e-4, f"{name} gets no gradient: nothing is compared"
        assert_near(got[name], wanted[name], tolerance)


def assert_equals_peft(build: Model, targets: str | None = None) -> None:
    """Same logits, same gradients of A, B and head, within 1e-6."""
    base = build().double()
    adapted = AdaptedModel(deepcopy(base), targets)
    tree = random_tree(adapted, ONE, dtype=torch.float64)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=targets,
        task_type=TaskType.SEQ_CLS if adapted.heads else TaskType.CAUSAL_LM,
    )
    theirs = get_peft_model(base, config)
    parameters = dict(theirs.base_model.model.named_parameters())
    ours_in_theirs = {name: parameters[_peft_name(name)] for name in tree}
    assert {p for p in parameters.values() if p.requires_grad} == set(ours_in_theirs.values())
    with torch.no_grad():
        for name, parameter in ours_in_theirs.items():
            parameter.copy_(tree[name])

    ids = tokens(2, 6)
    logits, ours = with_gradients(adapted, ONE, tree, ids)
    peft_logits = theirs(input_ids=ids).logits
    assert_near(logits, peft_logits)
    assert_trees_near(ours, gradients(some_loss(peft_logits), ours_in_theirs))
    assert (logits - build()(ids).logits).abs().max() > 0.1


def _peft_name(name: Name) -> str:
    if name.slot != HEAD:
        return f"{name.site}.lora_{name.factor}.default.weight"
    head, _, rest = name.site.partition(".")
    return ".".join(filter(None, (head, "modules_to_save.default", rest, name.factor)))


@each_model
def test_one_slot_equals_peft(build: Model) -> None:
    assert_equals_peft(build)


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2, tiny.bert_classifier])
def test_one_slot_on_all_linear_layers_equals_peft(build: Model) -> None:
    assert_equals_peft(build, ALL_LINEAR)


@each_model
@pytest.mark.parametrize("targets", [None, ALL_LINEAR])
def test_sites_are_those_of_peft(build: Model, targets: str | None) -> None:
    model = build()
    adapted = AdaptedModel(deepcopy(model), targets)
    kind = TaskType.SEQ_CLS if adapted.heads else TaskType.CAUSAL_LM
    theirs = get_peft_model(model, LoraConfig(target_modules=targets, task_type=kind))
    layers = {
        site: Shape(layer.in_features, layer.out_features)
        for site, layer in theirs.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert list(adapted.sites.items()) == list(layers.items())


def test_a_pattern_of_whole_paths_in_pefts_mapping_is_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern = r".*layers\.1\..*\.(q_proj|v_proj)"
    monkeypatch.setitem(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "llama", pattern)
    sites = AdaptedModel(tiny.llama()).sites
    assert [site.split(".", 2)[2] for site in sites] == ["1.self_attn.q_proj", "1.self_attn.v_proj"]


def test_conv1d_of_gpt2_stores_its_shape_the_other_way_round() -> None:
    sites = AdaptedModel(tiny.gpt2(), ["c_attn", "mlp.c_proj"]).sites
    assert sites["transformer.h.0.attn.c_attn"] == Shape(32, 96)
    assert sites["transformer.h.1.mlp.c_proj"] == Shape(128, 32)
    assert len(sites) == 2 * tiny.LAYERS


def test_explicit_sites_are_whole_path_endings_in_the_models_order() -> None:
    adapted = AdaptedModel(tiny.llama(), ["layers.1.mlp.up_proj", "k_proj"])
    assert [site.removeprefix("model.layers.") for site in adapted.sites] == [
        "0.self_attn.k_proj",
        "1.self_attn.k_proj",
        "1.mlp.up_proj",
    ]
    assert list(AdaptedModel(tiny.llama(), "o_proj").sites) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "qproj"], r"can be adapted is called 'qproj'; close names: .*q_proj"),
        (["proj"], r"called 'proj'; close names"),  # a piece of a name is not a name
        (["lm_head"], r"called 'lm_head'"),
        (["embed_tokens"], r"called 'embed_tokens'"),
        (["zzz"], r"called 'zzz'; close names: down_proj, gate_proj, k_proj"),
        ([], r"an empty list of sites; the linear layers end in \['down_proj'"),
    ],
)
def test_a_name_that_is_no_linear_layer_is_an_error(targets: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptedModel(tiny.llama(), targets)


def test_an_architecture_without_default_sites_says_so() -> None:
    config = Olmo2Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match=r"architecture 'olmo2'; name them, or use 'all-linear'"):
        AdaptedModel(Olmo2ForCausalLM(config))


@each_model
def test_three_clients_in_one_pass_equal_each_alone(build: Model) -> None:
    adapted = AdaptedModel(build().double())
    each = [random_tree(adapted, FEDALT, seed=seed, dtype=torch.float64) for seed in range(3)]
    ids = tokens(6, 5)
    logits, grads = with_gradients(adapted, FEDALT, stacked(*each), ids)
    for client, tree in enumerate(each):
        rows = slice(2 * client, 2 * client + 2)
        alone, alone_grads = with_gradients(adapted, FEDALT, tree, ids[rows])
        assert_near(logits[rows], alone)
        assert_trees_near(client_of(grads, client), alone_grads)


@pytest.mark.parametrize("router", [Router(1, "paper", True), Router(2, "code", False)])
@pytest.mark.parametrize("build", [tiny.gpt2, tiny.gpt_neox])
def test_three_clients_with_routers_in_one_pass_equal_each_alone(
    build: Model, router: Router
) -> None:
    plan = Plan(EXPERTS, router)
    adapted = AdaptedModel(build().double())
    each = [random_tree(adapted, plan, seed=seed, dtype=torch.float64) for seed in range(3)]
    ids = tokens(6, 15)  # so many that every slot is chosen for some
    logits, grads = with_gradients(adapted, plan, stacked(*each), ids)
    for client, tree in enumerate(each):
        rows = slice(2 * client, 2 * client + 2)
        alone, alone_grads = with_gradients(adapted, plan, tree, ids[rows])
        assert_near(logits[rows], alone)
        assert_trees_near(client_of(grads, client), alone_grads)


@pytest.mark.parametrize("layout", ["paper", "code"])
def test_a_router_of_one_expert_is_plain_lora(layout: Layout) -> None:
    adapted, ids = AdaptedModel(tiny.llama()), tokens(2, 6)
    plain, routed = single(EXPERTS[0]), Plan(EXPERTS[:1], Router(0, layout, True))
    tree = random_tree(adapted, routed)
    logits, grads = with_gradients(adapted, routed, tree, ids)
    wanted, wanted_grads = with_gradients(adapted, plain, select(tree, "expert_0"), ids)
    assert_near(logits, wanted, 1e-5)
    assert_trees_near(select(grads, "expert_0"), wanted_grads, 1e-5)


@each_model
def test_zero_b_and_no_tree_both_equal_the_base(build: Model) -> None:
    base, ids = build(), tokens(2, 6)
    adapted = AdaptedModel(build())
    wanted = base(ids).logits
    assert torch.equal(adapted.model(ids).logits, wanted)
    tree = {
        name: torch.zeros_like(tensor) if name.factor == "B" else tensor
        for name, tensor in random_tree(adapted, FEDALT).items()
    }
    for name in adapted.heads:
        tree[name] = base.get_submodule(name.site).get_parameter(name.factor)
    with adapted.bound(FEDALT, tree) as model:
        assert_near(model(ids).logits, wanted)
    assert torch.equal(adapted.model(ids).logits, wanted)


def test_a_training_step_moves_what_trains_and_nothing_else() -> None:
    base, adapted = tiny.llama(), AdaptedModel(tiny.llama())
    before = random_tree(adapted, FEDALT)
    tree = trained(before)
    frozen = select(tree, "rest_of_world")
    for tensor in frozen.values():
        tensor.requires_grad_(False)
    free = [tensor for name, tensor in tree.items() if name not in frozen]
    optimizer = torch.optim.SGD(free, lr=0.1)
    with adapted.bound(FEDALT, tree) as model:
        some_loss(model(tokens(2, 6)).logits).backward()
    optimizer.step()
    for name, tensor in tree.items():
        assert torch.equal(tensor, before[name]) == (name in frozen)
        assert (tensor.grad is None) == (name in frozen)
    weights = dict(base.named_parameters())
    for path, parameter in adapted.model.named_parameters():
        assert torch.equal(parameter, weights[path.replace(".base_layer", "")])
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_gradients_reach_lower_layers_through_frozen_slots() -> None:
    adapted = AdaptedModel(tiny.gpt2().double())  # Llama's norms are float32 even so
    tree = random_tree(adapted, FEDALT, dtype=torch.float64)
    name = Name("transformer.h.0.attn.c_attn", "individual", "B")
    tree[name].requires_grad_()
    ids = tokens(2, 6)
    with adapted.bound(FEDALT, tree) as model:
        some_loss(model(ids).logits).backward()
        grad = tree[name].grad
        assert grad is not None
        with torch.no_grad():
            ends = []
            for step in (1e-4, -1e-4):
                tree[name][3, 1] += step
                ends.append(some_loss(model(ids).logits))
                tree[name][3, 1] -= step
    assert grad[3, 1].item() == pytest.approx(float(ends[0] - ends[1]) / 2e-4, rel=1e-4)


@pytest.mark.parametrize("how", ["a bf16 base", "autocast", "autocast and checkpointing"])
def test_factors_stay_float32_where_the_base_computes_in_bf16(how: str) -> None:
    exact, adapted = AdaptedModel(tiny.llama()), AdaptedModel(tiny.llama())
    if how == "a bf16 base":
        adapted.model.bfloat16()
    if how == "autocast and checkpointing":
        adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.model.train()
    tree, ids = random_tree(exact, FEDALT), tokens(2, 6)
    wanted, wanted_grads = with_gradients(exact, FEDALT, tree, ids)
    leaves = trained(tree)
    with adapted.bound(FEDALT, leaves) as model:
        with torch.autocast("cpu", torch.bfloat16, enabled=how != "a bf16 base"):
            logits = model(ids).logits
        some_loss(logits.float()).backward()
    assert logits.dtype == torch.bfloat16
    assert_near(logits.float(), wanted, 0.1)
    for name, tensor in leaves.items():
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32
        assert torch.cosine_similarity(tensor.grad.flatten(), wanted_grads[name].flatten(), 0) > 0.9
        assert 0.8 < tensor.grad.norm() / wanted_grads[name].norm() < 1.25


def quantised(build: Model, folder: Path, **bits: bool) -> PreTrainedModel:
    build().save_pretrained(folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**bits), dtype=torch.float32
    )
    return model


def dequantised(model: PreTrainedModel, build: Model) -> PreTrainedModel:
    """A float model whose weights are what the quantised layers stand for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = build()
    for path, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        elif isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            weight = layer.weight.float() * layer.weight.SCB[:, None] / 127
        else:
            continue
        original = plain.get_submodule(path)
        is_linear = isinstance(original, torch.nn.Linear)
        original.weight.data = weight if is_linear else weight.T.contiguous()
    return plain


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize(
    ("bits", "tolerance"),
    [("load_in_4bit", 1e-5), ("load_in_8bit", 0.15)],  # 8-bit layers round their inputs, too
)
def test_gradients_flow_through_quantised_layers(
    build: Model, bits: str, tolerance: float, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = quantised(build, tmp_path, **{bits: True})
    exact = AdaptedModel(dequantised(model, build))
    adapted = AdaptedModel(model)
    assert adapted.sites == exact.sites
    tree, ids = random_tree(adapted, FEDALT), tokens(2, 6)
    with torch.no_grad(), adapted.bound(FEDALT, tree) as bound:
        bound(ids)  # an evaluation first may not change what training sees
    logits, grads = with_gradients(adapted, FEDALT, tree, ids)
    wanted, wanted_grads = with_gradients(exact, FEDALT, tree, ids)
    assert_near(logits, wanted, tolerance)
    assert_trees_near(grads, wanted_grads, tolerance)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_training_on_quantised_layers_lowers_the_loss(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    adapted = AdaptedModel(quantised(tiny.llama, tmp_path, **{bits: True}))
    tree, ids = trained(random_tree(adapted, FEDALT)), tokens(2, 6)
    optimizer = torch.optim.Adam(tree.values(), lr=1e-2)
    losses = []
    with adapted.bound(FEDALT, tree) as model:
        for _ in range(6):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
