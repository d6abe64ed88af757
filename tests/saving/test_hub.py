"""Sharing: a folder that anyone can load, parts alone for one backbone only, a card that tells the results."""

import copy
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from spectralmoe import LinearScorer, Router, Soft, TopK, load, save
from spectralmoe.saving import load_parts, save_parts
from spectralmoe.saving.hub import HubVisionMoE
from spectralmoe.vision import BranchSpec, add_branches, replace_mlp
from spectralmoe.vision.model import VisionMoE

ARGUMENTS = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 4, "num_heads": 2}
META = {
    "data": "digits",
    "router": "linear",
    "results": {"test_accuracy": 91.25, "loads": {"blocks.3.moe_branch.moe": [0.7, 0.3]}},
    "settings": {"optimization": {"epochs": 7}},
}


@pytest.fixture
def dense():
    return VisionMoE("vit_tiny_patch16_224", 5, channels=1, arguments=ARGUMENTS)


@pytest.fixture
def model(dense):
    """The dense model with branches and another head."""
    model = copy.deepcopy(dense)
    model.new_head(3)
    router = lambda dim, experts: Router(LinearScorer(dim, experts), TopK(1))  # noqa: E731
    add_branches(model.backbone, BranchSpec(router=router, experts=2, bottleneck=4, blocks="last1", start="authors"))
    return model.eval()


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_whole_model_round_trip(model, tmp_path):
    hub = HubVisionMoE(model, META)
    hub.save_pretrained(tmp_path)
    again = HubVisionMoE.from_pretrained(tmp_path)
    same(model, again.model)
    same(model, load(tmp_path))
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(again(images), model(images))
    assert again.meta == META
    assert not again.parts_only
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_card_tells_results_and_settings(model, tmp_path):
    HubVisionMoE(model, META).save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "spectralmoe"
    assert "mixture-of-experts" in card.data.tags
    for words in ("91.25", "digits", "0.700 0.300", "optimization.epochs | 7", "from_pretrained"):
        assert words in card.text
    (tmp_path / "README.md").write_text("mine")
    HubVisionMoE(model, META).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_parts_alone_are_small_and_load_onto_their_backbone(model, dense, tmp_path):
    HubVisionMoE(model, META, parts_only=True).save_pretrained(tmp_path / "parts")
    save(model, tmp_path / "whole")
    small = (tmp_path / "parts" / "parts.safetensors").stat().st_size
    assert small < (tmp_path / "whole" / "model.safetensors").stat().st_size / 20
    for backbone in (dense, dense.backbone, dense.backbone.state_dict(), model):
        again = HubVisionMoE.from_pretrained(tmp_path / "parts", backbone=backbone)
        same(model, again.model)
        assert again.parts_only
        assert again.meta == META
    assert "backbone=" in (tmp_path / "parts" / "README.md").read_text()


def test_parts_in_place_of_an_mlp(dense, tmp_path):
    model = copy.deepcopy(dense)
    router = lambda dim, experts: Router(LinearScorer(dim, experts), Soft())  # noqa: E731
    replace_mlp(model.backbone, BranchSpec(router=router, experts=2, blocks="last1"))
    save_parts(model, tmp_path)
    same(model, load_parts(tmp_path, dense))
    save_parts(torch.compile(model, backend="eager"), tmp_path)
    same(model, load_parts(tmp_path, torch.compile(dense, backend="eager")))


def test_a_foreign_backbone_is_refused(model, dense, tmp_path, user_error):
    save_parts(model, tmp_path)
    with torch.no_grad():
        dense.backbone.blocks[0].mlp.fc1.weight[0, 0] += 1e-6
    with user_error("another backbone", "weights differ"):
        load_parts(tmp_path, dense)
    with user_error("another backbone", "another shape"):
        load_parts(tmp_path, VisionMoE("vit_tiny_patch16_224", 5, channels=3, arguments=ARGUMENTS))
    with user_error("another backbone", "it has no 'blocks.3."):
        load_parts(tmp_path, VisionMoE("vit_tiny_patch16_224", 5, channels=1, arguments={**ARGUMENTS, "depth": 3}))
    with user_error("the MoE parts alone", "backbone="):
        HubVisionMoE.from_pretrained(tmp_path)


