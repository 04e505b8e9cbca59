"""Routers of a tree of LoRA adapters: leaf weights, the descent, entropy and balance by formulas and by hand."""

import itertools
import math

import pytest
import torch

from lit_llama.lora_tree_routing import (
    decision_entropy,
    descend,
    expert_balance,
    leaf_weights,
    prompt_mean,
    top_k_weights,
    tree_balance,
)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_leaf_weights_are_products_along_the_heap_and_sum_to_one(depth: int) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 2**depth - 1)
    weights = leaf_weights(logits)
    assert (weights.sum(-1) - 1).abs().max() <= 1e-6  # (b)
    p = torch.sigmoid(logits.double())
    for leaf, turns in enumerate(itertools.product((0, 1), repeat=depth)):
        node, expected = 0, torch.ones(50, dtype=torch.float64)
        for right in turns:
            expected = expected * (p[:, node] if right else 1 - p[:, node])
            node = 2 * node + 1 + right
        torch.testing.assert_close(weights[:, leaf].double(), expected, rtol=1e-5, atol=1e-9)
    assert (leaf_weights(100 * logits).sum(-1) - 1).abs().max() <= 1e-6


def test_descent_is_greedy_and_goes_right_at_zero() -> None:
    # Branches 0.6 right; then left subtree certain, right subtree split evenly: greedy goes right, the largest weight
    # is a leaf on the left.
    p = torch.tensor([0.6, 0.999, 0.5])
    logits = torch.log(p / (1 - p))
    assert descend(logits) == 3 and leaf_weights(logits).argmax() == 1
    assert descend(torch.zeros(4, 7)).tolist() == [7] * 4
    assert descend(torch.tensor([0.0, 9.0, -1e-30])).item() == 2
    assert (leaf_weights(torch.zeros(7)) == 0.125).all()


def test_entropy_is_exact_where_the_decision_is_certain() -> None:
    z = torch.tensor([-100.0, -3.0, 0.0, 3.0, 100.0])
    p = torch.sigmoid(z.double())
    expected = torch.special.entr(p) + torch.special.entr(torch.sigmoid(-z.double()))
    torch.testing.assert_close(decision_entropy(z).double(), expected, rtol=1e-6, atol=1e-7)
    assert decision_entropy(z)[2] == pytest.approx(math.log(2)) and decision_entropy(z)[4] == 0
    bf16 = decision_entropy(z.bfloat16())
    assert bf16.isfinite().all() and (bf16 >= 0).all()


def test_balance_by_hand() -> None:
    ones = torch.ones(2)
    # Root: both tokens right; branch 2 sends one each way. Branch 1 is reached by none, so it does not count.
    z = torch.tensor([[50.0, 50.0, -50.0], [50.0, 50.0, 50.0]])
    assert tree_balance(z, ones) == pytest.approx((1 + 0) / 2, abs=1e-6)
    assert tree_balance(z, torch.tensor([1.0, 0.0])) == pytest.approx(1.0, abs=1e-6)  # the second is padding
    assert tree_balance(torch.zeros(5, 7), torch.ones(5)) == pytest.approx(0, abs=1e-7)
    # Half left, half right at the root; below, all left on the left and even on the right: (0 + 0.5 * 1 + 0.5 * 0) / 2
    z = torch.tensor([[-50.0, -50.0, 0.0], [50.0, -50.0, 0.0]])
    assert tree_balance(z, ones) == pytest.approx(0.25, abs=1e-6)


def test_mixture_of_experts_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    e = [math.exp(v) for v in (2, 1)]
    expected = torch.tensor([[e[0] / sum(e), e[1] / sum(e), 0, 0]])
    torch.testing.assert_close(top_k_weights(logits, 2), expected)
    uniform = torch.zeros(4, 4)
    assert expert_balance(torch.eye(4) * 50, 1, torch.ones(4)) == pytest.approx(1)
    one_sided = uniform.clone()
    one_sided[:, 0] = 50
    assert expert_balance(one_sided, 1, torch.ones(4)) == pytest.approx(4)


def test_prompt_mean_sees_nothing_behind_and_stays() -> None:
    torch.manual_seed(0)
    embedded = torch.randn(2, 9, 4)
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, -1]])
    pooled = prompt_mean(embedded, 3, documents, None)
    for row, place in itertools.product(range(2), range(9)):
        own = [i for i in range(place + 1) if documents[row, i] == documents[row, place]][:3]
        torch.testing.assert_close(pooled[row, place], embedded[row, own].mean(0))
