"""Conventions of the published codes, against a naive transcription of their procedures (tests/published.py)."""

from dataclasses import asdict, replace

import pytest
import torch

from callbacks import MemoryReplay
from editlab import edit_model
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits.batch import BatchSolver
from editlab.edits.conventions import Conventions
from editlab.edits.plan import Addition, EditOutcome, EditPlan
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import EditLabError, UserError
from editlab.keys.subject_keys import Site
from editlab.lm.language_model import LanguageModel
from editlab.solver.bare_denominator import exact_at
from editlab.solver.closed_form import Solution
from editlab.solver.methods import EMMET, MEMIT, ROME, AlphaEdit
from editlab.values.loss import rows_of
from editlab.values.optimize import optimize_values
from editlab.values.settings import PUBLISHED_SEARCH, ValueSettings
from editlab.values.spread import Targets, distinct
from tests import published
from tests.test_api import SMALL
from tests.tiny import tiny_model, tiny_tokenizer

FACTS = [
    Fact("France", "The capital of {} is", "Tokyo"),
    Fact("Danielle Darrieux", "{} speaks", "Swedish and Portuguese"),
    Fact("Oslo", "Norway, and also {}", "Lima"),
]
CONTEXTS = ["", "The currency of India. ", "Oslo lies. "]
SEARCH = {"steps": 4, "lr": 0.1, "kl_factor": 2.0, "weight_decay": 0.5, "clamp": 0.75}
LAYERS = [1, 2]
RIDGE = 1e-14  # the codes add none to C0


def settings(**changes):
    """Settings of the values that the transcription has too."""
    return ValueSettings(matmul="float32", **{**PUBLISHED_SEARCH, **SEARCH, **changes})


def solver_of(lm, method, layers, c0, **changes):
    """A solver with the published conventions of a method, and the second moments C0 at each layer."""
    used = Conventions.of("published", method, **changes)
    solve = SolveSettings(method, used.keys, site=used.site, bare_denominator=used.bare_denominator)
    solver = BatchSolver.at(lm, layers, CONTEXTS, solve)
    solver.set_moments({layer: c0.clone() for layer in layers})
    return solver, replace(settings(), kl_at=used.kl_at)


def site_of(solver):
    """The one site that all layers of a solver work towards."""
    (site,) = distinct(solver.sites)
    return site


def update_of(solver, facts, targets):
    """The updates of one batch, each layer's float32 [d_v, d_k]."""
    outcome = EditOutcome(EditPlan(0, facts, Targets(facts, {site_of(solver).layer: targets.float()})))
    solver.solve(outcome)
    return [outcome.updates[layer] for layer in solver.layers]


def close(ours, theirs, tolerance=1e-5):
    assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


def model_of(dtype=torch.float32):
    """A fresh tiny model."""
    return LanguageModel(tiny_model("llama").to(dtype), tiny_tokenizer())


@pytest.fixture(scope="module")
def c0():
    """Well-conditioned second moments, [48, 48], whose eigenvalues spread around 1."""
    rows = torch.randn(200, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rows.T @ rows / 200


@pytest.fixture(scope="module")
def top_values():
    """Published values of the facts at the top layer, float32 [32, facts]."""
    lm = model_of()
    block = lm.model.model.layers[LAYERS[-1]]
    return torch.stack([published.value(lm.model, lm.tokenizer, f, block, CONTEXTS, **SEARCH) for f in FACTS], 1)


@pytest.mark.parametrize("where", ["stream", "mlp"])
@pytest.mark.parametrize("kl_at", ["prompt", "subject"])
def test_values_are_those_of_the_published_search(kl_at, where):
    lm = model_of()
    site = Site.of(lm, 1, where)
    ours = optimize_values(lm, FACTS, site, CONTEXTS, settings(kl_at=kl_at)).target
    block = lm.model.model.layers[1]
    module = block if where == "stream" else block.mlp
    for fact, target in zip(FACTS, ours, strict=True):
        theirs = published.value(
            lm.model, lm.tokenizer, fact, module, CONTEXTS, **SEARCH, kl_at_subject=kl_at == "subject"
        )
        close(target, theirs)


def test_each_convention_of_the_values_matters():
    lm = model_of()
    found = [
        optimize_values(lm, FACTS[:1], Site.of(lm, 1, where), CONTEXTS, settings(kl_at=kl_at)).target
        for where in ("stream", "mlp")
        for kl_at in ("prompt", "subject")
    ]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one - other).norm() > 1e-2 * other.norm()


@pytest.mark.parametrize("mode", ["templates", "mean", "bare"])
def test_keys_are_averaged_as_published(mode):
    lm = model_of(torch.float64)
    solve = SolveSettings(MEMIT(), mode)
    keys = BatchSolver.at(lm, [1], CONTEXTS, solve).read_keys(FACTS, 1)
    projection = lm.model.model.layers[1].mlp.down_proj
    oracles = {
        "templates": lambda *given: published.key_of_memit(*given),
        "mean": lambda *given: published.key_of_rome(*given),
        "bare": lambda model, tok, fact, contexts, module: published.seen(model, tok, fact, "", module),
    }
    for i, fact in enumerate(FACTS):
        close(keys.keys[:, i], oracles[mode](lm.model, lm.tokenizer, fact, CONTEXTS, projection), 1e-12)
        close(keys.bare[:, i], oracles["bare"](lm.model, lm.tokenizer, fact, CONTEXTS, projection), 1e-12)
    alone = BatchSolver.at(lm, [1], [""], solve).read_keys(FACTS, 1)
    close(alone.keys, alone.bare, 1e-12)  # without contexts every mode is the bare key


