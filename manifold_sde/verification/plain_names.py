"""What checks are called in a report, in plain words; the paper's numbers stand beside them."""

from __future__ import annotations

from collections.abc import Mapping

#: By the names of results; the other names are in plain words as they are.
PLAIN_NAMES: Mapping[str, str] = {
    "degrees of the derivatives": "each derivative of the loss falls with its power of the norm",
    "degrees of the noise": "the noise falls with the norm of the weights",
    "the attraction set is a cone and Phi 1-homogeneous": "gradient flow from scaled weights ends "
    "at the scaled minimiser",
    "Phi fixes the manifold and keeps the norm": "gradient flow rests at minimisers and keeps the "
    "norm",
    "Phi against SciPy's gradient flow": "the limit of gradient flow against SciPy's",
    "the derivative of Phi is the orthogonal projector": "the limit of gradient flow follows a "
    "small move by its part along the minimisers",
    "the second derivative of Phi": "the bending of gradient flow's limit, by two formulas",
    "the norm in the drift of (8) and (13)": "the drift of the limiting laws against the equation "
    "of the norm",
    "Ito and Stratonovich forms of (13)": "two forms of the limiting law's equation, one process",
    "SGD at the rates of (9) and of Remark 4.2": "SGD at rescaled rates and norm takes the same "
    "directions, step by step",
    "SGD with weight decay as SGD without it": "SGD with weight decay is SGD without it at other "
    "rates, step by step",
    "Z of (7) tends to a Brownian motion": "the summed noise of SGD against a Brownian motion",
    "A and B of (7)": "the summed steps of SGD against elapsed time",
    "Z of (15) to (17) tends to a Brownian motion": "the summed noise of SGD at any rates against "
    "a Brownian motion",
    "A and B of (15) to (17)": "the summed steps of SGD at any rates against elapsed time",
    "SGD at a fixed ratio tends to (8)": "SGD's weights after t against the limiting law",
    "SGD in the time tau tends to (13)": "SGD's direction after T against the limiting law",
    "the SDE of SGD in the time tau tends to (13)": "the SDE of SGD after T against the limiting "
    "law",
    "weight decay changes time and norm of (8)": "the limiting law with weight decay against that "
    "without it, later",
    "SGD without weight decay comes later": "SGD with weight decay against SGD without it, later",
    "SGD at two pairs of rates has one law": "SGD's directions at two pairs of rates, at one T",
}
