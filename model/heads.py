"""A scalar per token on top of the decoder: reward models (the score of the last token) and critics (every token).

`LlamaForSequenceClassification` in transformers is the same thing, and folders are read and written in its layout.
"""

import torch
from torch import Tensor, nn

from tritium.model.transformer import Transformer, parameter
from tritium.parallel.context import Split, gather_results
from tritium.parallel.tensor import part_of_gradient


class ScalarModel(nn.Module):
    """v_t = hidden_t · score. `backbone` keeps no language-model head."""

    def __init__(self, backbone: Transformer):
        super().__init__()
        backbone.head = None
        self.backbone = backbone
        with torch.device(backbone.mesh.device):
            self.score = parameter(1, backbone.config.hidden_size)
        self.score.data = self.score.data.to(backbone.dtype).zero_()

    @property
    def config(self):
        return self.backbone.config

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def mesh(self):
        return self.backbone.mesh

    def values(self, tokens: Tensor, cu_seqlens: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """[T] fp32 (fp64 for an fp64 model), on every rank; see Transformer.hidden for the arguments."""
        hidden = self.backbone.hidden(tokens, cu_seqlens, positions=positions)  # [T, E], or this rank's
        wide = torch.promote_types(hidden.dtype, torch.float32)
        values = (hidden.to(wide) * self.score[0].to(wide)).sum(-1)
        values = part_of_gradient(values, self.mesh.tp_group)  # these ranks all compute the same
        return gather_results(values, Split.of(len(tokens), self.mesh))

    def scores(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The value at the last token of each document, [S]; documents must not be empty.

        It depends on the document alone: not on padding (there is none), nor on its neighbours in the stream.
        """
        return self.values(tokens, cu_seqlens, positions)[cu_seqlens[1:].long() - 1]

    @torch.no_grad()
    def initialize(self, seed: int) -> "ScalarModel":
        """Draw the head from N(0, 1/(E+1)) (Stiennon et al., arXiv 2009.01325, appendix B). In place; returns self."""
        width = self.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self.score.copy_(torch.empty(1, width).normal_(0.0, (width + 1) ** -0.5, generator=generator))
        return self

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder; see model/hf.py."""
        from tritium.model.hf import save

        save(self, folder)
