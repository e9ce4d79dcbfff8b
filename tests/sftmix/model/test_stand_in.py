"""A stand-in for the head: other rows through the model's own logits, scoring, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sftmix.model.head import HeadAdapter
from sftmix.pairs.collator import PairedCollator
from sftmix.training.scoring import score_examples
from tests.sftmix import tiny


def test_the_models_own_logits_of_other_rows() -> None:
    model = tiny.build("Gemma2", final_logit_softcapping=2.0).eval()
    tokens = torch.arange(3, 15).reshape(2, 6)
    expected = model(tokens).logits.reshape(-1, tiny.VOCABULARY)
    adapter = HeadAdapter(model, "logits")
    rows = torch.tensor([11, 0, 5])
    found = model(tokens, rows=rows, head_input=lambda hidden: hidden[[2, 0, 1, 1]]).value
    assert tiny.relative_difference(found, expected[rows[[2, 0, 1, 1]]]) <= 1e-6
    assert "forward" not in adapter.head.__dict__
    with pytest.raises(ZeroDivisionError):
        model(tokens, head_input=lambda hidden: 1 / 0)
    assert type(model.lm_head) is nn.Linear


def test_scoring_and_evaluation_through_the_models_own_logits(tmp_path: Path) -> None:
    data, model = tiny.examples(6), tiny.build("Gemma2")
    found = []
    for head in ("fused", "logits"):
        adapter = HeadAdapter(model, head)
        scores = score_examples(
            model, adapter, data, collator=PairedCollator(0), disable_progress=True
        )
        adapter.detach()
        made = tiny.trainer(model, tmp_path, data, eval_dataset=data, method="ntp", head=head)
        found.append((scores, made.evaluate()["eval_loss"]))
        made.head.detach()
    (fused, fused_loss), (logits, loss) = found
    assert torch.equal(logits.num_tokens, fused.num_tokens)
    assert tiny.relative_difference(logits.nll_sum, fused.nll_sum) <= 1e-6
    assert loss == pytest.approx(fused_loss, rel=1e-6)


class Sums(PreTrainedModel):
    """The least causal language model: quick to compile, and unknown to transformers."""

    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
        hidden = self.tokens(input_ids).cumsum(1).tanh()
        return CausalLMOutput(logits=5 * self.out(hidden))


# Dynamo looks at the gradient of every tensor between two graphs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("head", ["fused", "logits"])
def test_a_compiled_model_is_compiled_once(head: str, tmp_path: Path) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Sums(tiny.build("Llama").config)
    made = tiny.trainer(model, tmp_path, tiny.examples(16), head=head)
    batches = list(made.get_train_dataloader())

    def run(called: nn.Module) -> Iterator[tuple[float, Tensor, int]]:
        for batch in batches:
            model.zero_grad()
            loss = made.compute_loss(called, batch)
            assert isinstance(loss, Tensor)
            loss.backward()
            assert model.out.weight.grad is not None
            yield float(loss.detach()), model.out.weight.grad.clone(), len(graphs)

    expected = list(run(model))
    torch.compiler.reset()
    found = list(run(torch.compile(model, backend=count, dynamic=True)))
    torch.compiler.reset()
    for (loss, gradient, _), (own_loss, own_gradient, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(own_loss, rel=1e-6)
        assert tiny.relative_difference(gradient, own_gradient) <= 1e-6
    compiled = [number for _, _, number in found]
    assert compiled[0] > 0
    assert compiled[-1] == compiled[1]