def test_the_digest_is_of_the_backbone_alone(model, tmp_path):
    def digest(model):
        save_parts(model, tmp_path)
        return json.loads((tmp_path / "config.json").read_text())["backbone_sha256"]

    changed, before = copy.deepcopy(model), digest(model)
    with torch.no_grad():
        changed.backbone.head.weight.add_(1)
        changed.backbone.blocks[3].moe_branch.alpha.add_(1)
    assert digest(changed) == before
    with torch.no_grad():
        changed.backbone.pos_embed.add_(1)
    assert digest(changed) != before


def test_changed_files_are_refused(model, dense, tmp_path, user_error):
    save_parts(model, tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "parts.safetensors")
    with user_error("is not the file that config.json describes"):
        load_parts(tmp_path, dense)
    save_parts(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"model": {"type": "os:system"}}, {"model": {"type": "vision_moe"}}, {"spectralmoe_parts": 9}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with user_error():
            load_parts(tmp_path, dense)
    with user_error("no such file"):
        load_parts(tmp_path / "nothing", dense)


def test_another_programs_folder_is_left_alone(model, tmp_path, user_error):
    (tmp_path / "config.json").write_text('{"architectures": ["Bert"]}')
    for parts_only in (False, True):
        with user_error("belongs to another program"):
            HubVisionMoE(model, parts_only=parts_only).save_pretrained(tmp_path)
    assert "Bert" in (tmp_path / "config.json").read_text()


def test_saving_whole_after_parts_leaves_one_kind(model, dense, tmp_path):
    HubVisionMoE(model, parts_only=True).save_pretrained(tmp_path)
    HubVisionMoE(model).save_pretrained(tmp_path)
    same(HubVisionMoE.from_pretrained(tmp_path).model, model)
    HubVisionMoE(model, parts_only=True).save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    same(HubVisionMoE.from_pretrained(tmp_path, backbone=dense).model, model)


def test_a_save_that_fails_leaves_what_the_folder_held(model, dense, tmp_path, monkeypatch, user_error):
    """Also where the two are of different kinds: what config.json says decides."""
    HubVisionMoE(model, META, parts_only=True).save_pretrained(tmp_path)
    other = copy.deepcopy(model)
    torch.nn.init.ones_(other.backbone.head.weight)
    replace = Path.replace

    def full(path, target):
        if target.name == "config.json":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    for parts_only in (True, False):
        with user_error("No space left on device"):
            HubVisionMoE(other, parts_only=parts_only).save_pretrained(tmp_path)
        same(HubVisionMoE.from_pretrained(tmp_path, backbone=dense).model, model)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "parts.safetensors"]
    monkeypatch.undo()
    parts = (tmp_path / "parts.safetensors").read_bytes()
    HubVisionMoE(other).save_pretrained(tmp_path)
    (tmp_path / "parts.safetensors").write_bytes(parts)  # left by a save that was killed at its very end
    same(HubVisionMoE.from_pretrained(tmp_path).model, other)


def test_push_after_saving(model, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        HubVisionMoE, "push_to_hub", lambda self, name, **options: calls.append((name, options)) or "url"
    )
    assert HubVisionMoE(model).save_pretrained(tmp_path / "mine", push_to_hub=True, private=True) == "url"
    assert calls == [("mine", {"model_card_kwargs": None, "private": True})]
    assert (tmp_path / "mine" / "README.md").exists()


def test_push_uploads_what_save_writes(model, tmp_path, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id, folder_path, **options):
            sent[repo_id] = {path.name: path.read_bytes() for path in folder_path.iterdir()}
            return "https://somewhere/commit"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    assert HubVisionMoE(model, META).push_to_hub("me/model") == "https://somewhere/commit"
    assert sent["me/model"].keys() == {"README.md", "config.json", "model.safetensors"}
    for name, content in sent["me/model"].items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    from spectralmoe.saving import hub

    hub._hub_class.cache_clear()
    same(hub.HubVisionMoE.from_pretrained("me/model").model, model)
    hub._hub_class.cache_clear()


def test_a_name_that_cannot_be_fetched_is_one_line(monkeypatch, user_error):
    from spectralmoe.saving import hub

    def offline(*args, **options):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    hub._hub_class.cache_clear()
    with user_error("nobody/nothing is no folder here", "no network"):
        hub.HubVisionMoE.from_pretrained("nobody/nothing")
    hub._hub_class.cache_clear()
