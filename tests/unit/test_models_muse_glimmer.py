"""TorchTitan's Muse Glimmer, which is not served: outside of the engine its text forward has transformers' numbers."""

from __future__ import annotations

import pytest
import torch
from spmd_types import SpmdTypeError
from torchtitan.distributed import utils
from torchtitan.models.muse_glimmer import MuseGlimmerStateDictAdapter, model_registry
from transformers import MuseGlimmerTextConfig, MuseGlimmerTextModel

from titan_bridge.models.attention import PlainAttention
from titan_bridge.models.build import build_on_meta, materialize

LENGTH = 200  # more than its window
PREFIX = "model.language_model."


def test_the_forward_has_the_numbers_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_registry("debugmodel").model
    for layer in config.layers:
        layer.attention.inner_attention = PlainAttention.Config(window=layer.attention.window_size)
    model = materialize(build_on_meta(config, dtype=torch.float32), "cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.empty(parameter.shape).normal_(std=0.15, generator=generator))
    with pytest.raises(SpmdTypeError, match="Cannot resolve axis name 'dp'"):  # why it is not served
        model(torch.zeros(1, 1, dtype=torch.int64))
    monkeypatch.setattr(utils, "_spmd_backend", "partial_dtensor", raising=True)
    state = MuseGlimmerStateDictAdapter(config, None).to_hf(model.state_dict())

    attention = config.layers[0].attention
    theirs = MuseGlimmerTextModel(
        MuseGlimmerTextConfig(
            vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=len(config.layers),
            intermediate_size=config.layers[0].feed_forward.w1.out_features, head_dim=attention.head_dim,
            num_attention_heads=attention.n_heads, num_key_value_heads=attention.n_kv_heads,
            sliding_window=attention.window_size, pad_token_id=None, bos_token_id=None, eos_token_id=None,
            qk_scale_factor=attention.scale_query_by, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            max_position_embeddings=config.max_seq_len,
        )
    ).eval()  # fmt: skip
    head = state.pop("lm_head.weight")
    theirs.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in state.items()}, strict=True)
    ids = torch.randint(config.vocab_size, (1, LENGTH), generator=generator)
    with torch.no_grad():
        ours = model(ids)[0].log_softmax(-1)
        hidden = theirs(ids).last_hidden_state[0]
    cap = config.lm_head.output_soft_cap_temp
    expected = (cap * torch.tanh(hidden @ head.T * config.lm_head.output_multiplier / cap)).log_softmax(-1)
    difference = (ours - expected).abs().max().item()
    print(f"max |difference| of log-probabilities: {difference:.1e}")
    assert expected.std() > 0.3
    assert difference < 1e-4
