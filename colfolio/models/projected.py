"""A vision-language backbone with a linear map above it, run packed: what both objectives train.

Letters: N tokens of all rows, P patches, V visual tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from colfolio.attention import set_attention
from colfolio.batch import Packed
from colfolio.data.collate import Collator
from colfolio.errors import ColfolioError
from colfolio.models.border import Border, BorderOutput
from colfolio.models.linear import linear, speed_up_linears
from colfolio.models.towers import Deepstack, Stretch, entrances, exits, run_text, run_vision


class ProjectedBackbone(nn.Module):
    """Both towers of a backbone and a projection, of which a subclass says what it is for.

    Args:
        backbone: a `PreTrainedModel` of `families.py`, with `visual` and `language_model`.
        projection: linear, from the hidden size; with an adapter, the layer that holds both.
        collator: makes the rows that the towers read.

    Attributes:
        tokenizer, contract: a subclass sets them.
    """

    tokenizer: Tokenizer
    contract: Any

    def __init__(self, backbone: Any, projection: nn.Module, collator: Collator) -> None:
        super().__init__()
        set_attention(backbone)
        if not isinstance(backbone.visual.patch_embed, LinearPatchEmbed):
            backbone.visual.patch_embed = LinearPatchEmbed(backbone.visual.patch_embed.proj)
        speed_up_linears(backbone)
        # Any: which attributes a family's model has is known to `transformers` only at run time
        self.backbone: Any = backbone
        self.projection: Any = projection
        self.collator = collator

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projection.weight.device

    def units(self) -> list[nn.Module]:
        """The modules that hold all parameters, each run by a call; of these a model is sharded."""
        visual, text = self.backbone.visual, self.backbone.language_model
        vision = [*entrances(visual), *visual.blocks, *exits(visual)]
        return [*vision, text.embed_tokens, *text.layers, text.norm, self.projection]

    @torch.no_grad()
    def run_below(self, packed: Packed, border: Border) -> BorderOutput:
        """What the layers below a border make of a batch; see `frozen_border`."""
        visual, text = self.backbone.visual, self.backbone.language_model
        if border.tower == "vision":
            stretch = Stretch(end=border.layers)
            return BorderOutput(
                border, run_vision(visual, packed.patches, packed, self._merge, stretch)
            )
        if not border.layers:
            return BorderOutput(border, run_vision(visual, packed.patches, packed, self._merge))
        states, deepstack = self._embeddings(packed, None)
        stretch = Stretch(end=border.layers)
        return BorderOutput(border, run_text(text, states, packed, stretch, deepstack))

    def _hidden(self, packed: Packed, below: BorderOutput | None) -> Float[Tensor, "N H"]:
        """What the text tower makes of each token."""
        layers = below.border.layers if below and below.border.tower == "text" else 0
        deepstack = None
        if below and layers:
            states = below.states
        else:
            states, deepstack = self._embeddings(packed, below)
        text = self.backbone.language_model
        return run_text(text, states, packed, Stretch(layers), deepstack)

    def _embeddings(
        self, packed: Packed, below: BorderOutput | None
    ) -> tuple[Float[Tensor, "N H"], Deepstack | None]:
        """What the text tower reads: embedded tokens, and visual features in their places."""
        embeddings = self.backbone.language_model.embed_tokens(packed.token_ids)  # [N, H]
        if not len(packed.grid_thw):
            return embeddings, None
        prompter = self.collator.prompter
        visual = packed.token_ids == prompter.image_token_id
        if prompter.video_token_id is not None:
            visual = visual | (packed.token_ids == prompter.video_token_id)
        made = self._visual_features(packed, below).to(embeddings.dtype)
        features, *more = made.split(embeddings.shape[1], dim=1)  # [V, H] each
        states = embeddings.masked_scatter(visual.unsqueeze(1), features)
        return states, Deepstack(visual, tuple(more)) if more else None

    def _visual_features(
        self, packed: Packed, below: BorderOutput | None
    ) -> Float[Tensor, "V width"]:
        """Of each visual token, and beside them those of deepstack."""
        if below is None:
            return run_vision(self.backbone.visual, packed.patches, packed, self._merge)
        if below.border.tower == "text":
            return below.states
        stretch = Stretch(below.border.layers)
        return run_vision(self.backbone.visual, below.states, packed, self._merge, stretch)

    @property
    def _merge(self) -> int:
        return self.collator.budget.merge


class LinearPatchEmbed(nn.Module):
    """The patch embedding as one linear map over the weights of its convolution.

    The stride equals the kernel, so both compute the same; the product is faster on a CPU.
    """

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: Float[Tensor, "P patch_dim"]) -> Float[Tensor, "P width"]:
        """Embed flat patches."""
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device that is meant; None is a GPU if there is one.

    Raises:
        ColfolioError: it cannot be used.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ColfolioError(f"device {str(device)!r} cannot be used: {reason}") from None
