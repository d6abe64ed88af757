"""Which blocks a choice means, how wide they are and how their output lies, against what the models really give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe.vision import choose_blocks, model_blocks
from spectralmoe.vision.blocks import block_width, is_channels_first, prefix_tokens


def chain(depth):
    model = nn.Module()
    model.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth)))
    return model


@pytest.mark.parametrize(
    ("which", "indices"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("last6", [1, 2, 3, 4, 5, 6]),
        ("last1", [6]),
        ("1,3", [1, 3]),
        (" 3 , 1", [1, 3]),
        ("-1", [6]),
        ([1, 3], [1, 3]),
        ((-1, 0, 6), [0, 6]),
        (range(2), [0, 1]),
    ],
)
def test_choices(which, indices):
    model = chain(7)
    chosen = choose_blocks(model, which)
    assert list(chosen) == [f"blocks.{index}" for index in indices]
    assert all(chosen[path] is model.get_submodule(path) for path in chosen)


@pytest.mark.parametrize("which", ["last8", "last0", "7", [-8], [7], []])
def test_a_choice_out_of_range_is_refused(which, user_error):
    with user_error(repr(which), "7 blocks"):
        choose_blocks(chain(7), which)


@pytest.mark.parametrize("which", ["lats6", "", "1;3", "last-1", "1,,3", ["a"], [1.5]])
def test_a_choice_that_cannot_be_read_is_refused(which, user_error):
    with user_error(repr(which)):
        choose_blocks(chain(7), which)


def test_blocks_run_in_the_order_given_and_give_what_is_said_of_them(family, make_vision, images):
    model, seen = make_vision(family), []
    blocks = model_blocks(model)
    for path, block in blocks.items():
        block.register_forward_hook(lambda *arguments, path=path: seen.append((path, arguments[-1].shape)))
    model(images)
    assert [path for path, _ in seen] == list(blocks)
    for path, shape in seen:
        width = block_width(path, blocks[path])
        layout = 1 if is_channels_first(blocks[path], width) else -1
        assert shape[layout] == width, (path, shape)


class Both(nn.Module):
    """A block that takes both layouts."""

    def __init__(self, *children):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), *children)

    def forward(self, x):
        return x


def test_the_layout_of_a_block(make_vision):
    layouts = {"convnext_atto": {True}, "convnext": {True}, "poolformer": {True}, "swin": {False}, "vit": {None}}
    for name, layout in layouts.items():
        model, seen = make_vision(name), []
        blocks = model_blocks(model)
        for block in blocks.values():
            block.register_forward_hook(lambda *_, to=seen: to.append(1))
        found = {is_channels_first(block, block_width(path, block)) for path, block in blocks.items()}
        assert found - {None} <= layout, name
        assert found & layout, name
        assert not seen, "what watches a model sees no trial"
    convolves = Both()
    convolves.mix = nn.Conv2d(8, 8, 1)
    assert is_channels_first(convolves, 8)
    assert is_channels_first(Both(), 8) is None
    assert is_channels_first(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), 8) is False


@pytest.mark.parametrize(
    ("name", "count"),
    [("vit", 1), ("dinov2_reg", 5), ("dinov3", 5), ("siglip", 0), ("swin", 0), ("hiera", 0), ("convnext", 0)],
)
def test_prefix_tokens(make_vision, name, count):
    assert prefix_tokens(make_vision(name)) == count


@pytest.mark.parametrize("name", ["cait", "xcit"])
def test_class_attention_brings_its_token_in_behind_the_blocks(make_vision, images, name):
    model, lengths = make_vision(name), []
    for block in model_blocks(model).values():
        block.register_forward_hook(lambda _, __, output: lengths.append(output.shape[1]))
    model(images)
    assert set(lengths) == {16 if name == "cait" else 4}  # the patches alone
    assert prefix_tokens(model) == 0


def test_stages_and_nested_containers_are_counted_through(make_vision):
    swin = list(model_blocks(make_vision("swin")))
    assert swin == ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]
    nested = nn.Module()
    nested.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])])
    assert list(model_blocks(nested)) == ["blocks.0.0", "blocks.1.0", "blocks.1.1"]


def test_a_model_without_blocks_is_refused(make_vision, user_error):
    for model in (make_vision("resnet"), nn.Linear(3, 3)):
        with user_error(type(model).__name__, "no blocks"):
            choose_blocks(model, "all")


def test_where_the_blocks_are_is_said(make_vision, user_error):
    model = nn.ModuleDict({"backbone": make_vision("vit"), "head": nn.Linear(3, 3)})
    with user_error(
        "ModuleDict", "looked for .blocks, .layers", "model.backbone.blocks has 3 x Block", "pass model.back"
    ):
        choose_blocks(model, "all")


def test_a_sequential_of_single_layers_is_a_block():
    model = nn.Module()
    block = lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))  # noqa: E731
    model.blocks = nn.Sequential(block(), block())
    assert list(model_blocks(model)) == ["blocks.0", "blocks.1"]
    assert block_width("blocks.0", model.blocks[0]) == 8


def test_a_block_without_a_width_is_refused(user_error):
    with user_error("'blocks.0'", "width", "GELU", "no weights at all"):
        block_width("blocks.0", nn.GELU())
    with user_error(
        "'blocks.0'", "(Sequential)", "holds only Embedding, Conv1d", "nn.Linear, nn.Conv2d or FeedForward"
    ):
        block_width("blocks.0", nn.Sequential(nn.Embedding(3, 4), nn.Conv1d(4, 4, 1)))


def test_the_width_of_a_block_without_mlp(make_vision):
    for path, block in model_blocks(make_vision("vit_parallel")).items():
        assert block_width(path, block) == 24
        assert block(torch.randn(1, 4, 24)).shape == (1, 4, 24)
