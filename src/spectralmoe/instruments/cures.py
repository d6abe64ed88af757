"""Thresholds of the findings, and their cures in this library."""

from __future__ import annotations

__all__ = ["CURES", "THRESHOLDS"]

THRESHOLDS = {
    "dead_experts": 1.0,  # experts with less than DEAD_SHARE of an even load
    "collapse": 0.75,  # concentration: 0 is even, 1 is all tokens on the same K experts
    "sequence_collapse": 0.75,  # the same inside single sequences
    "imbalance": 2.0,  # MaxVio: the busiest expert has three times an even load
    "near_tie": 0.5,  # share of tokens whose choice is decided by 1% of a score
    "precision_flip": 0.05,  # share of tokens that bf16 sends elsewhere; or twice that of a sound router, if more
    "homogeneous": 0.5,  # mean squared cosine of the experts' outputs for the same token
    "duplicates": 0.98,  # the same for one pair of experts; for weights, their cosine
    "dropped_slots": 0.05,  # share of slots that a capacity emptied
    "no_router": 0.01,  # spread of the rows of the routing matrix; here, the value or less
    "empty_expert": 1.0,  # experts whose weights are all zero
}
"""A finding is made when the value reaches this."""

_BALANCE = "Balanced(k) (a loss-free bias), Term(load_balance, 1e-2), or PrincipalScorer, which starts balanced"

CURES = {
    "dead_experts": f"balance the load: {_BALANCE}",
    "collapse": f"balance the load: {_BALANCE}; check the learning rate of the router",
    "sequence_collapse": "balance inside sequences too: Term(load_balance, 1e-2) on single sequences, or ExpertChoice",
    "imbalance": f"balance the load: {_BALANCE}",
    "near_tie": (
        "widen the margins: a lower temperature (CosineScorer, PrototypeScorer), no weight decay on the router; "
        "routing_radius tells how far single tokens are from a change"
    ),
    "precision_flip": (
        "route in fp32, as Router does in models of any precision; elsewhere keep the router and its input in float32"
    ),
    "homogeneous": (
        "make the experts differ: Term(stable_rank, 1e-2), or start them apart (replace_mlp(init='random'))"
    ),
    "dropped_slots": "raise the factor of Capacity(selector, factor), or use TopK or Balanced, which drop nothing",
    "no_router": "the router was never trained, or lost: fetch or save the checkpoint again, or start it anew",
    "empty_expert": "the expert was never trained, or lost: fetch or save the checkpoint again",
    "no_router_gradient": "use TopK(1, normalize=False): a weight that is always 1 gives the router no gradient",
    "balance_off": "pass output_router_logits=True, or set the coefficient to 0 and use Term(load_balance, 1e-2)",
    "no_balancing": "add Term(load_balance, 1e-2) on the recorded routing, or move the biases as Balanced does",
    "probabilities_as_logits": "take the routing from watch_transformers, not from the model's router_logits",
    "double_softmax": "set router_aux_loss_coef=0 and add Term(load_balance, 1e-2) yourself",
    "not_finite": "go back to a checkpoint from before the weights stopped being finite",
    "no_data": "give more tokens (--tokens) or a larger data set",
    "no_choice": (
        "nothing, by more data: one expert, or all of them, is no choice to judge, and a choice by noise or by the "
        "experts is not told by the scores"
    ),
    "not_run": "run the model on data: inspect without --router-only or --gates-only",
    "half_precision": "inspect a checkpoint in float32, where there is one (--dtype float32)",
}
"""The cure of a finding, by kind."""
