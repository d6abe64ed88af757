"""The fields of an inspection that the page reads, checked when a file is read."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from spectralmoe.instruments.findings import Severity
from spectralmoe.report.schema_parts import Count, Group, Part, Quantity

__all__ = ["Example", "Found", "Holders", "Inspection", "Layer", "Leaning", "Matrix", "Passage", "Path"]

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
MOST_EXPERTS = 2**16


class Load(Group):
    """Slots of each expert (E,); no shares where the layer's numbers are not finite."""

    counts: list[Count]
    share: list[float | None] = Field(default_factory=list)


class Geometry(Group):
    """Singular values of the routing matrix, largest first."""

    spectrum: list[float | None] = Field(default_factory=list)


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

    share: list[float | None] = Field(default_factory=list)


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
    examples: list[list[Example]] = Field(default_factory=list)

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


class Leaning(Part):
    """For each token of a passage the expert with the largest weight in one layer, and this weight; null: no expert."""

    experts: list[Count | None]
    weights: list[float | None]


class Passage(Part):
    """Running text: one piece a token; for each layer where they went, null where it routed other things."""

    title: str = ""
    pieces: list[str]
    layers: list[Leaning | None]


class Holder(Part):
    """What an expert adds to the log-probability of a token; null: the shared part. ``layer``: its place."""

    layer: Count
    expert: Count | None = None
    weight: float | None
    gain: float | None


class LayerGain(Part):
    """What a whole layer adds to the log-probability of a token."""

    layer: Count
    gain: float | None


class Holders(Part):
    """A text, and the gains of the experts for its last token."""

    pieces: list[str] = Field(min_length=2)
    log_prob: float | None
    experts: list[Holder]
    layers: list[LayerGain]


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
    notes: list[str] = Field(default_factory=list)


class Inspection(Part):
    """``spectralmoe inspect``."""

    title: str
    model: Model
    data: Data | None = None
    layers: list[Layer] = Field(min_length=1)
    paths: list[Path] = Field(default_factory=list)
    text: list[Passage] = Field(default_factory=list)
    holders: list[Holders] = Field(default_factory=list)
    findings: list[Found] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for passage in self.text:
            if len(passage.layers) != len(self.layers):
                raise ValueError("text: a passage has not one entry a layer")
            for leaning, layer in zip(passage.layers, self.layers, strict=True):
                if leaning and {len(leaning.experts), len(leaning.weights)} != {len(passage.pieces)}:
                    raise ValueError(f"text: layer {layer.label} has not one expert and one weight a token")
                if leaning and any(e is not None and e >= layer.experts for e in leaning.experts):
                    raise ValueError(f"text: layer {layer.label}: an expert that is not there")
        for held in self.holders:
            places = [*(row.layer for row in held.experts), *(row.layer for row in held.layers)]
            if any(place >= len(self.layers) for place in places):
                raise ValueError("holders: a layer that is not there")
            if any(row.expert is not None and row.expert >= self.layers[row.layer].experts for row in held.experts):
                raise ValueError("holders: an expert that is not there")
        for path in self.paths:
            if max(path.first, path.last) >= len(self.layers):
                raise ValueError("paths: a layer that is not there")
            first, last = self.layers[path.first].experts, self.layers[path.last].experts
            lengths = (len(path.out or [0] * first), len(path.into or [0] * last))
            if lengths != (first, last) or any(not (0 <= i < first and 0 <= j < last) for i, j, _ in path.flows):
                raise ValueError("paths: an expert that is not there")
        return self