@pytest.mark.parametrize("given", [False, True], ids=["values of each", "the same values"])
def test_rome_is_the_published_procedure(given, c0):
    lm = model_of(torch.float64 if given else torch.float32)
    solver, search = solver_of(lm, ROME(ridge=RIDGE), [1], c0)
    mlp = lm.model.model.layers[1].mlp
    fact = FACTS[1]
    theirs = published.value(lm.model, lm.tokenizer, fact, mlp, CONTEXTS, **SEARCH).float()
    ours = theirs[None] if given else optimize_values(lm, [fact], site_of(solver), CONTEXTS, search).target
    expected = published.rome(lm.model, lm.tokenizer, fact, theirs.double(), CONTEXTS, mlp.down_proj, c0)
    bare = published.seen(lm.model, lm.tokenizer, fact, "", mlp.down_proj)
    now = published.seen(lm.model, lm.tokenizer, fact, "", mlp.down_proj, output=True)
    (update,) = update_of(solver, [fact], ours)
    close(update, expected, 1e-6 if given else 1e-5)
    close(update.double() @ bare, theirs.double() - now, 1e-5)  # exact at the bare key, although solved for the mean


METHODS = {
    "memit": (MEMIT(covariance_weight=3.0, ridge=RIDGE), lambda c0: lambda k, r: published.memit(k, r, c0, 3.0)),
    "emmet": (
        EMMET(covariance_weight=2.0, ridge=RIDGE, gram_ridge=0.1),
        lambda c0: lambda k, r: published.emmet(k, r, c0, 2.0, 0.1),
    ),
    "alphaedit": (
        AlphaEdit(threshold=0.8, l2=10.0),
        lambda c0: lambda k, r: published.alphaedit(k, r, c0, 0.8, 10.0, torch.zeros_like(c0)),
    ),
}


@pytest.mark.parametrize("given", [False, True], ids=["values of each", "the same values"])
@pytest.mark.parametrize("name", METHODS)
def test_batches_over_two_layers_are_the_published_procedure(name, given, c0, top_values):
    method, oracle = METHODS[name]
    dtype = torch.float64 if given else torch.float32
    lm, theirs = model_of(dtype), model_of(dtype)
    solver, search = solver_of(lm, method, LAYERS, c0)
    blocks = [theirs.model.model.layers[layer] for layer in LAYERS]
    expected = published.spread(
        theirs.model, theirs.tokenizer, FACTS, top_values.double(), CONTEXTS, blocks,
        [block.mlp.down_proj for block in blocks], lambda i, keys, residuals: oracle(c0)(keys, residuals),
    )  # fmt: skip
    ours = top_values.T if given else optimize_values(lm, FACTS, site_of(solver), CONTEXTS, search).target
    for one, other in zip(update_of(solver, FACTS, ours), expected, strict=True):
        close(one, other, 2e-6 if given else 1e-5)


def test_alphaedit_with_the_keys_of_past_edits_is_the_published_procedure(c0):
    # cache_c holds sum k k^T; the consolidated memory weighs past keys by 1 / slack, which is 1 / L2.
    lm = model_of(torch.float64)
    method = AlphaEdit(threshold=0.8, l2=10.0)
    solver, _ = solver_of(lm, method, [1], c0)
    block, tok = lm.model.model.layers[1], lm.tokenizer
    past = solver.read_keys(FACTS[:1], 1).keys
    solver.preservation[1] = solver.preservation[1].plus_moments(past @ past.T / method.l2)
    facts, targets = FACTS[1:], torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    projection = block.mlp.down_proj
    keys = torch.stack([published.key_of_memit(lm.model, tok, fact, CONTEXTS, projection) for fact in facts], 1)
    now = torch.stack([published.seen(lm.model, tok, fact, "", block, output=True) for fact in facts], 1)
    expected = published.alphaedit(keys, targets.T.double() - now, c0, 0.8, 10.0, past @ past.T)
    (update,) = update_of(solver, facts, targets)
    close(update, expected, 1e-6)


def test_the_essence_row_ends_at_the_subject():
    lm = model_of()
    whole, cut = (rows_of(lm, 0, FACTS[1], [""], kl_at)[-1] for kl_at in ("prompt", "subject"))
    assert (whole.prefix, whole.tail[:1]) == (cut.prefix, cut.tail)
    assert len(whole.tail) > 1


