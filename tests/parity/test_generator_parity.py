"""Against transformers: our understanding path on Qwen2's weights is Qwen2, on Qwen3's it is Qwen3."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from base.config import UserError
from data.packs.packed_batch import ImageSplit, TextSplit, build_packed_batch
from data.shards import LatentInfo
from generator.attention import planned_attention
from generator.config import GeneratorConfig, MotConfig
from generator.model import Generator
from generator.mot import Mot
from generator.qwen import QWEN2_5_0_5B, load_qwen, qwen_shape

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "rms_norm_eps": 1e-6,
}
OURS = MotConfig(
    vocab_size=64,
    width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    mlp_width=80,
    rope_theta=1e6,
    qk_norm=False,
)
LATENTS = LatentInfo("fp32", (4, 2, 2), (0.0,) * 4, (1.0,) * 4, "autoencoder", "text")


@pytest.fixture(scope="module", params=["tied", "untied in several files"])
def checkpoint(request, tmp_path_factory):
    """A tiny Qwen2 with random weights, every bias and norm included, and its folder."""
    theirs = Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, rope_theta=1e6, tie_word_embeddings=request.param == "tied")
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    folder = tmp_path_factory.mktemp("qwen")
    theirs.save_pretrained(folder, max_shard_size="5GB" if request.param == "tied" else "60KB")
    return theirs, folder


def text_pack(ids: Tensor):
    noise = ImageSplit(torch.zeros(LATENTS.shape), noisy=True)
    return build_packed_batch(
        [[TextSplit(ids.tolist()), noise]],
        vision_start_id=1,
        vision_end_id=2,
        max_side=2,
        seed=0,
        sample_ids=["a"],
    )


def assert_equal_hidden_states(ours: Mot, theirs: nn.Module) -> None:
    ids = torch.randint(64, (23,), generator=torch.Generator().manual_seed(1))
    batch = text_pack(ids)  # the image after the text is seen by no text token
    latents = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.model(ids[None]).last_hidden_state[0]
        attention = planned_attention(batch.attention, "sdpa")
        found, _ = ours(
            ours.embed_tokens(batch.text_ids), latents, batch.rope_positions, attention, text_output=True
        )
    assert found is not None
    torch.testing.assert_close(found[:23], expected, rtol=0, atol=1e-5)  # fp32 sums in another order


def test_the_understanding_path_is_qwen2(checkpoint) -> None:
    theirs, folder = checkpoint
    ours = Mot(OURS)
    load_qwen(ours, str(folder))
    assert_equal_hidden_states(ours, theirs)


def test_the_understanding_path_is_qwen3(tmp_path) -> None:
    theirs = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, rope_theta=1e6)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():  # QK-norms included
        parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
    theirs.save_pretrained(tmp_path)
    shape = qwen_shape(tmp_path / "config.json")
    assert (shape.head_dim, shape.qkv_bias, shape.qk_norm) == (16, False, True)
    ours = Mot(shape)
    load_qwen(ours, str(tmp_path))
    assert_equal_hidden_states(ours, theirs)


def test_both_experts_start_as_qwen2_and_qk_norm_at_one(checkpoint) -> None:
    theirs, folder = checkpoint
    config = GeneratorConfig(qwen_shape(folder / "config.json"), max_side=2, init=f"qwen:{folder}")
    model = Generator.create(config, LATENTS, seed=0)
    state = theirs.state_dict()
    for layer in range(3):
        experts = model.backbone.layers[layer].understanding, model.backbone.layers[layer].generation
        for expert in experts:
            assert torch.equal(expert.k_proj.bias, state[f"model.layers.{layer}.self_attn.k_proj.bias"])
            assert torch.equal(expert.mlp.up_proj.weight, state[f"model.layers.{layer}.mlp.up_proj.weight"])
            assert (expert.q_norm.weight == 1).all() and (expert.k_norm.weight == 1).all()
    assert torch.equal(model.backbone.generation_norm.weight, state["model.norm.weight"])
    assert not model.latent_out.weight.any()


def test_the_lm_head_is_the_checkpoints(checkpoint) -> None:
    theirs, folder = checkpoint
    tied = theirs.config.tie_word_embeddings
    start = {"max_side": 2, "init": f"qwen:{folder}", "text_output": True}
    shape = dataclasses.replace(qwen_shape(folder / "config.json"), qk_norm=False)
    with pytest.raises(UserError, match=f"set generator.tied_text_output: {str(tied).lower()}"):
        Generator.create(GeneratorConfig(shape, tied_text_output=not tied, **start), LATENTS, seed=0)
    model = Generator.create(GeneratorConfig(shape, tied_text_output=tied, **start), LATENTS, seed=0)
    ids = torch.randint(64, (23,), generator=torch.Generator().manual_seed(1))
    batch = dataclasses.replace(text_pack(ids), text_loss_rows=torch.arange(22), text_loss_ids=ids[1:])
    with torch.no_grad():
        # 1e-5: fp32 sums in another order; theirs is a mean
        expected = theirs(ids[None], labels=ids[None]).loss
        _, found = model.forward_with_text(batch, torch.zeros(4, 4), torch.tensor([0.5]))
    torch.testing.assert_close(found / 22, expected, rtol=1e-5, atol=0)


def test_an_lm_head_of_its_own_goes_with_the_text_loss(tmp_path) -> None:
    config = GeneratorConfig(OURS, max_side=2, text_output=True, tied_text_output=False)
    model = Generator.create(config, LATENTS, seed=0)
    model.save(tmp_path)
    assert torch.equal(Generator.load(tmp_path).lm_head.weight, model.lm_head.weight)
    model.set_text_output(False)
    assert "lm_head.weight" not in model.state_dict()
    with pytest.raises(UserError, match="no LM head of their own"):
        model.set_text_output(True)


def test_rope_theta_is_read_in_the_layouts_of_transformers_4_and_5(checkpoint, tmp_path) -> None:
    _, folder = checkpoint
    saved = json.loads((folder / "config.json").read_text())
    saved.pop("rope_parameters", None)
    saved.pop("rope_theta", None)
    for layout in ({"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}):
        (tmp_path / "config.json").write_text(json.dumps(saved | layout))
        assert qwen_shape(tmp_path / "config.json").rope_theta == 1e6


def test_checkpoints_that_do_not_fit_are_refused_in_one_line(checkpoint, tmp_path) -> None:
    _, folder = checkpoint
    with pytest.raises(UserError, match="num_layers is 3, the config says 24"):
        load_qwen(Mot(MotConfig(**{**vars(OURS), "num_layers": 24})), str(folder))
    saved = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"model_type": "llama"}, "'llama'"),
        ({"use_sliding_window": True}, "window True"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(saved | change))
        with pytest.raises(UserError, match=words):
            load_qwen(Mot(OURS), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="no such weights file"):
        load_qwen(Mot(OURS), str(tmp_path))


def test_the_papers_backbone_has_the_papers_size() -> None:
    with torch.device("meta"):
        latents = LatentInfo("bf16", (64, 16, 16), (0.0,) * 64, (1.0,) * 64, "a", "t")
        model = Generator(GeneratorConfig(QWEN2_5_0_5B, max_side=64), latents)
    experts = sum(p.numel() for p in model.backbone.parameters())
    # Qwen2.5-0.5B has 494,032,768 parameters (136,134,656 of them the embedding, which is shared);
    # QK-norm adds 2 x 64 per layer and expert
    assert experts == 136_134_656 + 2 * (494_032_768 - 136_134_656) + 2 * 24 * 128
