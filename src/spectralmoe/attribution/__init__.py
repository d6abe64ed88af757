"""Knowledge attribution: what each expert adds to the log-probability of a token, and models without some experts.

Li et al., "Decoding Knowledge Attribution in Mixture-of-Experts: A Framework of Basic-Refinement Collaboration and
Efficiency Analysis", arXiv 2505.24593. Found in ``spectralmoe.diagnostics``, too.
"""

from spectralmoe.attribution.attribute import attribute_experts
from spectralmoe.attribution.blocking import block
from spectralmoe.attribution.holders import holders
from spectralmoe.attribution.table import Table

__all__ = ["Table", "attribute_experts", "block", "holders"]
