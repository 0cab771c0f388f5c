"""Mixtures of experts as one linear map: joint keys, metric and solve against values computed from the formulas.

Expected values are computed here from the router's and the experts' weights (read off transformers' modeling files),
with dense matrices and in float64.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from callbacks.trust.probes import attribution_focus
from editlab.edits.batch import BatchSolver
from editlab.edits.edited_layer import EditedLayer
from editlab.edits.plan import EditOutcome, EditPlan
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.keys.moments import accumulate, excess
from editlab.keys.subject_keys import locate
from editlab.lm.anatomy import read_anatomy
from editlab.lm.experts import JointMap, joint_map
from editlab.lm.forward import reading
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import EMMET, MEMIT, ROME, AlphaEdit, UltraEdit
from editlab.values.spread import Targets
from tests.facts import FACTS
from tests.tiny import MIXTURES, tiny_model, tiny_tokenizer

TESTED = ["mixtral", "qwen3_moe"]
BATCH = FACTS[:3]
WINDOWS = [[(7 * i + 13 * j) % 390 + 5 for i in range(40)] for j in range(6)]


def in_float64(family: str, **changes) -> LanguageModel:
    """A tiny mixture of experts in float64, which only transformers' plain implementation of experts computes in."""
    model = tiny_model(family, **changes).double()
    model.set_experts_implementation("eager")
    return LanguageModel(model, tiny_tokenizer())


