"""The oracles of FedDPA: two adapters, what is shared of them, and a blend for every question."""

import pytest
import torch
from bases import base_of, example, random_serving_tree, start_of, train
from commands import call
from federation import (
    HEADS,
    SITES,
    START,
    MemoryStates,
    one_by_one,
    pull,
    run_groups,
    run_one,
    served,
    simulate,
)
from runs_for_tests import scores_of
from safetensors.torch import load_file
from tiny import bert_classifier, gpt2, llama

from fedalt.adapters.initializer import Initializer
from fedalt.adapters.plan import HEAD, Plan, Similarity, Slot, Sum, names_of
from fedalt.core import tree as trees
from fedalt.core.tree import move, select
from fedalt.data.examples import Example
from fedalt.engine.client_work import TRAINED, training_metrics
from fedalt.evaluation import Scoring, embed, generate, score
from fedalt.methods.contract import Message, Serving
from fedalt.methods.feddpa import INDIVIDUAL, INDIVIDUAL_HEAD, SHARED, FedDPA
from fedalt.methods.fedit import FedIT
from fedalt.methods.local import LocalOnly
from fedalt.methods.lora import Lora
from fedalt.training.group import Trained, Training
from fedalt.training.orders import Embed, Fit, Fitted, Moments

LORA = Lora(rank=2, alpha=4, dropout=0.0)
T, F = (FedDPA(lora=LORA, schedule=schedule) for schedule in ("T", "F"))
P = sum(LORA.rank * (d_in + d_out) for d_in, d_out in SITES.values())
EVERYONE = ("a", "b", "c")
COHORTS = [EVERYONE, ("a", "c"), EVERYONE]

SLOTS = (Slot(INDIVIDUAL, 2, 4.0), Slot(SHARED, 2, 4.0))
QUESTIONS = [
    example("which", "ab", ("cd", "ab", "e")),
    example("and which", "q", ("q", "rrr")),
    example("what else then", "zz", ("zz", "a")),
    example("b", "c", ("c", "d")),
]
PROMPTS = [each.prompt_ids for each in QUESTIONS]
QUICK = Scoring(batch_size=3, max_new_tokens=6)


class Watch:
    """Carries orders out as `pull` does and keeps them."""

    def __init__(self):
        self.orders = {}

    def __call__(self, client_id, number, order):
        self.orders.setdefault(client_id, []).append(order)
        return pull(client_id, number, order)


@pytest.mark.parametrize("method", [T, F], ids="TF")
def test_the_shared_adapter_is_that_of_fedit_in_every_round(method):
    ours = theirs = None
    for cohort in COHORTS:
        ours, _ = simulate(method, [cohort], ours)
        theirs, _ = simulate(FedIT(lora=LORA), [cohort], theirs)
        assert trees.equal(ours["server"].adapter, theirs["server"].adapter)


def test_with_a_blend_of_one_t_trains_its_own_adapter_as_local_training_does():
    # No individual phase in the first round: three rounds of T are two of local training.
    base = base_of()
    training = Training(lr=1e-2, batch_size=2)

    def carry_out(client_id, number, order):
        match order:
            case Fit():
                fitted = train(base, order, QUESTIONS, training, seed=len(client_id))
                return Fitted(fitted.tree, len(QUESTIONS))
            case Embed():
                return embed(base, order.plan, order.tree, PROMPTS, 2)

    class Apart(Initializer):
        """Gives everyone the draw that FedDPA's second adapter begins with."""

        def adapter(self, slot, *, only_for="", apart=False):
            return super().adapter(slot, only_for=only_for, apart=slot.name == INDIVIDUAL)

    start = Apart(base.adapted.sites, base.adapted.heads, seed=0)

    def individual_of(method, rounds):
        states = MemoryStates()
        for _ in range(rounds):
            run_groups(method, start, states, [("a", "bb")], one_by_one(carry_out))
        return select(states["clients/bb"].individual, INDIVIDUAL)

    alone = individual_of(LocalOnly(lora=LORA), 2)
    for name, tensor in individual_of(FedDPA(lora=LORA, blend=1.0), 3).items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-6)
    blended = individual_of(FedDPA(lora=LORA, blend=0.5), 3)
    assert all((blended[name] - alone[name]).abs().max() > 1e-3 for name in alone)


