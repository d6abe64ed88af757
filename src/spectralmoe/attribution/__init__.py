"""Knowledge attribution: it measures what each expert adds to the log-probability of a token, and blocks experts.

Li et al., "Decoding Knowledge Attribution in Mixture-of-Experts: A Framework of Basic-Refinement Collaboration and
Efficiency Analysis", arXiv 2505.24593.
"""

from spectralmoe.attribution.attribute import attribute_experts
from spectralmoe.attribution.blocking import block
from spectralmoe.attribution.holders import holders
from spectralmoe.attribution.table import Table

__all__ = ["Table", "attribute_experts", "block", "holders"]
