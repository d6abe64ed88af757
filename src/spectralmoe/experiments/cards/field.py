"""The table of the field: every method of a paper that is here, its file, its row, its card and the card's verdict."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIELD", "Method", "field_table"]


@dataclass(frozen=True, slots=True)
class Method:
    """One method.

    Attributes:
        name: as the paper calls it.
        what: what it is here, in a few words.
        arxiv: id of the paper.
        files: its files, below ``src/spectralmoe``; the first says what it is.
        card: folder of its reproduction card, below ``papers``.
        verdict: what the card's README calls its verdict.
        rows: presets that ``compare`` knows it by.
    """

    name: str
    what: str
    arxiv: str
    files: tuple[str, ...]
    card: str
    verdict: str
    rows: tuple[str, ...] = ()


FIELD = (
    Method(
        "SR-MoE",
        "scorer: distance to prototypes, with two spectral terms",
        "2601.03889",
        ("scorers/prototype.py", "regularizers/spectral.py"),
        "sr-moe",
        "the signs hold; prototypes and the selection bias bring most of it, the spectral terms little",
        ("sr-moe",),
    ),
    Method(
        "EMoE",
        "scorer: energy of the token along an orthonormal basis",
        "2601.12137",
        ("scorers/principal.py", "scorers/eigenbasis.py"),
        "emoe",
        "not with the equations as they stand; in the default form all experts are used, at no separated accuracy",
        ("emoe", "emoe-faithful"),
    ),
    Method(
        "L2R",
        "scorer: saturated inner products in a low-rank space",
        "2601.21349",
        ("scorers/saturated.py",),
        "l2r",
        "not at this size, and saturation is not what helps",
        ("l2r",),
    ),
    Method(
        "ERMoE",
        "bank and scorer: experts in eigen-form that score tokens by their own bases",
        "2511.10971",
        ("scorers/basis.py", "experts/eigen.py", "selectors/threshold.py"),
        "ermoe",
        "not at this size",
        ("ermoe", "ermoe-context"),
    ),
    Method(
        "MoEC",
        "selector and loss: groups of experts that stand in for each other",
        "2207.09094",
        ("selectors/cluster_dropout.py", "regularizers/cluster_variance.py"),
        "moec",
        "more experts hurt less; clusters are not separated from dropout of experts",
        ("moec",),
    ),
    Method(
        "Synergistic losses",
        "losses: overlap of hidden activations, coupled paths",
        "2602.14159",
        ("regularizers/path_coupling.py", "regularizers/activation_overlap.py"),
        "synergy",
        "no gain that these runs can see",
        ("synergy",),
    ),
    Method(
        "Expert specialization",
        "losses: overlap of outputs, variance of scores",
        "2505.22323",
        ("regularizers/output_overlap.py", "regularizers/score_variance.py"),
        "specialization",
        "accuracy rises as claimed; the overlap falls, but outputs shrink as well",
        ("specialization",),
    ),
    Method(
        "muMoE",
        "bank: linear experts that are slices of one factorised tensor",
        "2402.12550",
        ("experts/multilinear.py", "selectors/entmax.py", "models/multilinear_block.py"),
        "mumoe",
        "no",
        ("mumoe", "mumoe-tr"),
    ),
    Method(
        "MPOE",
        "bank: matrix product operators that share their central core",
        "2203.01104",
        ("experts/mpo.py", "optim/gradient_mask.py"),
        "mpoe",
        "behind Switch, ahead of narrower experts of as few numbers; the mask costs, slower steps of the core help",
        ("mpoe",),
    ),
    Method(
        "MoFME",
        "bank and scorer: modulations of a shared feature, a calibrated router",
        "2312.16610",
        ("experts/modulated.py", "models/modulated.py", "scorers/monte_carlo.py"),
        "mofme",
        "modulated experts hold, the uncertain router cannot be told",
        ("mofme",),
    ),
    Method(
        "MoR",
        "layer: the ranks of an adapter as experts, routed by severity",
        "2511.16024",
        ("ranks.py", "scorers/context.py", "regularizers/severity.py", "data/severity.py"),
        "mor",
        "holds but for its balance loss",
    ),
    Method(
        "ConfSMoE",
        "bank: experts that say how sure they are",
        "2505.19525",
        (
            "experts/confident.py",
            "selectors/unweighted.py",
            "regularizers/confidence.py",
            "data/imputation.py",
            "models/views.py",
        ),
        "confsmoe",
        "no, and collapse could not be tested",
        ("confsmoe",),
    ),
    Method(
        "MoCE-IR",
        "bank and loss: experts of unequal cost",
        "2411.18466",
        ("experts/heterogeneous.py", "experts/patch_mixer.py", "regularizers/complexity_balance.py"),
        "moce-ir",
        "no gain in restoration; the loss saves work",
        ("moce-ir",),
    ),
    Method(
        "FMSR",
        "scorer and expert: spectra as a gate, frequency mixing",
        "2405.04964",
        ("scorers/spectrum.py", "experts/frequency_mixer.py"),
        "fmsr",
        "the spectrum tells kinds apart; what experts gain, random filters give too",
    ),
    Method(
        "PhyG-MoE",
        "loss and network: the spectrum decides when a heavy expert is called",
        "2601.12798",
        ("regularizers/expected_cost.py", "models/signal.py", "data/interference.py"),
        "phyg-moe",
        "ahead of chance, but not by paying for the hard records",
        ("phyg-moe",),
    ),
    Method(
        "OMoE",
        "optimizer: each expert steps orthogonally to what the others read",
        "2310.09762",
        ("optim/orthogonal_experts.py",),
        "omoe",
        "no",
        ("omoe",),
    ),
    Method(
        "Statistics memory",
        "before the router: tokens aligned to the statistics of clean ones",
        "2506.08979",
        ("scorers/statistics_memory.py",),
        "memory",
        "by stream it holds where no LayerNorm stands before the experts; by sample it does not",
    ),
    Method(
        "Soft-routed units",
        "network of a theory: a student of gated units learns from a teacher",
        "2510.07205",
        ("models/soft_routed.py", "optim/sphere.py"),
        "soft-routed",
        "mostly holds: experts lead, routers follow; the time scale cannot be told",
    ),
    Method(
        "Generalization bound",
        "diagnostic: a bound that grows with K, log E and the router",
        "2403.17404",
        ("diagnostics/bound.py",),
        "bound",
        "in part",
    ),
    Method(
        "LLEP",
        "dispatch: tokens that a busy device cannot take go to the least loaded ones",
        "2601.17111",
        ("parallel/least_loaded.py",),
        "llep",
        "holds in the model, and replicas are the rival",
    ),
    Method(
        "Replicate-and-Quantize",
        "compression: copies of busy experts, paid for by short integers",
        "2602.19938",
        ("compression/replicate_quantize.py", "compression/quantize.py"),
        "replicate-quantize",
        "the copy helps over whole data and large batches; who pays cannot be told",
    ),
    Method(
        "Knowledge attribution",
        "diagnostic: what each expert adds to the log-probability of the right token",
        "2505.24593",
        ("attribution/attribute.py",),
        "attribution",
        "holds for single facts and layers, not for relations, where usage says more",
    ),
)


def field_table(root: str = "") -> list[str]:
    """The table as lines of Markdown; its links lead to the repository, which lies at ``root``.

    >>> field_table()[2][:22]
    '| SR-MoE, [2601.03889]'
    """
    lines = [
        "| method | what it is here | files | row | card: does its claim hold here? |",
        "| --- | --- | --- | --- | --- |",
    ]
    for item in FIELD:
        name = f"{item.name}, [{item.arxiv}](https://arxiv.org/abs/{item.arxiv})"
        files = ", ".join(f"[src/spectralmoe/{file}]({root}src/spectralmoe/{file})" for file in item.files)
        rows = ", ".join(f"`{row}`" for row in item.rows)
        card = f"[{item.card}]({root}papers/{item.card}/README.md): {item.verdict}"
        lines.append(f"| {name} | {item.what} | {files} | {rows} | {card} |")
    return lines