def test_the_individual_phase_comes_from_the_second_round_on_and_holds_the_received_one_still():
    watch = Watch()
    states, _ = simulate(T, [EVERYONE], train=watch)
    received = dict(states["server"].adapter)
    assert [type(order) for order in watch.orders["a"]] == [Fit]
    simulate(T, [EVERYONE], states, train=watch)
    first, own, references = watch.orders["a"][1:]
    assert names_of(first.train, SHARED)
    assert not names_of(first.train, INDIVIDUAL)
    assert not names_of(own.train, SHARED)
    assert trees.equal(select(own.tree, SHARED), received)
    assert own.plan.combine == Sum((0.5, 0.5))
    assert isinstance(references, Embed)
    assert references.examples == 5
    assert not names_of(references.tree, SHARED)


def test_an_individual_adapter_of_t_starts_afresh():
    watch = Watch()
    simulate(T, [EVERYONE] * 2, train=watch)
    start = START.adapter(LORA.slot(INDIVIDUAL), apart=True)
    assert trees.equal(select(watch.orders["a"][2].tree, INDIVIDUAL), start)


@pytest.mark.parametrize("method", [T, F], ids="TF")
def test_both_heads_of_a_client_count_as_trained(method):
    watch = Watch()
    states, _ = simulate(method, [EVERYONE] * 2, train=watch)
    served(method, states, ["a"], watch)
    fits = [order for order in watch.orders["a"][1:] if isinstance(order, Fit)]  # without round 0
    assert len(fits) == 2
    told = training_metrics(
        [Trained({}, Moments(), 0.0, 1, 1, order.trained_numbers) for order in fits]
    )
    a_head = sum(torch.Size(shape).numel() for shape in HEADS.values())
    assert sum(n for key, n in told.items() if key.startswith(TRAINED)) == 2 * (P + a_head)


@pytest.mark.parametrize("method", [T, F], ids="TF")
def test_only_the_shared_adapter_is_sent_and_the_shared_phase_changes_nothing_private(method):
    states, _ = simulate(method, [EVERYONE] * 2)
    client, message = states["clients/a"], method.broadcast(states["server"], "a")
    seen = []

    def watch(client_id, number, order):
        seen.append(order)
        return pull(client_id, number, order)

    _, upload = run_one(method.local(client, message), watch, "a")
    assert trees.numbers(upload.tree) == trees.numbers(message.tree) == P
    assert {name.slot for name in upload.tree} == {SHARED}
    if method is T:
        assert trees.equal(select(seen[1].tree, INDIVIDUAL), select(client.individual, INDIVIDUAL))
        moved = move(select(seen[1].tree, HEAD), HEAD, INDIVIDUAL_HEAD)
        assert trees.equal(moved, select(client.individual, INDIVIDUAL_HEAD))


def test_a_client_that_sits_out_keeps_its_own_adapter_and_references():
    states, _ = simulate(T, [EVERYONE] * 2)
    before = states["clients/b"]
    states, _ = simulate(T, [("a", "c")] * 2, states)
    after = states["clients/b"]
    assert trees.equal(after.individual, before.individual)
    assert trees.equal(after.references, before.references)
    serving = served(T, states, "b")["b"]
    assert trees.equal(select(serving.tree, SHARED), states["server"].adapter)


def test_a_newcomer_without_an_adapter_of_its_own_serves_the_shared_one():
    states, _ = simulate(T, [EVERYONE] * 2)
    serving = served(T, states, ["new"])["new"]
    assert serving.references is None
    assert [slot.name for slot in serving.plan.slots] == [SHARED]


@pytest.mark.parametrize(("on", "slot"), [("individual", INDIVIDUAL), ("shared", SHARED)])
def test_the_likeness_can_be_for_either_adapter_and_is_seen_by_the_own_one(on, slot):
    method = FedDPA(lora=LORA, similarity_on=on, scale=0.7)
    states, _ = simulate(method, [EVERYONE] * 2)
    plan = served(method, states, "a")["a"].plan
    assert plan.combine.scale == 0.7
    assert plan.slots[plan.combine.on].name == slot
    assert plan.slots[plan.combine.embeds].name == INDIVIDUAL


# How a question is weighed: with a real model.


def weighed(base, references, scale=1.0, on=0, seed=0):
    """A serving of random adapters that compares with these references."""
    plan = Plan(SLOTS, Similarity(scale, on=on, embeds=0))
    return Serving(plan, random_serving_tree(base, plan, seed), references)


def fixed(base, weight, seed=0):
    """The same adapters, the own one with this weight for every question."""
    plan = Plan(SLOTS, Sum((weight, 1 - weight)))
    return Serving(plan, random_serving_tree(base, plan, seed))


