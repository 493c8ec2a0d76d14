"""Networks of transformers, from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo.entry import Entry, Inputs, keywords, noise, tokens
from bench.zoo.packages import package

VOCABULARY, LENGTH = 1000, 24
LABELS = 100


def _images(architecture: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = package("transformers")
        config = getattr(transformers, f"{architecture}Config")(num_labels=LABELS, **options)
        model: nn.Module = getattr(transformers, f"{architecture}ForImageClassification")(config)
        return model

    return make


def _bert() -> nn.Module:
    transformers = package("transformers")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        num_labels=5,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def _llama() -> nn.Module:
    transformers = package("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def attention_mask(length: int) -> Inputs:
    """Ones, and zeros at the end of a text that is shorter than the others."""

    def make(batch: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
        return (torch.arange(length) < lengths).long()

    return make


def _entry(
    name: str, make: Callable[[], nn.Module], size: int, other: int | None, convolutional: bool
) -> Entry:
    return Entry(
        f"transformers/{name}",
        "transformers",
        make,
        keywords(pixel_values=noise(3, size, size)),
        None if other is None else keywords(pixel_values=noise(3, other, other)),
        convolutional,
    )


ENTRIES = (
    _entry(
        "resnet",
        _images(
            "ResNet",
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
        ),
        64,
        96,
        True,
    ),
    _entry(
        "regnet",
        _images("RegNet", hidden_sizes=[24, 56, 152, 368], depths=[1, 1, 4, 7], groups_width=8),
        64,
        96,
        True,
    ),
    _entry("mobilenet_v2", _images("MobileNetV2"), 64, 96, True),
    _entry(
        "efficientnet",
        # Of the default range, 0.02, a depthwise convolution's results have a variance far below
        # the 0.001 that batch norms add, and die out from block to block.
        _images(
            "EfficientNet",
            width_coefficient=1.0,
            depth_coefficient=1.0,
            hidden_dim=1280,
            initializer_range=0.2,
        ),
        64,
        96,
        True,
    ),
    _entry(
        "convnext",
        _images("ConvNext", hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2]),
        64,
        96,
        True,
    ),
    _entry(
        "vit",
        _images(
            "ViT",
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=96,
        ),
        96,
        None,
        False,
    ),
    Entry(
        "transformers/bert",
        "transformers",
        _bert,
        keywords(input_ids=tokens(VOCABULARY, LENGTH), attention_mask=attention_mask(LENGTH)),
        keywords(input_ids=tokens(VOCABULARY, 40), attention_mask=attention_mask(40)),
        convolutional=False,
    ),
    Entry(
        "transformers/llama",
        "transformers",
        _llama,
        keywords(input_ids=tokens(VOCABULARY, LENGTH)),
        keywords(input_ids=tokens(VOCABULARY, 40)),
        convolutional=False,
    ),
)
