"""A text decoder with M-RoPE grafted onto it, and the vision tower of Qwen2-VL, as one backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from colfolio.mrope import graft, scheme_of, ungraft

# Decoders that a test has seen give packed what they give row by row. What others do beside the
# attention function, such as a cap on its logits, would be lost without a word.
DECODERS = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
_Settings = Mapping[str, Any] | PretrainedConfig | None
_BATCH_DEPENDENT = ("dynamic", "longrope")


class GraftedConfig(PretrainedConfig):
    """Both towers, the ids of visual tokens, and how the decoder turns by three positions.

    Args:
        text_config: of the decoder, with its `model_type`, one of `DECODERS`.
        vision_config: of a tower of Qwen2-VL; its `hidden_size` is the decoder's.
        scheme: a name in `colfolio.mrope.SCHEMES`, or name and settings as `described` gives them.
        mrope_section: frequencies of time, height and width; None takes the scheme's share.
    """

    model_type = "colfolio_grafted"
    # a plain attribute in older transformers, a property of the class in newer
    sub_configs = {  # pyright: ignore  # noqa: RUF012
        "text_config": AutoConfig,
        "vision_config": Qwen2VLVisionConfig,
    }

    def __init__(
        self,
        text_config: _Settings = None,
        vision_config: _Settings = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        vision_start_token_id: int | None = None,
        vision_end_token_id: int | None = None,
        scheme: str | Mapping[str, Any] = "qwen2_vl",
        mrope_section: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _text_config(text_config)
        self.vision_config = _vision_config(vision_config)
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        scheme_of(scheme)
        self.scheme = scheme if isinstance(scheme, str) else dict(scheme)
        self.mrope_section = None if mrope_section is None else list(mrope_section)
        super().__init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """All values: there is no configuration by default that these could differ from."""
        return self.to_dict()


class GraftedModel(PreTrainedModel):
    """Vision tower and grafted decoder, to be run by `Retriever`.

    Raises:
        ValueError: the decoder cannot be grafted or run packed, or the towers do not fit together.
    """

    config_class = GraftedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: GraftedConfig) -> None:
        super().__init__(config)
        _check_widths(config)
        self.visual = Qwen2VisionTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = AutoModel.from_config(config.text_config)
        _graft(self.language_model, config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the library's, which leaves the buffers of a graft without values: made again here."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        ungraft(model.language_model)
        _graft(model.language_model, model.config)
        return loaded


def _graft(decoder: Any, config: GraftedConfig) -> None:
    """Graft a decoder that may be on the meta device, where its rotary embedding says nothing.

    No checkpoint holds the buffers of the rotation, so they are made with values at once.
    """
    with torch.device("cpu"):
        if any(buffer.is_meta for buffer in decoder.rotary_emb.buffers()):
            decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)
        graft(decoder, scheme_of(config.scheme), config.mrope_section)
    config.mrope_section = list(decoder.rotary_emb.sections)


def _text_config(given: _Settings) -> PretrainedConfig:
    """The configuration of a decoder that can be grafted and run packed."""
    values = _values(given)
    model_type = values.pop("model_type", None)
    if model_type not in DECODERS:
        raise ValueError(
            f"text_config: model_type {model_type!r} cannot be grafted here; what can is "
            f"{', '.join(DECODERS)}"
        )
    config = AutoConfig.for_model(model_type, **values)
    _check_layers(config)
    return config


def _vision_config(given: _Settings) -> Qwen2VLVisionConfig:
    """The configuration of a Qwen2-VL's tower; old checkpoints give it the whole model's type."""
    values = _values(given)
    model_type = values.pop("model_type", "qwen2_vl_vision" if values else None)
    if model_type not in ("qwen2_vl_vision", "qwen2_vl"):
        raise ValueError(
            "vision_config: must be that of a tower of Qwen2-VL, qwen2_vl_vision, received "
            f"model_type {model_type!r}"
        )
    return Qwen2VLVisionConfig(**values)


def _values(given: _Settings) -> dict[str, Any]:
    """A copy, because a graft writes into the configuration of its decoder."""
    return given.to_dict() if isinstance(given, PretrainedConfig) else dict(given or {})


def _check_layers(config: Any) -> None:
    """Refuse what packed attention does not do, or what makes a row depend on its batch."""
    window = getattr(config, "sliding_window", None)
    whole = "full_attention" if window is None else "sliding_attention"
    # where a decoder has no kinds of layers, as Mistral, a window is that of all
    kinds = set(getattr(config, "layer_types", None) or [whole])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"text_config: a {config.model_type} with layers of {', '.join(sorted(kinds))} (window "
            f"{window}) cannot be run packed; where no page is longer than the window, set "
            "sliding_window to null and leave layer_types out"
        )
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in _BATCH_DEPENDENT:
        raise ValueError(
            f"text_config: rope_type {rope!r} turns every row by the longest of its batch, so "
            "vectors would change with the batch; use default, linear, yarn or llama3"
        )


def _check_widths(config: GraftedConfig) -> None:
    vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
    if vision != text:
        raise ValueError(
            f"vision_config.hidden_size is {vision}, but the decoder reads vectors of {text}: the "
            "tower's merger must end in the decoder's width"
        )