def own_embeddings(base, serving, prompts):
    tree = select(serving.tree, INDIVIDUAL, HEAD)
    return embed(base, Plan(SLOTS[:1], Sum((1.0,))), tree, prompts, 2)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_without_a_tail_f_answers_as_fedit_however_it_is_blended(scale):
    base = base_of()
    method = FedDPA(lora=LORA, schedule="F", tail_epochs=0, scale=scale)
    averaged = random_serving_tree(base, Plan(SLOTS[1:], Sum((1.0,))))
    client, message = method.init_client(start_of(base), "a"), Message(averaged, {"round": 3})

    def carry_out(client_id, number, order):
        match order:
            case Fit():
                trained = train(base, order, QUESTIONS, Training(), seed=0)
                return Fitted(trained.tree, len(QUESTIONS))
            case Embed():
                return embed(base, order.plan, order.tree, PROMPTS, 2)

    serving = run_one(method.deploy(client, message), carry_out, "a")
    own = move(select(serving.tree, INDIVIDUAL), INDIVIDUAL, SHARED)
    assert trees.equal(own, select(serving.tree, SHARED))
    found = score(base, serving, QUESTIONS, QUICK)
    fedit = FedIT(lora=LORA)
    expected = fedit.shared(fedit.init_client(start_of(base), "a"), Message(averaged))
    expected = score(base, expected, QUESTIONS, QUICK)
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-5)
    assert found.predictions == expected.predictions


@pytest.mark.parametrize("on", [0, 1], ids=[INDIVIDUAL, SHARED])
def test_with_a_weight_of_one_an_adapter_answers_as_if_it_were_alone(on):
    base = base_of()
    draft = weighed(base, None)
    alone = Plan((SLOTS[on],), Sum((1.0,)))
    for question in QUESTIONS:
        references = own_embeddings(base, draft, [question.prompt_ids])  # a cosine of 1
        found = score(base, weighed(base, references, on=on), [question], QUICK)
        tree = select(draft.tree, SLOTS[on].name, HEAD)
        expected = score(base, Serving(alone, tree), [question], QUICK)
        assert found.metrics == pytest.approx(expected.metrics, abs=1e-4)
        assert found.predictions == expected.predictions


