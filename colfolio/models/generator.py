"""The generator: towers and a language-model head; packed conversations in, logits out.

Letters: A places of a batch at which a token is predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from tokenizers import Tokenizer
from torch import Tensor, nn

from colfolio.batch import Packed
from colfolio.data.chat import ChatCollator
from colfolio.errors import ColfolioError
from colfolio.models.border import Border, BorderOutput
from colfolio.models.chat_contract import ChatContract
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.contract import hash_weights
from colfolio.models.document_inputs import DocumentLike, DocumentReader, listed_documents
from colfolio.models.encoding import evaluating
from colfolio.models.generator_files import read_generator, save_generator
from colfolio.models.hub import locate
from colfolio.models.lora.layers import base_weights
from colfolio.models.lora.placing import adapter_digest, lora_layers, named_modules
from colfolio.models.projected import ProjectedBackbone, usable_device

# Below the text tower: what the vision tower made of an image need not be made again.
_VISION_DONE = Border("text", 0)


class Generator(ProjectedBackbone):
    """A vision-language backbone, a language-model head, and the contract of how they are used.

    Args:
        backbone: a `PreTrainedModel` of `families.py`, with `visual` and `language_model`.
        head: linear, from the hidden size to the vocabulary; or a `TiedHead`.
        tokenizer: of the backbone.
        contract: templates and pixel budget.
    """

    contract: ChatContract

    def __init__(
        self, backbone: Any, head: nn.Module, tokenizer: Tokenizer, contract: ChatContract
    ) -> None:
        chat = ChatCollator(
            tokenizer, contract.templates, contract.pixel_budget, contract.position_scheme
        )
        super().__init__(backbone, head, chat.collator)
        self.chat = chat
        self.tokenizer = tokenizer
        self.contract = contract

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Generator:
        """Load a folder or hub id of a family's model with its head, ready to generate.

        Args:
            revision: of a hub id.
            device: None takes a GPU if there is one.
            dtype: of the weights; None keeps that of the file.

        Raises:
            CheckpointError: a file, tensor or token is missing, unexpected or damaged, or it is a
                retriever.
            ColfolioError: the device cannot be used.
        """
        place = usable_device(device)
        generator = cls(*read_generator(locate(path_or_id, revision)))
        if dtype is not None:
            cast_parameters(generator, dtype)
        return generator.to(place).eval()

    def save_pretrained(
        self, folder: str | Path, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write what `transformers` loads, and the contract; aside first, then renamed.

        Args:
            weights: those of `weights()`, put together by the caller if they are spread over ranks.

        Raises:
            ColfolioError: there is an adapter, which would be lost.
        """
        if weights is None and any(lora_layers(named_modules(self.backbone, self.projection))):
            raise ColfolioError(
                "the generator has an adapter, which its weights alone do not hold: merge it first"
            )
        named = self.weights() if weights is None else weights
        save_generator(Path(folder), named, self.backbone.config, self.tokenizer, self.contract)

    def weights(self) -> dict[str, Tensor]:
        """All tensors: `language_model.*`, `visual.*`, and `lm_head.weight` if it is no embedding.

        With an adapter those of its base, except that merged layers have merged weights.
        """
        named = dict(self.backbone.state_dict())
        named |= {f"lm_head.{name}": t for name, t in self.projection.state_dict().items()}
        return base_weights(named)

    @property
    def vocabulary(self) -> int:
        """Tokens among which each next one is predicted."""
        return self.backbone.config.get_text_config().vocab_size

    def fingerprint(self) -> str:
        """SHA-256 of all that decides an answer: weights as they are now, and what is promised."""
        adapter = adapter_digest(named_modules(self.backbone, self.projection))
        both = hash_weights(self.weights()) + adapter + self.contract.deciding()
        return hashlib.sha256(both.encode()).hexdigest()

    def forward(
        self, packed: Packed, places: Int64[Tensor, " A"], below: BorderOutput | None = None
    ) -> Float[Tensor, "A vocabulary"]:
        """Logits of the token that follows each of some places, float32 at least.

        Args:
            places: numbers of tokens in the batch; logits of others are not made.
            below: what `run_below` made of the same batch; only what lies above its border runs.
        """
        hidden = self._hidden(packed, below)[places]
        logits = self.projection(hidden.to(self.projection.weight.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def generate(self, document: DocumentLike, question: str, max_new_tokens: int = 64) -> str:
        """The likeliest answer token by token, up to its end; one row, run anew for each token.

        Args:
            document: as one of `Retriever.encode_documents`.

        Raises:
            TypeError, DocumentError: it is no document, or cannot be read.
        """
        with DocumentReader(
            listed_documents([document]), self.collator, self.contract.frame_rate
        ) as reader:
            reader.num_tokens()
            visuals = reader.read([0])
        made: list[int] = []
        with evaluating(self):
            prompt = self.chat.prompts(visuals, [question]).to(self.device)
            below = self.run_below(prompt, _VISION_DONE)
            while len(made) < max_new_tokens:
                packed = self.chat.prompts(visuals, [question], [made]).to(self.device)
                last = torch.tensor([len(packed.token_ids) - 1], device=self.device)
                made.append(int(self(packed, last, below).argmax()))
                if made[-1] == self.chat.end_token_id:
                    break
        return self.tokenizer.decode(made, skip_special_tokens=True).strip()