def test_names_set_the_conventions_and_settings_given_hold():
    own = SequentialEditor(layers=[1])
    assert (own.solve_settings.key_mode, own.solve_settings.site, own.values.kl_at) == ("bare", None, "prompt")
    assert not own.solve_settings.bare_denominator
    for method in (MEMIT(), EMMET(), AlphaEdit()):
        editor = SequentialEditor(layers=[1], method=method, conventions="published")
        solve = editor.solve_settings
        assert (solve.key_mode, solve.site, editor.values.kl_at) == ("templates", None, "subject")
        assert not solve.bare_denominator
    rome = SequentialEditor(layers=[1], method=ROME(), conventions="published").solve_settings
    assert (rome.key_mode, rome.site, rome.bare_denominator) == ("mean", "mlp", True)
    mixed = SequentialEditor(
        layers=[1], method=ROME(), conventions="published", keys="bare", site="stream",
        values=ValueSettings(kl_at="prompt"),
    )  # fmt: skip
    solve = mixed.solve_settings
    assert (solve.key_mode, solve.site, mixed.values.kl_at, solve.bare_denominator) == (
        "bare",
        "stream",
        "prompt",
        True,
    )
    assert asdict(Conventions()) == {"kl_at": "prompt", "keys": "bare", "site": None, "bare_denominator": False}


def test_the_published_update_of_rome_is_scaled_by_hand():
    # delta = r u^T with r = (1, 2), u = (1, 0): it maps the key (4, 3) to 4 r, so a quarter of it is exact there.
    residual = torch.tensor([1.0, 2.0], dtype=torch.float64)
    delta = torch.outer(residual, torch.tensor([1.0, 0.0], dtype=torch.float64))
    key = torch.tensor([4.0, 3.0], dtype=torch.float64)
    scaled = exact_at(Solution(delta, 1.0, residual=0.3), key, residual)
    assert torch.equal(scaled.delta, delta / 4)
    assert scaled.residual == 0.0
    assert scaled.notes == ["scaled by 0.25 to hold at the key of the bare prompt"]
    nothing = Solution(0 * delta, 1.0)
    assert exact_at(nothing, key, 0 * residual) is nothing
    with pytest.raises(EditLabError, match="orthogonal to the mean key"):
        exact_at(Solution(delta, 1.0), torch.tensor([0.0, 1.0], dtype=torch.float64), residual)


@pytest.mark.parametrize("kind", [ROME, MEMIT])
def test_a_run_with_published_conventions_edits_and_reverts(kind):
    more = {"layers": [1], "batch_size": 1} if kind is ROME else {}
    model = tiny_model("llama")
    _, result = edit_model(
        model, tiny_tokenizer(), FACTS, method=kind(), conventions="published",
        callbacks=[MemoryReplay(memory="consolidated")], **{**SMALL, **more},
    )  # fmt: skip
    assert len(result.facts) == len(FACTS)
    # Values are found where the solver reads the present output and writes the new one.
    assert result.editor.targets.sites == distinct(result.editor.solver.sites)
    assert [site.name for site in result.editor.targets.sites] == ["mlp" if kind is ROME else "stream"]
    identity = result.editor.identity.conventions
    assert identity == {
        "kl_at": "subject", "keys": "mean" if kind is ROME else "templates",
        "site": "mlp" if kind is ROME else "stream", "bare_denominator": kind is ROME,
    }  # fmt: skip


def test_errors_of_conventions():
    class Other(MEMIT):
        pass

    for given, message in (
        ({"conventions": "theirs"}, "conventions is 'theirs': it must be one of own, published"),
        ({"conventions": "published", "method": Other()}, r"of Other are not known here \(only of ROME, MEMIT, EMMET"),
        ({"keys": "median"}, "keys is 'median': it must be one of bare, mean, templates"),
        ({"site": "attention"}, "site is 'attention': it must be one of stream, mlp"),
    ):
        with pytest.raises(UserError, match=message):
            SequentialEditor(layers=[1], **given)
    with pytest.raises(UserError, match="kl_at is 'end': it must be one of prompt, subject"):
        ValueSettings(kl_at="end")
    editor = SequentialEditor(layers=[1, 2], site="mlp")
    with pytest.raises(UserError, match=r"model\.site is mlp .* give one layer in model\.layers"):
        editor.use(model_of())
    gemma = LanguageModel(tiny_model("gemma2"), tiny_tokenizer())
    with pytest.raises(UserError, match=r"model\.site is stream, and this model has a norm after its MLP"):
        Site.of(gemma, 1, "stream")
    assert Site.of(gemma, 1).name == Site.of(gemma, 1, "mlp").name == "mlp"


def test_errors_of_the_published_rome_with_further_constraints(c0):
    lm = model_of()
    solver, _ = solver_of(lm, ROME(), [1], c0)
    plan = EditPlan(0, FACTS[:1], Targets(FACTS[:1], {1: torch.ones(1, 32)}), [Addition(FACTS[1], torch.ones(32))])
    with pytest.raises(UserError, match="a solve has one constraint"):
        solver.solve(EditOutcome(plan))
    settings = {**SMALL, "layers": [1], "batch_size": 1, "method": ROME(), "conventions": "published"}
    with pytest.raises(UserError, match=r"set MemoryReplay\.memory to consolidated"):
        edit_model(tiny_model("llama"), tiny_tokenizer(), FACTS, callbacks=[MemoryReplay()], **settings)