@pytest.mark.parametrize("model", [llama, gpt2])
def test_an_embedding_is_the_last_hidden_state_of_the_prompt_whatever_stands_beside_it(model):
    base = base_of(model())
    serving = weighed(base, None)
    together = own_embeddings(base, serving, PROMPTS)
    tree = select(serving.tree, INDIVIDUAL, HEAD)
    for prompt, found in zip(PROMPTS, together, strict=True):
        with base.adapted.bound(Plan(SLOTS[:1], Sum((1.0,))), tree) as bound, torch.no_grad():
            hidden = bound(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(found, hidden[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_question_that_is_a_reference_gets_the_scale_as_its_weight(model, scale):
    base = base_of(model())
    draft = weighed(base, None)
    for question in QUESTIONS:
        references = own_embeddings(base, draft, [question.prompt_ids] * 3)
        found = score(base, weighed(base, references, scale), [question], QUICK)
        expected = score(base, fixed(base, scale), [question], QUICK)
        assert found.metrics == pytest.approx(expected.metrics, abs=1e-4)
        assert found.predictions == expected.predictions


def test_a_question_unlike_all_references_gets_the_other_adapter_alone():
    base = base_of()
    draft = weighed(base, None)
    question = QUESTIONS[0]
    seen = own_embeddings(base, draft, [question.prompt_ids])
    other = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    other -= (other * seen).sum() / seen.square().sum() * seen
    found = score(base, weighed(base, other), [question], QUICK)
    expected = score(base, fixed(base, 0.0), [question], QUICK)
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-4)
    turned = score(base, weighed(base, other, on=1), [question], QUICK)
    assert turned.metrics == pytest.approx(
        score(base, fixed(base, 1.0), [question], QUICK).metrics, abs=1e-4
    )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("model", [llama, gpt2])
def test_questions_of_different_weights_are_answered_together_as_each_alone(model, beams):
    base = base_of(model())
    draft = weighed(base, None)
    seen = own_embeddings(base, draft, PROMPTS)
    # Weights between -1 and 1: what is like the first question is unlike some other.
    centred = seen - seen.mean(0)
    serving = weighed(base, centred[:1])
    scoring = Scoring(batch_size=3, max_new_tokens=6, beams=beams)
    likeness = torch.nn.functional.cosine_similarity(seen, centred[:1])
    assert float(likeness.max() - likeness.min()) > 0.05
    together = generate(base, serving, PROMPTS, scoring)
    assert together == [generate(base, serving, [prompt], scoring)[0] for prompt in PROMPTS]
    for prompt, text, weight in zip(PROMPTS, together, likeness.tolist(), strict=True):
        assert generate(base, fixed(base, weight), [prompt], scoring) == [text]


@pytest.mark.parametrize("model", [llama, gpt2])
def test_options_of_questions_of_different_weights_are_compared_together_as_each_alone(model):
    base = base_of(model())
    draft = weighed(base, None)
    seen = own_embeddings(base, draft, PROMPTS)
    references = (seen - seen.mean(0))[:1]
    likeness = torch.nn.functional.cosine_similarity(seen, references).tolist()
    scoring = Scoring(batch_size=3, generate=False)
    serving = weighed(base, references)
    each = [
        score(base, fixed(base, weight), [question], scoring).metrics
        for question, weight in zip(QUESTIONS, likeness, strict=True)
    ]
    for question, expected in zip(QUESTIONS, each, strict=True):
        found = score(base, serving, [question], scoring).metrics
        assert found == pytest.approx(expected, abs=1e-4)
    # The loss is a mean over answer tokens, each answer with its end.
    tokens = [len(question.ids) - question.answer_start for question in QUESTIONS]
    together = score(base, serving, QUESTIONS, scoring).metrics
    loss = sum(n * one["loss"] for n, one in zip(tokens, each, strict=True)) / sum(tokens)
    assert together["loss"] == pytest.approx(loss, abs=1e-4)
    assert together["accuracy"] == sum(one["accuracy"] for one in each) / len(each)


def test_a_classifier_weighs_its_questions_too():
    base = base_of(bert_classifier())
    questions = [Example(tuple(range(3, 6 + n)), 3 + n, "1", ("0", "1", "2"), 1) for n in range(4)]
    draft = weighed(base, None)
    references = own_embeddings(base, draft, [questions[2].prompt_ids])
    found = score(base, weighed(base, references), [questions[2]], QUICK).metrics
    assert found == pytest.approx(score(base, fixed(base, 1.0), [questions[2]], QUICK).metrics)
    whole = score(base, weighed(base, references), questions, QUICK).metrics["loss"]
    each = [score(base, weighed(base, references), [q], QUICK).metrics["loss"] for q in questions]
    assert whole == pytest.approx(sum(each) / 4, abs=1e-5)


# Whole runs.


@pytest.fixture(scope="module")
def fedit_run(run_flags, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "fedit"
    assert call("run", *run_flags, "--method", "fedit", "--rounds", 2, "--out", run) == 0
    return run


@pytest.mark.parametrize("schedule", ["T", "F"])
def test_a_run_scores_every_client_and_its_model_answers(
    run_flags, fedit_run, tmp_path, capsys, schedule
):
    config = tmp_path / "c.toml"
    config.write_text(f'[method]\nname = "feddpa"\nschedule = "{schedule}"\n')
    run = tmp_path / "run"
    assert call("run", config, *run_flags, "--method", "feddpa", "--rounds", 2, "--out", run) == 0
    tested = [line for line in scores_of(run) if line.get("split") == "test"]
    for column in ("own", "shared", "local"):
        assert {e["client"] for e in tested if e["column"] == column} == {"a", "b", "c"}
    # Batches and dropout included, what is shared went the way of FedIT, bit for bit.
    ours, theirs = (load_file(each / "server" / "0001.safetensors") for each in (run, fedit_run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    capsys.readouterr()
    assert call("generate", run, "--client", "a", "ask 3a") == 0
    assert capsys.readouterr().out.strip()
    assert call("export", run, "--client", "a", "--out", tmp_path / "e") == 2
    assert "weigh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"blend": 1.5}, "blend=1.5"),
        ({"scale": -0.1}, "scale=-0.1"),
        ({"references": 0}, "references=0"),
        ({"tail_epochs": -1}, "tail_epochs=-1"),
        ({"tail_epochs": 2}, "tail_epochs=2 is only for schedule='F', and here schedule='T'"),
        ({"schedule": "F", "blend": 0.3}, "blend=0.3 is only for schedule='T'"),
    ],
)
def test_impossible_settings_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        FedDPA(**wrong)
