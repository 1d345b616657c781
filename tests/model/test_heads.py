"""Scores of documents: from their own last token, whoever their neighbours are."""

import pytest
import torch

from tritium.model.config import ModelConfig
from tritium.model.heads import ScalarModel
from tritium.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick")
SHAPE = ModelConfig(48, 16, 24, 2, 2, 1, 8, max_positions=40, init_std=0.3)


def scorer(dtype=torch.float64) -> ScalarModel:
    return ScalarModel(Transformer(SHAPE, dtype=dtype).initialize(0)).initialize(1)


def stream(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 48, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return tokens, torch.tensor([0, *lengths]).cumsum(0).int()


def test_a_score_is_the_value_of_the_last_token_and_depends_on_the_document_alone():
    model, (tokens, cu) = scorer(), stream(5, 1, 9)
    scores = model.scores(tokens, cu)
    for i, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        alone = model.values(tokens[start:end])
        hidden = model.backbone.hidden(tokens[start:end])
        torch.testing.assert_close(alone, hidden @ model.score[0])
        torch.testing.assert_close(scores[i], alone[-1], rtol=0, atol=1e-12)
    filled = torch.cat([tokens, torch.zeros(3, dtype=torch.long)])
    torch.testing.assert_close(model.scores(filled, torch.cat([cu, cu[-1:] + 3]))[:3], scores, rtol=0, atol=1e-12)


def test_a_new_head_scores_nothing_until_it_is_drawn():
    model = ScalarModel(Transformer(SHAPE).initialize(0))
    assert (model.scores(*stream(5, 4)) == 0).all()
    assert model.backbone.head is None
    model.initialize(1)
    assert model.score.std().item() == pytest.approx((16 + 1) ** -0.5, rel=0.5)
    assert torch.equal(model.score, scorer(torch.float32).score)


def test_values_of_a_bf16_model_are_fp32():
    values = scorer(torch.bfloat16).values(*stream(5, 4))
    assert values.dtype == torch.float32 and values.shape == (9,)
