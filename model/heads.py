"""A scalar per token on top of the decoder: reward models (the score of the last token, or of their mean) and critics
(every token). A reward model may have several heads, a quality each.

`LlamaForSequenceClassification` in transformers is the same thing, and folders are read and written in its layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritium.kernels import segment_sum
from tritium.model.transformer import Transformer, parameter
from tritium.parallel.context import Split, gather_results
from tritium.parallel.tensor import part_of_gradient


def head_names(raw: dict) -> tuple[str, ...]:
    return tuple((raw.get("id2label") or {"0": "reward"}).values())


class ScalarModel(nn.Module):
    """v_t = hidden_t · score. `backbone` keeps no language-model head. `heads` names the scalars, K of them; `pooling`
    is "last" or "mean": which tokens' values are the score of a document."""

    def __init__(self, backbone: Transformer, heads: Sequence[str] = ("reward",), pooling: str = "last"):
        super().__init__()
        backbone.head = None
        self.backbone, self.heads, self.pooling = backbone, tuple(heads), pooling
        with torch.device(backbone.mesh.device):
            self.score = parameter(len(self.heads), backbone.config.hidden_size)
        self.score.data = self.score.data.to(backbone.dtype).zero_()

    @classmethod
    def described(cls, backbone: Transformer, raw: dict) -> "ScalarModel":
        """With the heads that the keys of a config.json name; the inverse of `description`."""
        return cls(backbone, head_names(raw), raw.get("pooling", "last"))

    def description(self) -> dict:
        labels = {"id2label": {str(i): name for i, name in enumerate(self.heads)}}
        labels |= {"label2id": {name: i for i, name in enumerate(self.heads)}}
        return {"num_labels": len(self.heads)} | labels | ({"pooling": "mean"} if self.pooling == "mean" else {})

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
        """[T] fp32 (fp64 for an fp64 model), with several heads [T, K]; on every rank. See Transformer.hidden."""
        hidden = self.backbone.hidden(tokens, cu_seqlens, positions=positions)  # [T, E], or this rank's
        wide = torch.promote_types(hidden.dtype, torch.float32)
        values = torch.stack([(hidden.to(wide) * row).sum(-1) for row in self.score.to(wide)], -1)  # [T, K]
        values = values.squeeze(-1)
        values = part_of_gradient(values, self.mesh.tp_group)  # these ranks all compute the same
        return gather_results(values, Split.of(len(tokens), self.mesh))

    def scores(self, tokens: Tensor, cu_seqlens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The value at the last token of each document, or the mean, [S] or [S, K]; documents must not be empty.

        It depends on the document alone: not on padding (there is none), nor on its neighbours in the stream.
        """
        values = self.values(tokens, cu_seqlens, positions)
        if self.pooling == "last":
            return values[cu_seqlens[1:].long() - 1]
        sums = torch.stack([segment_sum(v, cu_seqlens) for v in values.view(len(values), -1).unbind(-1)], -1)  # [S, K]
        return (sums / cu_seqlens.diff().clamp(min=1)[:, None]).squeeze(-1)

    @torch.no_grad()
    def initialize(self, seed: int) -> "ScalarModel":
        """Draw the head from N(0, 1/(E+1)) (Stiennon et al., arXiv 2009.01325, appendix B). In place; returns self."""
        width = self.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self.score.copy_(torch.empty(len(self.heads), width).normal_(0.0, (width + 1) ** -0.5, generator=generator))
        return self

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder; see model/hf.py."""
        from tritium.model.hf import save

        save(self, folder)