def routing(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Weight of each expert for each token, [tokens, experts]: the k largest probabilities, divided by their sum."""
    gate = block.mlp.gate
    probabilities = torch.softmax((hidden @ gate.weight.T).float(), dim=-1).to(hidden)
    top = probabilities.topk(gate.top_k, dim=-1)
    weights = torch.zeros_like(probabilities).scatter(1, top.indices, top.values)
    return weights / weights.sum(1, keepdim=True)


@torch.no_grad()
def expected_keys(lm: LanguageModel, layer: int, rows: list[tuple[int, ...]]) -> torch.Tensor:
    """Joint keys at all tokens of the rows, [tokens, d_k], by the formula ``[g_1 h_1; ...; g_E h_E]``."""
    block, experts = lm.anatomy.blocks[layer], lm.anatomy.blocks[layer].mlp.experts
    found = []
    for row in rows:
        with reading({"x": (block.mlp, "input")}, stop="x") as seen:
            lm.run(torch.tensor([row]))
        x = seen["x"][0]
        gates = routing(block, x)
        features = [
            nn.functional.silu(x @ w[: len(w) // 2].T) * (x @ w[len(w) // 2 :].T) for w in experts.gate_up_proj.detach()
        ]
        found.append(torch.cat([gates[:, e, None] * h for e, h in enumerate(features)], dim=1))
    return torch.cat(found)


@pytest.fixture(scope="module", params=TESTED)
def lm(request):
    return in_float64(request.param)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in MIXTURES), ("mixtral", torch.bfloat16), ("gpt_oss", torch.bfloat16)],
)
def test_the_experts_of_each_family_are_found(family, dtype):
    model = tiny_model(family).to(dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    anatomy = read_anatomy(model)
    assert anatomy.edit_path == ("block_sparse_moe.experts" if family == "granitemoe" else "mlp.experts")
    assert anatomy.additive
    assert anatomy.editable == [0, 1, 2]
    for layer in range(3):
        module = anatomy.edit_module(layer)
        assert isinstance(module, JointMap)
        assert (module.name, module.transposed) == ("down_proj", family == "gpt_oss")
        assert anatomy.moments_shape(layer) == (module.count, module.features, module.features)
        assert anatomy.key_size(layer) == module.count * module.features
        assert anatomy.value_size(layer) == 32
        assert anatomy.edit_name(layer) == f"model.layers.{layer}.{anatomy.edit_path}"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("family", MIXTURES)
def test_an_update_moves_the_output_by_itself_times_the_joint_key(family):
    """That is what an edit relies on; GPT-OSS has biases, and stores the projections transposed."""
    model = tiny_model(family)
    anatomy = read_anatomy(model)
    module = anatomy.edit_module(1)
    ids = torch.arange(20, 30)[None]

    def read():
        with reading({"key": (module, "input"), "out": (module, "output")}) as seen, torch.no_grad():
            model(ids)
        return seen["key"], seen["out"].view(-1, 32)

    key, before = read()
    assert key.shape == (10, module.in_features)
    k = model.config.num_experts_per_tok
    assert ((key.view(10, module.count, -1) != 0).any(2).sum(1) == k).all()  # k experts fire at each token
    update = torch.randn(32, module.in_features, generator=torch.Generator().manual_seed(0))
    layer = EditedLayer(module, anatomy.transposed(1))
    layer.add(update)
    same, after = read()
    torch.testing.assert_close(same, key)  # the router of a layer does not see the layer's own update
    torch.testing.assert_close(after - before, key @ update.T, rtol=1e-3, atol=1e-3)
    layer.restore(torch.zeros_like(update))
    assert torch.equal(read()[1], before)


def test_other_keys_in_place_of_the_joint_keys():
    """The output moves by the weight times the difference, and so does its gradient: trust's attribution needs it."""
    lm = LanguageModel(tiny_model("gpt_oss"), tiny_tokenizer())
    module, outputs = lm.anatomy.edit_module(1), []
    module.register_forward_hook(lambda module, args, output: outputs.append(output))
    lm.run(torch.arange(20, 24)[None])
    module.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    module.register_forward_hook(lambda module, args, output: outputs.append(output))
    lm.run(torch.arange(20, 24)[None])
    moved = module.as_matrix(module.weight.detach()).sum(1)
    torch.testing.assert_close(outputs[-1] - outputs[0], moved.expand(4, -1), rtol=1e-3, atol=1e-3)
    fractions = attribution_focus(lm, BATCH, 1)
    assert ((fractions > 0) & (fractions < 1)).all()


def test_layouts_are_each_others_inverse():
    """The weight of the second of three experts is the middle third of the matrix."""
    for transposed in (False, True):
        experts = nn.Module()
        experts.down = nn.Parameter(torch.arange(3 * 2 * 4.0).view(3, 4, 2) if transposed else torch.randn(3, 2, 4))
        module = JointMap(experts, "down", transposed)
        matrix = module.as_matrix(experts.down.detach())
        assert matrix.shape == (module.out_features, module.in_features) == (2, 12)
        second = experts.down[1].T if transposed else experts.down[1]
        assert torch.equal(matrix[:, 4:8], second)
        assert torch.equal(module.as_weight(matrix), experts.down)
        keys = torch.randn(5, 12)
        torch.testing.assert_close(module(keys), keys @ matrix.T)


class TestInFloat64:
    """Mixtral and Qwen 3 against the formulas, for one layer and for two."""

    def test_joint_keys(self, lm):
        rows = [lm.encode(fact.question).ids for fact in BATCH]
        seen = lm.read(rows, {"key": (lm.anatomy.edit_module(1), "input")}, stop="key")
        found = torch.cat([row["key"] for row in seen])
        torch.testing.assert_close(found, expected_keys(lm, 1, rows), rtol=1e-6, atol=1e-9)

    def test_second_moments_are_the_blocks_of_c0_and_bound_it(self, lm):
        """Gates are computed in float32, so moments agree to its precision."""
        found = accumulate(lm, [1], WINDOWS)[1]
        keys = expected_keys(lm, 1, [tuple(window) for window in WINDOWS])
        whole = keys.T @ keys / len(keys)
        count, size, _ = lm.anatomy.moments_shape(1)
        for e in range(count):
            one = slice(e * size, (e + 1) * size)
            torch.testing.assert_close(found[e], whole[one, one], rtol=1e-5, atol=1e-8)
        chosen = lm.model.config.num_experts_per_tok
        assert torch.linalg.eigvalsh(chosen * torch.block_diag(*found) - whole).min() > -1e-6
        assert abs(excess(found, keys)) < 1e-3  # 0, as the moments are those of the same keys, apart from the ridge

    @pytest.mark.parametrize(
        ("method", "layers"),
        [
            (EMMET(gram_ridge=0), [1]),
            (EMMET(gram_ridge=0), [0, 1]),
            (AlphaEdit(threshold=0.05, l2=0), [1]),
            (UltraEdit(mu=1e-9), [1]),
        ],
    )
    def test_the_output_at_the_subject_equals_the_target(self, lm, method, layers):
        """Sums of updates are float32, and so is the error that is left."""
        solver = BatchSolver.at(lm, layers, [""], SolveSettings(method))
        solver.set_moments(accumulate(lm, layers, WINDOWS))
        before = solver.read_outputs(BATCH)[:, 0]
        target = before + torch.randn(before.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        try:
            solver.solve(EditOutcome(EditPlan(0, BATCH, Targets(BATCH, {1: target}))))
            after = solver.read_outputs(BATCH)[:, 0]
        finally:
            for layer in solver.layers.values():
                layer.restore(torch.zeros_like(layer.total))
        torch.testing.assert_close(after, target, rtol=1e-4, atol=1e-4)
        assert torch.equal(solver.read_outputs(BATCH)[:, 0], before)

    @pytest.mark.parametrize("weight", [0.0, 0.7])
    def test_the_update_is_the_dense_closed_form(self, lm, weight):
        """MEMIT by numpy's formula with the dense block-diagonal metric, with and without context keys in it."""
        solver = BatchSolver.at(lm, [1], [""], SolveSettings(MEMIT(5.0), context_key_weight=weight))
        moments = accumulate(lm, [1], WINDOWS)
        blocks = moments[1].clone()
        solver.set_moments(moments)
        keys = solver.read_keys(BATCH, 1)
        target = torch.randn(3, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        outcome = EditOutcome(EditPlan(0, BATCH, Targets(BATCH, {1: target})))
        try:
            solver.solve(outcome)
        finally:
            solver.layers[1].restore(torch.zeros_like(solver.layers[1].total))
        ridge = 1e-6 * 5.0 * blocks.diagonal(dim1=1, dim2=2).mean()
        metric = 5.0 * torch.block_diag(*blocks) + ridge * torch.eye(len(blocks) * blocks.shape[1])
        metric = metric + weight * keys.context_keys @ keys.context_keys.T
        k, residual = keys.keys, target.T - keys.current
        expected = residual @ torch.linalg.solve(metric + k @ k.T, k).T
        torch.testing.assert_close(outcome.updates[1].double(), expected, rtol=1e-4, atol=1e-6)

    def test_only_experts_that_fire_at_the_subject_are_edited(self, lm):
        solver = BatchSolver.at(lm, [1], [""], SolveSettings(ROME()))
        solver.set_moments(accumulate(lm, [1], WINDOWS))
        fact = BATCH[:1]
        encoding, last = locate(lm, fact[0])
        fires = expected_keys(lm, 1, [encoding.ids])[last].view(lm.anatomy.edit_module(1).count, -1).ne(0).any(1)
        outcome = EditOutcome(EditPlan(0, fact, Targets(fact, {1: torch.ones(1, 32)})))
        try:
            solver.solve(outcome)
        finally:
            solver.layers[1].restore(torch.zeros_like(solver.layers[1].total))
        edited = outcome.updates[1].view(32, len(fires), -1).ne(0).any(2).any(0)
        assert torch.equal(edited, fires)
        assert fires.sum() == lm.model.config.num_experts_per_tok


def test_experts_that_no_token_goes_to_are_reported(caplog):
    """The router is made to send every token to the same two experts."""
    lm = LanguageModel(tiny_model("mixtral"), tiny_tokenizer())
    with torch.no_grad():
        lm.model.model.layers[1].mlp.gate.weight.zero_()  # equal probabilities, and the same two are chosen
    found = accumulate(lm, [1], WINDOWS)[1]
    assert found.flatten(1).any(1).sum() == 2
    assert "went to 2 of 4 experts" in caplog.text
    assert torch.isfinite(MEMIT(1.0).preservation(found).factor).all()


class TestRefused:
    """Modules that look like experts and are none, and uses that a joint map does not have."""

    def test_a_parameter_in_which_the_output_is_not_linear(self):
        experts = tiny_model("mixtral").model.layers[0].mlp.experts
        assert not JointMap(experts, "gate_up_proj", True).is_linear()
        assert joint_map(experts, 33) is None

    def test_a_block_of_experts_that_are_not_one_map(self):
        """Its experts have a norm after their projections."""
        model = tiny_model("mixtral")
        for block in model.model.layers:
            plain = block.mlp.experts.forward
            block.mlp.experts.forward = lambda *tokens, plain=plain: nn.functional.normalize(plain(*tokens), dim=-1)
        with pytest.raises(UserError, match=r"no single MLP output projection .* with model\.edit_module"):
            read_anatomy(model)

    def test_a_router_that_gives_no_choices(self):
        module = read_anatomy(tiny_model("mixtral")).edit_module(0)
        handle = module.register_forward_pre_hook(lambda module, args: None)
        dense = torch.ones(5, 4)
        with pytest.raises(UserError, match="does not give each token a list of experts"):
            handle and module._routed((torch.zeros(5, 32), dense, dense), {})

    def test_a_named_module_without_experts(self):
        with pytest.raises(UserError, match=r"model\.edit_module: 'mlp\.gate' is not a linear map"):
            read_anatomy(tiny_model("mixtral"), "mlp.gate")


def test_dense_blocks_below_the_experts_keep_their_layers():
    """DeepSeek's first block is dense: its map is found, and the experts of the others can be named."""
    config = transformers.DeepseekV3Config(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    anatomy = read_anatomy(model, "mlp.experts")
    assert anatomy.editable == [1]
    assert isinstance(anatomy.edit_module(1), JointMap)
    with pytest.raises(UserError, match=r"layer 0 has no linear map mlp\.experts \(layers \[1\] have\)"):
        anatomy.edit_module(0)
