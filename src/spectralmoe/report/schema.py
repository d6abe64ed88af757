"""The fields of an inspection that the page reads, checked when a file is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from spectralmoe.instruments.findings import Severity

__all__ = ["Example", "Found", "Group", "Inspection", "Layer", "Matrix", "Part", "Path", "Quantity"]

_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")


def _matrix(value: Any) -> Any:
    """Rows of numbers as float64; null is nan."""
    try:
        matrix = np.array(value, dtype=np.float64)
    except TypeError as error:
        raise ValueError("not a matrix of numbers") from error
    if matrix.ndim != 2:
        raise ValueError("not a matrix")
    return matrix


def _image(value: Any) -> Any:
    """Only pixels, never a link or a drawing that could hold a script."""
    if value is not None and not (isinstance(value, str) and _IMAGE.fullmatch(value)):
        raise ValueError("not an image inside a data: address")
    return value


Matrix = Annotated[np.ndarray, BeforeValidator(_matrix)]
Count = Annotated[int, Field(ge=0)]
MOST_EXPERTS = 2**16


class Part(BaseModel):
    """Keys that the page does not know are kept and ignored."""

    model_config = ConfigDict(extra="allow", frozen=True, arbitrary_types_allowed=True)


class Quantity(Part):
    """``Measure.as_json``: a value, and how much data it rests on."""

    value: float | None
    data: Count = 0
    unit: str = ""
    needs: Count = 1


class Group(Part):
    """Measures by name, beside whatever else the group holds."""

    @property
    def measures(self) -> dict[str, Quantity]:
        """Every entry that is a measure, in the order of the file."""
        return {
            key: Quantity.model_validate(value)
            for key, value in (self.model_extra or {}).items()
            if isinstance(value, Mapping) and "value" in value
        }

    @model_validator(mode="after")
    def _are_measures(self) -> Self:
        assert self.measures is not None  # read once, so that a broken one is found when the file is read
        return self


class Load(Group):
    """Slots of each expert (E,); no shares where the layer's numbers are not finite."""

    counts: list[Count]
    share: list[float | None] = []


class Geometry(Group):
    """Singular values of the routing matrix, largest first."""

    spectrum: list[float | None] = []


class Matrices(Part):
    """(E, E) each."""

    output: Matrix | None = None
    weights: Matrix | None = None
    rows: Matrix | None = None


class Similarity(Group):
    """How alike the experts are."""

    matrices: Matrices = Matrices()


class Association(Group):
    """Tokens by label and expert, labels x E."""

    labels: list[str]
    table: list[list[Count]]


class Example(Part):
    """A token with its context, or a piece of an image."""

    text: str = ""
    before: str = ""
    after: str = ""
    image: Annotated[str | None, BeforeValidator(_image)] = None
    weight: float | None = None


class Weights(Part):
    """Share of all combine weight that each expert carries (E,)."""

    share: list[float | None] = []


class Layer(Part):
    """One MoE layer."""

    name: str
    layer: int
    stack: str = ""
    experts: int = Field(ge=1, le=MOST_EXPERTS)
    top_k: int | None = None
    width: int | None = None
    load: Load | None = None
    entropy: Group | None = None
    geometry: Geometry | None = None
    similarity: Similarity | None = None
    stability: Group | None = None
    association: Association | None = None
    weights: Weights | None = None
    examples: list[list[Example]] = []

    @property
    def label(self) -> str:
        """``3``, or ``decoder 3``."""
        return f"{self.stack} {self.layer}".strip()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        e, matrices = self.experts, self.similarity.matrices if self.similarity else Matrices()
        lengths = {
            "load.counts": len(self.load.counts) if self.load else e,
            "load.share": len(self.load.share) if self.load and self.load.share else e,
            "weights.share": len(self.weights.share) if self.weights and self.weights.share else e,
            "examples": len(self.examples) or e,
        }
        for name, matrix in (("output", matrices.output), ("weights", matrices.weights), ("rows", matrices.rows)):
            if matrix is not None and matrix.size:
                lengths[f"similarity.matrices.{name}"] = e if matrix.shape == (e, e) else max(matrix.shape)
        if self.association:
            widths = {len(row) for row in self.association.table} or {e}
            lengths["association.table"] = e if widths == {e} else max(widths - {e})
            if len(self.association.table) != len(self.association.labels):
                raise ValueError(f"layer {self.label}: association has not one row a label")
        for name, length in lengths.items():
            if length != e:
                raise ValueError(f"layer {self.label}: {name} does not fit its {e} experts")
        return self


class Path(Part):
    """Tokens that went from expert i of one layer to expert j of the next: ``flows`` of (i, j, tokens).

    ``out`` and ``into`` are the tokens of each expert of the two layers, where the flows are not all there are.
    """

    first: int = Field(alias="from", ge=0)
    last: int = Field(alias="to", ge=0)
    flows: list[tuple[int, int, float]]
    out: list[float] | None = None
    into: list[float] | None = None
    mutual_information: Quantity | None = None


class Found(Part):
    """One finding."""

    kind: str
    layer: int | None = None
    name: str | None = None
    severity: Severity
    message: str
    cure: str = ""
    measure: Quantity | None = None
    threshold: float | None = None
    step: int | None = None


class Model(Part):
    """The model that was looked at."""

    name: str = ""
    kind: str = Field(default="", alias="class")
    mode: str = "run"
    dtype: str = ""
    parameters: int | None = None


class Data(Part):
    """The data that the model was run on."""

    source: str = ""
    tokens: Count = 0
    sequences: Count = 0
    tokenizer: str | None = None
    notes: list[str] = []


class Inspection(Part):
    """``spectralmoe inspect``."""

    title: str
    model: Model
    data: Data | None = None
    layers: list[Layer] = Field(min_length=1)
    paths: list[Path] = []
    findings: list[Found] = []

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for path in self.paths:
            if max(path.first, path.last) >= len(self.layers):
                raise ValueError("paths: a layer that is not there")
            first, last = self.layers[path.first].experts, self.layers[path.last].experts
            lengths = (len(path.out or [0] * first), len(path.into or [0] * last))
            if lengths != (first, last) or any(not (0 <= i < first and 0 <= j < last) for i, j, _ in path.flows):
                raise ValueError("paths: an expert that is not there")
        return self
